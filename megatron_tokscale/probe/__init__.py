"""The probe set (which tokens are watched), the schedule (on which steps), and what they cost."""

from megatron_tokscale.probe.probe_set import ProbeSet
from megatron_tokscale.probe.schedule import Moment, Schedule

__all__ = ["Moment", "ProbeSet", "Schedule"]

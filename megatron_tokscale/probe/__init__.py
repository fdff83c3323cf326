"""The probe set (which tokens are watched), and the schedule (on which steps)."""

from megatron_tokscale.probe.probe_set import ProbeSet
from megatron_tokscale.probe.schedule import Schedule

__all__ = ["ProbeSet", "Schedule"]

"""The probe set (which tokens are watched), the schedule (on which steps), and what they cost."""

from megatron_tokscale.probe.probe_set import ProbeSet
from megatron_tokscale.probe.schedule import DEFAULT_SCHEDULE, Moment, ProbeSchedule

__all__ = ["DEFAULT_SCHEDULE", "Moment", "ProbeSchedule", "ProbeSet"]

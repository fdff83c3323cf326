"""The probe set (the watched tokens), the probe schedule (the probe steps), and their cost."""

from megatron_tokscale.probe.probe_set import ProbeSet
from megatron_tokscale.probe.schedule import DEFAULT_SCHEDULE, JobPoint, ProbeSchedule

__all__ = ["DEFAULT_SCHEDULE", "JobPoint", "ProbeSchedule", "ProbeSet"]

"""From learning-time spectra to a plan for the data. Offline: nothing here runs in a job."""

from megatron_tokscale.reweight.describe import describe
from megatron_tokscale.reweight.guards import Guards
from megatron_tokscale.reweight.learnability import Spectra, read_spectra
from megatron_tokscale.reweight.planning import Job, make_plan, plan_by_hand, plan_run
from megatron_tokscale.reweight.policy import BySpectrum, Manual, Policy, Uniform

__all__ = [
    "BySpectrum",
    "Guards",
    "Job",
    "Manual",
    "Policy",
    "Spectra",
    "Uniform",
    "describe",
    "make_plan",
    "plan_by_hand",
    "plan_run",
    "read_spectra",
]

"""From learning times to a plan for the data. Offline: nothing here runs in a job."""

from megatron_tokscale.reweight.cutting import CutDataset, CutSettings, cut_dataset, read_scores
from megatron_tokscale.reweight.guards import Guards
from megatron_tokscale.reweight.job import Job, cut_job, job_of
from megatron_tokscale.reweight.learnability import Spectra, read_spectra
from megatron_tokscale.reweight.make_plan import make_plan
from megatron_tokscale.reweight.plan_text import describe_plan
from megatron_tokscale.reweight.planning import (
    Control,
    plan_by_hand,
    plan_frontier,
    plan_run,
    plan_uniform,
)
from megatron_tokscale.reweight.policy import (
    BySpectrum,
    EasyFirst,
    Frontier,
    Manual,
    Policy,
    Uniform,
)

__all__ = [
    "BySpectrum",
    "Control",
    "CutDataset",
    "CutSettings",
    "EasyFirst",
    "Frontier",
    "Guards",
    "Job",
    "Manual",
    "Policy",
    "Spectra",
    "Uniform",
    "cut_dataset",
    "cut_job",
    "describe_plan",
    "job_of",
    "make_plan",
    "plan_by_hand",
    "plan_frontier",
    "plan_run",
    "plan_uniform",
    "read_scores",
    "read_spectra",
]

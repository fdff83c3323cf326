"""From scores and learning times to a plan for the data. Offline: nothing here runs in a job."""

from megatron_tokscale.data.scores import read_scores
from megatron_tokscale.results.gain import Gain
from megatron_tokscale.reweight.by_score import ByFall, ByTarget
from megatron_tokscale.reweight.cutting import CutDataset, CutSettings
from megatron_tokscale.reweight.gain import GainSettings, gain_of, seeds_needed
from megatron_tokscale.reweight.guards import Guards
from megatron_tokscale.reweight.job import Job, cut_dataset, cut_job, job_of
from megatron_tokscale.reweight.learnability import Spectra, read_spectra
from megatron_tokscale.reweight.make_plan import make_plan
from megatron_tokscale.reweight.plan_text import describe_plan
from megatron_tokscale.reweight.planning import (
    PlanOptions,
    plan_by_hand,
    plan_by_scores,
    plan_run,
    plan_uniform,
    time_map_of,
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
    "ByFall",
    "BySpectrum",
    "ByTarget",
    "CutDataset",
    "CutSettings",
    "EasyFirst",
    "Frontier",
    "Gain",
    "GainSettings",
    "Guards",
    "Job",
    "Manual",
    "PlanOptions",
    "Policy",
    "Spectra",
    "Uniform",
    "cut_dataset",
    "cut_job",
    "describe_plan",
    "gain_of",
    "job_of",
    "make_plan",
    "plan_by_hand",
    "plan_by_scores",
    "plan_run",
    "plan_uniform",
    "read_scores",
    "read_spectra",
    "seeds_needed",
    "time_map_of",
]

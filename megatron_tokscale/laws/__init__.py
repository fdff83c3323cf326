"""Scaling laws of runs, and theories to compare learning times with.

The module of a theory fits and tests it. Its dataclass in `results/laws` is its part of laws.json,
`run_laws.py` calls it, and `explain.py` gives its rows of the table of explanations.

To add a theory:
1. `results/laws/<theory>.py`: a frozen dataclass of its numbers (`Estimate` for a number with an
   interval), and a field `<theory>: <Result> | Undefined` of `LawsResult`; raise `LAWS_SCHEMA`.
2. `laws/<theory>.py`, or a folder: `measure_<theory>(run, inputs, ...)` that returns the dataclass,
   or raises `UndefinedError` if the run does not determine it. Call it in `run_laws.py` within
   `defined_or_reason`.
3. `results/laws/<theory>.py`: a `Claim` with its margin, and a property `test` of the result;
   `laws/explain.py`: a function that returns its rows, called in `explanations`.
Test the fit against an independent source (scipy, a closed form, the authors' figures).
"""

from megatron_tokscale.laws.chinchilla import fit_chinchilla
from megatron_tokscale.laws.deceleration import fit_deceleration
from megatron_tokscale.laws.language.cagnetta import data_exponent
from megatron_tokscale.laws.language.context_exponent import fit_context_exponent
from megatron_tokscale.laws.language.correlations import correlation_exponent, token_correlations
from megatron_tokscale.laws.laws_text import describe_laws
from megatron_tokscale.laws.multi_power.multi_power import (
    LossCurve,
    fit_multi_power,
    predict_losses,
)
from megatron_tokscale.laws.one_third.group_test import group_test
from megatron_tokscale.laws.one_third.one_third import fit_one_third
from megatron_tokscale.laws.power_law.power_law import fit_power_law
from megatron_tokscale.laws.power_law.tail import tail_exponent
from megatron_tokscale.laws.quanta.learning_times import frequency_exponent
from megatron_tokscale.laws.run_laws import laws_run
from megatron_tokscale.laws.tables.curve_laws import laws_curves
from megatron_tokscale.laws.tables.curves_text import describe_curves
from megatron_tokscale.laws.zero_sum import ZeroSum

__all__ = [
    "LossCurve",
    "ZeroSum",
    "correlation_exponent",
    "data_exponent",
    "describe_curves",
    "describe_laws",
    "fit_chinchilla",
    "fit_context_exponent",
    "fit_deceleration",
    "fit_multi_power",
    "fit_one_third",
    "fit_power_law",
    "frequency_exponent",
    "group_test",
    "laws_curves",
    "laws_run",
    "predict_losses",
    "tail_exponent",
    "token_correlations",
]

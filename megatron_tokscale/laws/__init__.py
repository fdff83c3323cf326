"""Scaling laws of runs, and the theories to hold learning times against."""

from megatron_tokscale.laws.chinchilla import ChinchillaLaw, fit_chinchilla
from megatron_tokscale.laws.deceleration import Deceleration, fit_deceleration
from megatron_tokscale.laws.language.cagnetta import data_exponent, fit_context_exponent
from megatron_tokscale.laws.language.correlations import correlation_exponent, token_correlations
from megatron_tokscale.laws.laws_text import describe_laws
from megatron_tokscale.laws.multi_power.multi_power import LossCurve, MultiPowerLaw, fit_multi_power
from megatron_tokscale.laws.one_third.group_test import group_test
from megatron_tokscale.laws.one_third.one_third import OneThirdLaw, fit_one_third
from megatron_tokscale.laws.power_law.power_law import PowerLaw, fit_power_law
from megatron_tokscale.laws.power_law.tail import TailExponent, tail_exponent
from megatron_tokscale.laws.quanta.learning_times import FrequencyExponent, frequency_exponent
from megatron_tokscale.laws.run_laws import laws_run
from megatron_tokscale.laws.zero_sum import ZeroSum

__all__ = [
    "ChinchillaLaw",
    "Deceleration",
    "FrequencyExponent",
    "LossCurve",
    "MultiPowerLaw",
    "OneThirdLaw",
    "PowerLaw",
    "TailExponent",
    "ZeroSum",
    "correlation_exponent",
    "data_exponent",
    "describe_laws",
    "fit_chinchilla",
    "fit_context_exponent",
    "fit_deceleration",
    "fit_multi_power",
    "fit_one_third",
    "fit_power_law",
    "frequency_exponent",
    "group_test",
    "laws_run",
    "tail_exponent",
    "token_correlations",
]

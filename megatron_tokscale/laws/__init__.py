"""Scaling laws of a run: the loss curve's exponent, and the spectrum's tail to hold against it."""

from megatron_tokscale.laws.describe import describe_laws
from megatron_tokscale.laws.power_law import PowerLaw, fit_power_law
from megatron_tokscale.laws.run import laws_run
from megatron_tokscale.laws.tail import TailExponent, tail_exponent

__all__ = [
    "PowerLaw",
    "TailExponent",
    "describe_laws",
    "fit_power_law",
    "laws_run",
    "tail_exponent",
]

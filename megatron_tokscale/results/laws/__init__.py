"""Typed content of laws.json: one module per theory, all of them fields of `LawsResult`."""

from megatron_tokscale.results.laws.deceleration import Deceleration
from megatron_tokscale.results.laws.explanation import ExplanationRow
from megatron_tokscale.results.laws.language import (
    CagnettaResult,
    ContextExponent,
    CorrelationExponent,
    DataExponent,
    ExponentComparison,
)
from megatron_tokscale.results.laws.one_third import (
    GroupDrops,
    GroupExponents,
    GroupTest,
    ModelScore,
    OneThirdLaw,
    OneThirdResult,
)
from megatron_tokscale.results.laws.power_law import (
    DatasetPowerLaw,
    LossPowerLaw,
    OtherStart,
    PowerLaw,
    TailExponent,
    TailMinusLaw,
)
from megatron_tokscale.results.laws.quanta import (
    FrequencyExponent,
    MonogenicShare,
    QuantaExponents,
    QuantaResult,
)
from megatron_tokscale.results.laws.result import LawsResult, LawsSettings, read_laws
from megatron_tokscale.results.laws.several_runs import (
    ChinchillaForecast,
    ChinchillaLaw,
    ForecastScore,
    MultiPowerLaw,
    RunLoss,
    ScheduleForecast,
    SeveralRuns,
)
from megatron_tokscale.results.laws.zero_sum import ZeroSumPair, ZeroSumResult

__all__ = [
    "CagnettaResult",
    "ChinchillaForecast",
    "ChinchillaLaw",
    "ContextExponent",
    "CorrelationExponent",
    "DataExponent",
    "DatasetPowerLaw",
    "Deceleration",
    "ExplanationRow",
    "ExponentComparison",
    "ForecastScore",
    "FrequencyExponent",
    "GroupDrops",
    "GroupExponents",
    "GroupTest",
    "LawsResult",
    "LawsSettings",
    "LossPowerLaw",
    "ModelScore",
    "MonogenicShare",
    "MultiPowerLaw",
    "OneThirdLaw",
    "OneThirdResult",
    "OtherStart",
    "PowerLaw",
    "QuantaExponents",
    "QuantaResult",
    "RunLoss",
    "ScheduleForecast",
    "SeveralRuns",
    "TailExponent",
    "TailMinusLaw",
    "ZeroSumPair",
    "ZeroSumResult",
    "read_laws",
]

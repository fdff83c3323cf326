"""The content of laws.json, and its reader."""

from dataclasses import dataclass

from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.schemas import LAWS_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary, NonFiniteLosses
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.fitted import check_identity
from megatron_tokscale.results.laws.deceleration import Deceleration
from megatron_tokscale.results.laws.explanation import ExplanationRow
from megatron_tokscale.results.laws.language import CagnettaResult
from megatron_tokscale.results.laws.one_third import OneThirdResult
from megatron_tokscale.results.laws.power_law import (
    DatasetPowerLaw,
    LossPowerLaw,
    OtherStart,
    TailExponent,
    TailMinusLaw,
)
from megatron_tokscale.results.laws.quanta import QuantaResult
from megatron_tokscale.results.laws.several_runs import SeveralRuns
from megatron_tokscale.results.laws.zero_sum import ZeroSumResult
from megatron_tokscale.store import Run


@dataclass(frozen=True)
class LawsSettings:
    """Settings of the analysis.

    Attributes:
        start: first time that power laws are fitted to.
        n_resamples: number of bootstrap resamples of each fit.
        seed: seed of the bootstrap.
    """

    start: float
    n_resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class LawsResult:
    """The content of laws.json: every law and theory of a run, or why it is undefined.

    Attributes:
        fit: the fits of the spectrum.
        non_finite: counts of losses that are not finite.
        settings: settings of the analysis.
        overall: power law of the mean loss of all tokens.
        datasets: power law of each dataset.
        other_starts: power law of all tokens, fitted from other times on.
        tail: tail of the spectrum.
        tail_minus_law: exponent of the tail minus the exponent of the loss.
        one_third: one-third law in the summed learning rate.
        quanta: quantization model.
        cagnetta: data exponent from the statistics of the language.
        zero_sum: zero-sum learning.
        deceleration: break to a slower power law.
        several: laws over several runs; None where one run was analysed.
        explanations: table of all claims and their verdicts.
    """

    fit: FitIdentity
    non_finite: NonFiniteLosses
    settings: LawsSettings
    overall: LossPowerLaw | Undefined
    datasets: tuple[DatasetPowerLaw, ...]
    other_starts: tuple[OtherStart, ...]
    tail: TailExponent | Undefined
    tail_minus_law: TailMinusLaw | Undefined
    one_third: OneThirdResult | Undefined
    quanta: QuantaResult
    cagnetta: CagnettaResult
    zero_sum: ZeroSumResult | Undefined
    deceleration: Deceleration | Undefined
    several: SeveralRuns | None
    explanations: tuple[ExplanationRow, ...] = ()

    @property
    def time(self) -> str:
        """The name of the time."""
        return self.fit.time_name


def read_laws(run: Run, fit: FitSummary) -> LawsResult | None:
    """Return the content of laws.json, made from the fits in `fit`; None without the file.

    Raises:
        TokscaleError: the file is damaged, of another schema, or of other fits.
    """
    path = run.paths.laws
    if not is_there(path):
        return None
    again = f"run `megatron-tokscale laws {run.path}` again, with the other runs if there were any"
    laws = read_typed_result(LawsResult, path, LAWS_SCHEMA, again)
    check_identity(path, laws.fit, fit.identity, again)
    return laws

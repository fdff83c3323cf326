"""The content of laws.json, and its reader."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tokscale.core.checked import read_result
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.records import read_as
from megatron_tokscale.core.schemas import LAWS_SCHEMA
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.fitted import check_made_of, heading
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
from megatron_tokscale.store.reader import Time


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
        schema_version: schema of the file.
        version: version of this package.
        run_id: the analysed run; the next five fields too name what was analysed.
        probe_fingerprint: fingerprint of the probe set.
        steps: probe steps.
        losses_crc32: checksums of the losses.
        time: unit of time: steps, tokens or summed learning rate.
        fit_id: the fits of the spectrum.
        non_finite: number of losses that are not finite, of their tokens, and of all tokens.
        settings: settings of the analysis.
        overall: power law of the mean loss of all tokens.
        datasets: power law of each dataset.
        other_starts: power law of all tokens, fitted from other times on.
        tail: tail of the spectrum.
        tail_minus_law: exponent of the tail less the exponent of the loss.
        one_third: one-third law in the summed learning rate.
        quanta: quantization model.
        cagnetta: data exponent from the statistics of the language.
        zero_sum: zero-sum learning.
        deceleration: break to a slower power law.
        several: laws over several runs; None where one run was analysed.
        explanations: table of all claims and their verdicts.
    """

    schema_version: int
    version: str
    run_id: str
    probe_fingerprint: str
    steps: tuple[int, ...]
    losses_crc32: tuple[str, ...]
    time: Time
    fit_id: str
    non_finite: dict[str, int]
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


def read_laws(run: Run, fit: Mapping[str, Any]) -> LawsResult | None:
    """Return the content of laws.json, made of the fits in `fit`; None without such a file.

    Raises:
        TokscaleError: the file is damaged, of another schema, or of other fits.
    """
    path = run.analysis / "laws.json"
    if not is_there(path):
        return None
    again = f"run `megatron-tokscale laws {run.path}` again, with the other runs if there were any"
    content = read_result(path, LAWS_SCHEMA, again)
    check_made_of(path, content, heading(fit), again)
    return read_as(LawsResult, {k: v for k, v in content.items() if k != "checksum"}, path, again)

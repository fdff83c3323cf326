"""The content of transfer.json: learning times of other runs, tested on this one."""

from dataclasses import dataclass

from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.files import is_there, read_json, schema_version
from megatron_tokscale.core.schemas import TRANSFER_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.fitted import check_identity
from megatron_tokscale.results.skill import GroupTests
from megatron_tokscale.store import Run


@dataclass(frozen=True)
class LearningOrder:
    """Predictions of the ranks in the learning order of this run.

    Attributes:
        tokens: tokens with a learning time in both runs: the ranks are among these.
        spearman: Spearman's correlation of the ranks with each predictor, by its name.
        explained_by_baseline: share of the ranks' variance that the baseline predictors explain.
        explained_with_time: share that the baseline predictors and the other run's times explain.
        gain: the second share minus the first, which is never negative.
        partial: correlation of the two runs' ranks beyond the baseline predictors.
        passes: the verdict: whether the whole interval of `partial` is above zero. None without an
            interval.
    """

    tokens: int
    spearman: dict[str, Estimate]
    explained_by_baseline: Estimate
    explained_with_time: Estimate
    gain: Estimate
    partial: Estimate
    passes: bool | None


@dataclass(frozen=True)
class TransferSettings:
    """Settings of a test of learning times on the losses of other runs.

    Attributes:
        n_resamples: bootstrap resamples of the documents.
        permutations: permutations of the learning times.
        seed: seed of all draws.
    """

    n_resamples: int
    permutations: int
    seed: int


@dataclass(frozen=True)
class Transfer:
    """Learning times of one other run (the source), tested on this run.

    Attributes:
        source: name of the source's directory.
        source_run_id: id of the source.
        source_steps: probe steps of the source.
        fit: this run's fits.
        documents: number of documents that the intervals are over.
        absolute: tests with the runs aligned at the same time.
        by_loss: tests with the runs aligned at the same mean loss.
        order: the learning order of the tokens.
        settings: settings of `transfer_run`.
    """

    source: str
    source_run_id: str
    source_steps: tuple[int, ...]
    fit: FitIdentity
    documents: int
    absolute: GroupTests
    by_loss: GroupTests
    order: LearningOrder | Undefined
    settings: TransferSettings


@dataclass(frozen=True)
class Transfers:
    """The content of transfer.json: one transfer per source."""

    transfers: tuple[Transfer, ...]


def read_transfer(run: Run, fit: FitSummary) -> tuple[Transfer, ...]:
    """Return the transfers in transfer.json, all tested on `fit`; no transfers without the file.

    Raises:
        TokscaleError: the file is damaged or of another schema, or a transfer is of other fits.
    """
    path = run.paths.transfer
    if not is_there(path):
        return ()
    again = f"remove it, and test again: `megatron-tokscale spectrum {run.path} --source OTHER-RUN`"
    found = read_typed_result(Transfers, path, TRANSFER_SCHEMA, again).transfers
    for each in found:
        check_identity(path, each.fit, fit.identity, f"it has {each.source}; {again}")
    return found


def transfers_to_keep(run: Run, fit: FitSummary) -> tuple[Transfer, ...]:
    """Return the transfers in transfer.json that were tested on `fit`, to keep beside a new one.

    Raises:
        TokscaleError: the file is damaged, or of a newer schema.
    """
    path = run.paths.transfer
    if not is_there(path) or schema_version(path, read_json(path)) < TRANSFER_SCHEMA:
        return ()
    again = "remove it, and test again"
    found = read_typed_result(Transfers, path, TRANSFER_SCHEMA, again).transfers
    return tuple(each for each in found if each.fit == fit.identity)

"""The content of transfer.json: learning times of other runs, tested on this one."""

from dataclasses import dataclass

from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.files import is_there, read_json, schema_version
from megatron_tokscale.core.schemas import TRANSFER_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.fitted import check_identity
from megatron_tokscale.results.skill import GroupTests
from megatron_tokscale.results.verdict import ClaimTest
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
        test: test of `primary.ORDER` on the correlation of the two runs' ranks beyond the baseline
            predictors.
    """

    tokens: int
    spearman: dict[str, Estimate]
    explained_by_baseline: Estimate
    explained_with_time: Estimate
    gain: Estimate
    test: ClaimTest


@dataclass(frozen=True)
class FallCovariance:
    """Covariance of tokens' falls per octave of time between two runs, within groups.

    Attributes:
        tokens: tokens with finite losses in both runs.
        groups: groups of tokens, whose mean falls are subtracted.
        edges: edges of the octaves in x of the common clock.
        far_octaves: least distance of octaves that count as far apart.
        covariance: covariance of falls in each two octaves, in nats^2; symmetric.
        profile: mean covariance at each distance of octaves over that at distance 0.
        reproducible: share of the variance of a token's fall in an octave, beyond its group, that
            both runs share.
        test: test of `primary.COVARIANCE` on the mean covariance of octaves far apart, over that
            at distance 0.
    """

    tokens: int
    groups: int
    edges: tuple[float, ...]
    far_octaves: int
    covariance: tuple[tuple[float, ...], ...]
    profile: tuple[Estimate, ...]
    reproducible: Estimate
    test: ClaimTest


@dataclass(frozen=True)
class Surface:
    """Falls of learning-time bins of tokens, predicted by another run.

    Attributes:
        tokens: tokens with a fit in the other run and finite losses in both.
        bins: bins of tokens, with that of the tokens without a learning time.
        intervals: intervals of x, of about half an octave.
        null: share of the variance between the bins, beyond their groups, that the null model
            explains: every token has the mean curve of its group, scaled to its own total fall.
        tests: tests of the skill of each prediction beyond the null model, by the prediction's
            name, with Holm's correction over them.
    """

    tokens: int
    bins: int
    intervals: int
    null: float
    tests: dict[str, ClaimTest]


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
        n_units: number of documents, samples or blocks that the intervals are over.
        absolute: skills with the runs aligned at the same time. The tests of both alignments are
            one family with Holm's correction.
        by_loss: skills with the runs aligned at the same mean loss.
        clock: name of the time at which the runs are compared.
        order: the learning order of the tokens.
        falls: the covariance of the tokens' falls.
        surface: the falls of learning-time bins.
        settings: settings of `transfer_run`.
    """

    source: str
    source_run_id: str
    source_steps: tuple[int, ...]
    fit: FitIdentity
    n_units: int
    absolute: GroupTests
    by_loss: GroupTests
    clock: str
    order: LearningOrder | Undefined
    falls: FallCovariance | Undefined
    surface: Surface | Undefined
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

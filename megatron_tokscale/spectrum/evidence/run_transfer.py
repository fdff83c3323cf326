"""`transfer_run`: test learning times of one run on the losses of another, write transfer.json.

Shapes: N tokens, K probe steps, J intervals of x, U resampling units, R resamples.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import MOST_UNITS, Units
from megatron_tokscale.core.schemas import TRANSFER_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results import FittedRun, Transfer, transfers_to_keep
from megatron_tokscale.results.estimate import Undefined, defined_or_reason
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.results.skill import GroupTests
from megatron_tokscale.results.transfer import (
    FallCovariance,
    LearningOrder,
    Surface,
    Transfers,
    TransferSettings,
)
from megatron_tokscale.spectrum.events import learning_times
from megatron_tokscale.spectrum.evidence.fall_covariance import FallSums, octaves
from megatron_tokscale.spectrum.evidence.falls import OCTAVE, fall_weights, intervals
from megatron_tokscale.spectrum.evidence.order import learning_order
from megatron_tokscale.spectrum.evidence.shared_clock import SharedClock
from megatron_tokscale.spectrum.evidence.surface import (
    Comparison,
    SurfaceSums,
    moving_times,
    time_bins,
)
from megatron_tokscale.spectrum.evidence.token_groups import token_groups
from megatron_tokscale.spectrum.evidence.transfer import (
    PERMUTATIONS,
    Alignment,
    TransferSums,
    corrected,
)
from megatron_tokscale.spectrum.groups import (
    Groups,
    baseline_predictors,
    groupings,
)
from megatron_tokscale.spectrum.run_spectrum import draw_tokens
from megatron_tokscale.spectrum.scored_range import scored_range_of
from megatron_tokscale.spectrum.sums import loss_sums
from megatron_tokscale.store import Run, check_different_runs

_RANKED_TOKENS = 500_000  # tokens for the learning order: a table of a few hundred MB (our choice)
_VALUES_PER_GROUP, _LEAST_UNITS = 2**16, 128  # bounds of the tables of units, groups and probes


def transfer_run(
    source: Run,
    target: Run,
    *,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> Transfer:
    """Test learning times of `source` on the losses of `target`, and write the transfer.

    The target's transfer.json has one transfer per source run; an older one is replaced.

    Args:
        source: a fitted run (A).
        target: a fitted run (B) with the same probe set; its own learning times are a rival, the
            most that learning times can explain.
        n_resamples: bootstrap resamples of the documents.
        seed: seed of the draws, the permutations and the bootstrap.
        progress: receiver of the name of each stage; None for none.

    Returns:
        The learning order (`learning_order`), the covariance of falls (`fall_covariance`), the
        surface (`surface`), and the skills by alignment and grouping (`TransferSums.tests`).

    Raises:
        TokscaleError: the runs are the same, watch different tokens, or have no common clock;
            one is not fitted; no token has all losses in both; the target's transfer.json is
            damaged.
    """
    progress = progress or NoProgress()
    pair = FittedPair.open(source, target)
    units, weight_RU = pair.units(n_resamples, seed)
    progress.stage("mean curves and learning times")
    curves = _Curves.from_pair(pair)
    progress.stage("falls of tokens, and of bins of learning time")
    falls, surface = _falls_and_surface(pair, curves, units, weight_RU)
    progress.stage("learning order")
    order = defined_or_reason(lambda: _order(pair, curves, units, weight_RU, seed))
    absolute, by_loss = _group_tests(pair, curves, units, weight_RU, seed, progress)
    transfer = Transfer(
        source=source.path.name,
        source_run_id=source.info.run_id,
        source_steps=tuple(source.step_K.tolist()),
        fit=pair.target.fit.identity,
        n_units=units.documents,
        absolute=absolute,
        by_loss=by_loss,
        clock=target.time_name(pair.clock.time),
        order=order,
        falls=falls,
        surface=surface,
        settings=TransferSettings(n_resamples, PERMUTATIONS, seed),
    )
    _store(pair.target, transfer)
    return transfer


def _group_tests(
    pair: "FittedPair",
    curves: "_Curves",
    units: Units,
    weight_RU: Floats,
    seed: int,
    progress: Progress,
) -> tuple[GroupTests, GroupTests]:
    """Return the tests by grouping at the same time and at the same mean loss, one family."""
    groups = groupings(pair.target.run.tokens)
    found: list[GroupTests] = []
    alignments: dict[str, Callable[[FittedPair], Alignment]] = {
        "groups of tokens": curves.alignment_at_time,
        "groups of tokens, aligned by loss": curves.alignment_by_loss,
    }
    for words, alignment in alignments.items():
        progress.stage(words)
        found.append(
            defined_or_reason(
                lambda: _sums(pair, alignment(pair), groups, units).tests(weight_RU, seed)  # noqa: B023
            )
        )
    absolute, by_loss = corrected(found)
    return absolute, by_loss


def _order(
    pair: "FittedPair", curves: "_Curves", units: Units, weight_RU: Floats, seed: int
) -> LearningOrder:
    tokens = pair.target.run.tokens
    sample = draw_tokens(tokens.n_tokens, _RANKED_TOKENS, seed)
    baseline = baseline_predictors(tokens)
    baseline["mean loss in the other run"] = curves.source_level_N
    return learning_order(
        curves.source_time_N[sample],
        curves.target_time_N[sample],
        {name: value_N[sample] for name, value_N in baseline.items()},
        units.unit_N[sample],
        weight_RU,
    )


def _falls_and_surface(
    pair: "FittedPair", curves: "_Curves", units: Units, weight_RU: Floats
) -> tuple[FallCovariance | Undefined, Surface | Undefined]:
    """Return the covariance of falls and the surface, from one pass over the tokens."""
    clock, (from_x, to_x) = pair.clock, pair.common_range()
    groups = token_groups(pair.target.run.tokens)

    def fall_sums() -> FallSums:
        edges = octaves(from_x, to_x)
        return FallSums(edges, clock.source_x_K, clock.target_x_K, groups, units)

    def surface_sums() -> SurfaceSums:
        bins = time_bins(curves.moving_time_N, pair.source.x_K)
        operator_KJ = fall_weights(clock.target_x_K, intervals(from_x, to_x, OCTAVE / 2))
        compared = Comparison(pair.source.x_K, clock.place_K(), operator_KJ)
        return SurfaceSums(bins, groups, compared, units)

    falls, surface = defined_or_reason(fall_sums), defined_or_reason(surface_sums)
    for at, fits, source_NK, _, loss_NK in pair.blocks():
        if not isinstance(falls, Undefined):
            falls.add(at, source_NK, loss_NK)
        if not isinstance(surface, Undefined):
            surface.add(at, fits, source_NK, loss_NK)
    return (
        falls if isinstance(falls, Undefined) else falls.result(weight_RU),
        surface if isinstance(surface, Undefined) else defined_or_reason(surface.result),
    )


type _PairBlock = tuple[slice, SigmoidFits, Floats32, SigmoidFits, Floats32]
"""Slice of tokens; their fits and losses in the source; their fits and losses in the target."""


@dataclass(frozen=True)
class FittedPair:
    """Two fitted runs for a test of transfer. Make one with `FittedPair.open`."""

    source: FittedRun
    target: FittedRun

    @classmethod
    def open(cls, source: Run, target: Run) -> Self:
        """Open two runs that watch the same tokens and have a common clock.

        Raises:
            TokscaleError: see `transfer_run`.
        """
        check_different_runs((target, source))
        if source.tokens.fingerprint != target.tokens.fingerprint:
            raise TokscaleError(
                f"{source.path} and {target.path} watch different tokens: their probe sets are "
                f"{source.tokens.fingerprint} and {target.tokens.fingerprint}; test runs "
                "with one probe set"
            )
        pair = cls(FittedRun.open(source), FittedRun.open(target))
        transfers_to_keep(target, pair.target.fit)  # refuse a damaged file before the long work
        SharedClock.of(pair.source, pair.target)  # refuses runs without one
        return pair

    @cached_property
    def clock(self) -> SharedClock:
        """The clock on which the runs are compared."""
        return SharedClock.of(self.source, self.target)

    @cached_property
    def ranges(self) -> tuple[ScoredRange, ScoredRange]:
        """The scored ranges of source and target, each in the time of its own fits."""
        source, target = (
            scored_range_of(each.run, each.x_K, each.run.mean_losses())
            for each in (self.source, self.target)
        )
        return source, target

    def common_range(self) -> tuple[float, float]:
        """Return the ends of the range of the clock that is in the scored range of both runs."""
        source, target = self.ranges
        ends = [
            clock_K[scored.holds(x_K)][[0, -1]]
            for scored, x_K, clock_K in (
                (source, self.source.x_K, self.clock.source_x_K),
                (target, self.target.x_K, self.clock.target_x_K),
            )
        ]
        return float(max(first for first, _ in ends)), float(min(last for _, last in ends))

    def units(self, n_resamples: int, seed: int) -> tuple[Units, Floats]:
        """Return the resampling units and their weights; many probes leave fewer units.

        Tables of units, groups and probes are kept in memory, which bounds the units.
        """
        most = max(_VALUES_PER_GROUP // len(self.target.x_K), _LEAST_UNITS)
        units = self.target.run.tokens.units(seed, min(most, MOST_UNITS))
        return units, units.weights(n_resamples, seed)

    def blocks(self) -> Iterator[_PairBlock]:
        """Yield blocks of tokens with the fits and losses of both runs."""
        rest: list[SigmoidFits] = []
        ahead = self.target.blocks()
        for at, fits, loss_NK in self.source.blocks():
            # The target's blocks may have other bounds: join as many as cover the source's block.
            have = sum(map(len, rest))
            while have < len(fits):
                rest.append(next(ahead)[1])
                have += len(rest[-1])
            joined = SigmoidFits.concatenate(rest)
            own, rest = joined.rows(slice(0, len(fits))), [joined.rows(slice(len(fits), None))]
            yield at, fits, loss_NK, own, self.target.fitted_losses(at)


@dataclass(frozen=True)
class _Curves:
    """Mean losses of two runs over the tokens with all losses in both, and learning times.

    Attributes:
        source_loss_K: mean loss of the source at its probes, in nats.
        target_loss_K: mean loss of the target at its probes.
        source_time_N: learning times in the source, in x; NaN for a token without one.
        target_time_N: learning times in the target, in the same form.
        moving_time_N: midpoints of all tokens that fall in the source (`moving_times`).
        source_level_N: each token's mean loss in the source.
    """

    source_loss_K: Floats
    target_loss_K: Floats
    source_time_N: Floats
    target_time_N: Floats
    moving_time_N: Floats
    source_level_N: Floats

    @classmethod
    def from_pair(cls, pair: FittedPair) -> Self:
        """Return means and times, from one pass over the tokens.

        Raises:
            TokscaleError: no token has a fit and finite losses at all probes of both runs.
        """
        source_K, target_K = np.zeros(len(pair.source.x_K)), np.zeros(len(pair.target.x_K))
        count = 0
        columns = []
        for _, fits, source_NK, own, loss_NK in pair.blocks():
            whole_N = fits.complete_N & own.complete_N
            one_cell_N = np.zeros(whole_N.sum(), int)
            source_K += loss_sums(source_NK[whole_N], one_cell_N, 1)[0]
            target_K += loss_sums(loss_NK[whole_N], one_cell_N, 1)[0]
            count += int(whole_N.sum())
            level_N = fits.level_N.astype(np.float64)
            times = [
                learning_times(each, from_x=scored.from_x, to_x=scored.to_x)
                for each, scored in zip((fits, own), pair.ranges, strict=True)
            ]
            columns.append((*times, moving_times(fits), level_N))
        if not count:
            raise TokscaleError(
                "no token has a fit and finite losses at all probes of both runs; expected at "
                "least one; test runs without losses that are NaN or infinite"
            )
        joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
        return cls(source_K / count, target_K / count, *joined)

    def alignment_at_time(self, pair: FittedPair) -> Alignment:
        """Align the runs at the same time of the clock.

        Raises:
            UndefinedError: fewer than four probes of the target.
        """
        return Alignment.absolute(pair.target.x_K, self.target_loss_K, pair.clock.place_K())

    def alignment_by_loss(self, pair: FittedPair) -> Alignment:
        """Align the runs by these mean losses.

        Raises:
            UndefinedError: the ranges of the mean losses overlap too little.
        """
        return Alignment.by_loss(
            pair.source.x_K, self.source_loss_K, pair.target.x_K, self.target_loss_K
        )


def _sums(
    pair: FittedPair, alignment: Alignment, groups: Mapping[str, Groups], units: Units
) -> TransferSums:
    """Return the sums over all tokens for the tests of one alignment."""
    sums = TransferSums(alignment, groups, units)
    for at, fits, source_NK, own, loss_NK in pair.blocks():
        sums.add(at, fits, loss_NK, source_NK, own, pair.target.x_K)
    return sums


def _store(target: FittedRun, transfer: Transfer) -> None:
    """Write the transfer beside the transfers of other sources."""
    others = (
        each
        for each in transfers_to_keep(target.run, target.fit)
        if each.source_run_id != transfer.source_run_id
    )
    path = target.run.paths.transfer
    write_typed_result(path, TRANSFER_SCHEMA, Transfers((*others, transfer)))

"""The rows of a comparison: changes, late losses and factors of groups of tokens.

Shapes: N compared tokens, K probe steps, G groups, U units, R resamples (the first is the data as
they are), S noise runs, I runs (A, B and the noise runs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tokscale.compare.calls import Calls, call_changes
from megatron_tokscale.compare.common_noise import LeftOver
from megatron_tokscale.compare.late_loss import window_weights
from megatron_tokscale.compare.shifts import (
    LEAST_TOKENS,
    as_factors,
    comparable,
    median_sooner,
    sooner_at_loss,
)
from megatron_tokscale.compare.token_table import TokenTable
from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import TokenClass
from megatron_tokscale.results.comparison import NO_SECOND_SEED, Change, GroupComparison, Sooner
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.evidence.skill import GroupSums
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import loss_sums, table_of

ALL = "all tokens"
"""Name of the grouping with one group."""
CLASS = "class in A"
"""Name of the grouping by the class of a token's fit in the baseline."""
_FEW_TIMES = f"fewer than {LEAST_TOKENS} tokens have a learning time in both runs"
_NEVER_ABOVE = "the run with the lower late loss was never above that of the other run"


@dataclass(frozen=True)
class Tables:
    """The tables of the runs over the compared tokens, on one clock.

    Attributes:
        a: the baseline.
        b: the other run.
        noise: further seeds of the baseline.
        from_x: start of the compared range.
        end: x of the common end.
        cell_N: group of each token by what is known of it before training; the noise between seeds
            is estimated in these groups.
    """

    a: TokenTable
    b: TokenTable
    noise: tuple[TokenTable, ...]
    from_x: float
    end: float
    cell_N: Integers

    def calls(self) -> tuple[Calls, Calls]:
        """Return the calls of gained and of lost tokens; the noise differs between classes in A."""
        class_N = self.a.class_N.astype(np.int64) - TokenClass.UNFITTED
        fine_N = self.cell_N * (len(TokenClass) + 1) + class_N
        return call_changes(self.a, self.b, self.noise, (fine_N, class_N))


class MeanCurves:
    """Sums of losses by unit and group, for each run, and means of them.

    Args:
        groupings: the groupings, by name.
        units: resampling units of the compared tokens.
        x_IK: clock of each run at its probes.
    """

    def __init__(self, groupings: Mapping[str, Groups], units: Units, x_IK: Sequence[Floats]):
        self._x_IK = x_IK
        self._sums = {
            name: [GroupSums(each, units) for _ in x_IK] for name, each in groupings.items()
        }

    def add(self, run: int, at: slice, loss_NK: Floats32) -> None:
        """Add losses of run number `run`: those of the compared tokens in the slice."""
        for sums in self._sums.values():
            each = sums[run]
            cell_N = each.cells(at)
            tokens_C = np.bincount(cell_N, minlength=each.n_cells).astype(np.float64)
            each.add("tokens", tokens_C[:, None])
            each.add("loss", loss_sums(loss_NK, cell_N, each.n_cells))

    def means(self, name: str, weight_RU: Floats) -> list[tuple[Floats, Floats]]:
        """Return (R, G, K) mean losses of a grouping, NaN for an empty group, and x_K, by run."""
        found = []
        for sums, x_K in zip(self._sums[name], self._x_IK, strict=True):
            share_RG, loss_RGK = sums.means("loss", weight_RU)
            loss_RGK[share_RG == 0] = np.nan
            found.append((loss_RGK, x_K))
        return found


def groupings_of(known: Mapping[str, Groups], tables: Tables) -> dict[str, Groups]:
    """Return all tokens as one group, the known groupings, and that by class in A.

    Groups without a compared token are left out.
    """
    classes = list(TokenClass)
    number_N = np.searchsorted([int(each) for each in classes], tables.a.class_N)
    by_class = Groups(number_N.astype(np.int64), tuple(each.label for each in classes))
    every = Groups(np.zeros(len(number_N), np.int64), (ALL,))
    found = {ALL: every, **known, CLASS: by_class}
    return {name: _present(each) for name, each in found.items()}


def _present(groups: Groups) -> Groups:
    """Return the groups that have a token."""
    present, group_N = np.unique(groups.group_N, return_inverse=True)
    return Groups(group_N, tuple(groups.names[g] for g in present))


def compare_groups(
    tables: Tables,
    calls: tuple[Calls, Calls],
    groupings: Mapping[str, Groups],
    curves: MeanCurves,
    units: Units,
    weight_RU: Floats,
    left: tuple[LeftOver, LeftOver],
) -> dict[str, tuple[GroupComparison, ...]]:
    """Return the comparison of each group, by grouping; `ALL` is among the groupings.

    Args:
        tables: the tables of the runs.
        calls: the calls of gained and of lost tokens.
        groupings: the groupings, by name.
        curves: the mean losses of the groups.
        units: resampling units.
        weight_RU: their weights.
        left: the common noise that is left in the losses of A, and of B.
    """
    whole = _differences(tables, ALL, groupings[ALL], curves, units, weight_RU, left)
    return {
        name: _rows(tables, calls, groups, units, weight_RU, whole, of_groups)
        for name, groups in groupings.items()
        for of_groups in [_differences(tables, name, groups, curves, units, weight_RU, left)]
    }


@dataclass(frozen=True)
class _Differences:
    """By how much B, and each noise run, is sooner than A in x, of each group.

    Attributes:
        counted_G: tokens with learning times that count in A and B.
        times_RG: by learning times.
        seed_times: the same for each noise run.
        tokens_G: tokens.
        losses_RG: at the late loss.
        seed_losses: the same for each noise run.
        common_losses_RG: at the late loss, with the common noise in the resamples too.
        common_lower_RG: what the common noise adds to the late loss of A less that of B.
    """

    counted_G: Integers
    times_RG: Floats
    seed_times: list[Floats]
    tokens_G: Integers
    losses_RG: Floats
    seed_losses: list[Floats]
    common_losses_RG: Floats
    common_lower_RG: Floats


def _differences(
    tables: Tables,
    name: str,
    groups: Groups,
    curves: MeanCurves,
    units: Units,
    weight_RU: Floats,
    left: tuple[LeftOver, LeftOver],
) -> _Differences:
    """Return the differences of x of all runs against A."""
    times, counts = [], []
    for other in (tables.b, *tables.noise):
        counted_N = comparable(tables.a, other, tables.from_x, tables.end)
        median_RG, count_G = median_sooner(tables.a, other, counted_N, groups, units, weight_RU)
        times.append(median_RG)
        counts.append(count_G)
    (first_RGK, first_x_K), *others = curves.means(name, weight_RU)
    losses = [
        sooner_at_loss(first_RGK, first_x_K, loss_RGK, x_K, tables.end) for loss_RGK, x_K in others
    ]
    tokens_G = np.bincount(groups.group_N, minlength=len(groups.names))
    left_a_RGK, left_b_RGK = (each.of_groups(groups) for each in left)
    (loss_b_RGK, x_b_K), *_ = others
    common_losses_RG = sooner_at_loss(
        first_RGK + left_a_RGK, first_x_K, loss_b_RGK + left_b_RGK, x_b_K, tables.end
    )
    late_a_RG, late_b_RG = (
        left_RGK @ window_weights(x_K, tables.end)
        for left_RGK, x_K in ((left_a_RGK, first_x_K), (left_b_RGK, x_b_K))
    )
    return _Differences(
        counts[0],
        times[0],
        times[1:],
        tokens_G,
        losses[0],
        losses[1:],
        common_losses_RG,
        late_a_RG - late_b_RG,
    )


def _rows(
    tables: Tables,
    calls: tuple[Calls, Calls],
    groups: Groups,
    units: Units,
    weight_RU: Floats,
    whole: _Differences,
    of_groups: _Differences,
) -> tuple[GroupComparison, ...]:
    """Return the rows of one grouping."""
    shape_UG = (len(units), len(groups.names))

    def total_RG(value_N: Floats | None = None) -> Floats:
        return weight_RU @ table_of(shape_UG, units.unit_N, groups.group_N, value_N)

    a, b = tables.a, tables.b
    tokens_RG = total_RG()
    tokens_RG[tokens_RG == 0] = np.nan
    tokens_G = tokens_RG[0]
    learned = [total_RG(each.learned_N.astype(float))[0] / tokens_G for each in (a, b)]
    late_a_N = a.late_N.astype(np.float64)
    late_a_G = total_RG(late_a_N)[0] / tokens_G
    lower_RG, *seed_lower = (
        total_RG(late_a_N - other.late_N) / tokens_RG for other in (b, *tables.noise)
    )
    gained, lost = (_changes(each, groups, total_RG) for each in calls)
    by_times = _joined(whole, of_groups, "times")
    by_losses = _joined(whole, of_groups, "losses")
    return tuple(
        GroupComparison(
            name=group,
            tokens=int(tokens_G[g]),
            learned_a=float(learned[0][g]),
            learned_b=float(learned[1][g]),
            gained=gained[g],
            lost=lost[g],
            late_loss_a=float(late_a_G[g]),
            lower=Estimate.from_resamples(lower_RG[:, g] + of_groups.common_lower_RG[:, g]),
            seed_lower=tuple(float(each[0, g]) for each in seed_lower),
            learning_times=by_times[g],
            late_loss=by_losses[g],
        )
        for g, group in enumerate(groups.names)
    )


def _joined(whole: _Differences, of_groups: _Differences, kind: str) -> list[Sooner]:
    """Return the factors of the groups; the spread of seeds over all tokens counts in each."""
    parts = (whole, of_groups)
    if kind == "times":
        tokens = [each.counted_G for each in parts]
        values = [each.times_RG for each in parts]
        seeds, why = [each.seed_times for each in parts], _FEW_TIMES
    else:
        tokens = [each.tokens_G for each in parts]
        values = [each.losses_RG for each in parts]
        seeds, why = [each.seed_losses for each in parts], _NEVER_ABOVE
    common = values if kind == "times" else [each.common_losses_RG for each in parts]
    joined = [np.concatenate(pair, axis=1) for pair in zip(*seeds, strict=True)]
    value_RG, common_RG = (np.concatenate(each, axis=1) for each in (values, common))
    return as_factors(np.concatenate(tokens), value_RG, joined, why, common_RG)[1:]


def _changes(calls: Calls, groups: Groups, total_RG: Callable[[Floats], Floats]) -> list[Change]:
    """Return the changes of each group in one direction."""
    count_RG = total_RG(calls.candidate_N.astype(float))
    called_G = total_RG(calls.called_N.astype(float))[0]
    if not len(calls.seed_SN):
        return [Change(int(count), *[NO_SECOND_SEED] * 4) for count in count_RG[0]]
    seed_RG = total_RG(calls.seed_SN.mean(axis=0))
    false_G = total_RG(calls.beyond_SN.mean(axis=0))[0]
    return [
        Change(
            tokens=int(count_RG[0, g]),
            seed=float(seed_RG[0, g]),
            excess=Estimate.of_sum(count_RG[:, g] - seed_RG[:, g]),
            called=int(called_G[g]),
            false_calls=float(false_G[g]),
        )
        for g in range(len(groups.names))
    ]

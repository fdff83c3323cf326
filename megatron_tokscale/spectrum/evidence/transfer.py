"""Test of transfer: do learning times of one run predict when another run learns the same tokens?

Run A is fitted; run B is measured. The learning events of A (midpoint, drop and width of each
transition) give a mean curve for every group of tokens. It is compared with the curve that B
measured for the group. The skill (`skill.py`) says how well A predicts when the groups fall, beyond
the mean curve of all tokens. It stands beside the skill of four rivals:

- permuted: the null model. A's learning times are permuted over the events of about the same drop,
which destroys only the claim that a time belongs to its token. A's drops still differ between
groups, and the error of a time still depends on the drop.
- full: the class models of all tokens, those of gradual and rising tokens too.
- source: A's measured curves of the groups, without any fit.
- own: B's own learning events: the most that learning times can explain.

The runs are aligned in two ways: "absolute", at the same time; and "by loss", at the same mean
loss. Alignment by loss tests the order of learning alone, and also suits runs of another size (Xia
et al. 2023, docs/references.md 6).

Shapes: N tokens, E events, K probes of B, G groups, C cells, R resamples, X compared values, P
permutations, S bins of drop, U resampling units.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy.sparse import csr_array
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.skill import GroupSkill, GroupTest, GroupTests
from megatron_tokscale.results.verdict import LEVEL, Claim, ClaimTest, Verdict, holm
from megatron_tokscale.spectrum.density import default_grid
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.events import Events, events_of
from megatron_tokscale.spectrum.evidence.skill import DocumentGroups, GroupSums, skill
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.interpolation import interpolated
from megatron_tokscale.spectrum.kernels import add_sigmoids
from megatron_tokscale.spectrum.sums import at_probes, loss_sums, model_sums, table_of

DESCRIBED = frozenset({"frequency decile"})
"""Groupings without a test: worlds without steps, in which rare tokens are learned later, have the
same skill and gain."""
PERMUTATIONS = 199
"""Permutations of the learning times. The tokens' own order counts as one more, so p is at least
1/200."""
_LEAST_SLOPES = 4  # least losses of B inside A's range for a slope (`SlopeEstimator`)
_PERMUTED_TOKENS = 30_000  # most tokens whose events are permuted: bounds the cost (our choice)
_DROP_EDGES = np.geomspace(0.25, 16, 13)
"""Drops in nats, half an octave apart, between which times are permuted (our choice)."""


@dataclass(frozen=True)
class Alignment:
    """The places of B's probes on A's axis, and the values that are compared.

    Attributes:
        x_K: x of A at each probe of B.
        operator_KX: matrix from losses at B's probes to the compared values: -dL/dx on a grid of
            B's x.
    """

    x_K: Floats
    operator_KX: Floats

    @classmethod
    def absolute(cls, x_K: Floats, loss_K: Floats, place_K: Floats | None = None) -> Self:
        """Align the runs at the same time, and compare slopes, as measured on B's mean losses.

        Args:
            x_K: x of B's probes.
            loss_K: mean loss of B at its probes, in nats.
            place_K: x of A at the same times; None if the runs have the same x.
        """
        place_K = x_K if place_K is None else place_K
        return cls(place_K, SlopeEstimator.from_curve(x_K, loss_K).weights(default_grid(x_K)).T)

    @classmethod
    def by_loss(
        cls,
        source_x_K: Floats,
        source_loss_K: Floats,
        x_K: Floats,
        loss_K: Floats,
    ) -> Self:
        """Align each probe of B with the x at which A's mean loss first was that low.

        Only the probes of B inside the range of A's mean losses count.

        Args:
            source_x_K: x of A's probes.
            source_loss_K: mean losses of A, in nats.
            x_K: x of B's probes.
            loss_K: mean losses of B, in nats.

        Raises:
            UndefinedError: fewer than four probes of B are inside that range.
        """
        finite = np.isfinite(source_x_K)
        before_K = np.minimum.accumulate(source_loss_K[finite])[:-1]
        lowest = np.append(True, source_loss_K[finite][1:] < before_K)
        fallen_K = source_loss_K[finite][lowest]
        inside = np.isfinite(x_K) & (loss_K <= fallen_K[0]) & (loss_K >= fallen_K[-1])
        at_K = np.interp(-loss_K, -fallen_K, source_x_K[finite][lowest])
        if inside.sum() < _LEAST_SLOPES:
            raise UndefinedError(
                f"only {inside.sum()} of {len(x_K)} losses are in the range of the other run's "
                f"mean loss; expected at least {_LEAST_SLOPES}"
            )
        inside_x_K = np.where(inside, x_K, -np.inf)
        slopes = SlopeEstimator.from_curve(inside_x_K, loss_K)
        return cls(at_K, slopes.weights(default_grid(inside_x_K)).T)


class TransferSums:
    """Sums over tokens for the skills of one alignment, added up block by block.

    Attributes:
        alignment: the alignment.
    """

    def __init__(self, alignment: Alignment, groupings: Mapping[str, Groups], units: Units):
        self.alignment = alignment
        self._sums = {name: GroupSums(groups, units) for name, groups in groupings.items()}
        self._sums[units.kind.removesuffix("s")] = DocumentGroups(units)
        # Sums of the events' sigmoids of height one, and numbers of events, by bin of drop.
        self._shape_SK = np.zeros((len(_DROP_EDGES) + 1, len(alignment.x_K)))
        self._events_S = np.zeros(len(_DROP_EDGES) + 1)
        self._samples: list[_PermutationSample] = []
        share = min(_PERMUTED_TOKENS / max(len(units.unit_N), 1), 1.0)
        self._sampled_N = np.random.default_rng(0).random(len(units.unit_N)) < share

    def add(
        self,
        at: slice,
        fits: SigmoidFits,
        loss_NK: Floats32,
        source_NK: Floats32 | None = None,
        own: SigmoidFits | None = None,
        own_x_K: Floats | None = None,
    ) -> None:
        """Add the tokens in the slice.

        Args:
            at: the tokens of the block.
            fits: fits of run A.
            loss_NK: B's losses at B's probes.
            source_NK: A's losses at A's probes, for the rival "source".
            own: fits of run B, for the rival "own".
            own_x_K: B's probes, with `own`.
        """
        # Take the tokens with a fit in A and all losses in B, and A's events by bin of drop.
        whole_N = fits.complete_N & np.isfinite(loss_NK).all(axis=1)
        x_K = at_probes(self.alignment.x_K)
        fits, loss_NK = fits.rows(whole_N), loss_NK[whole_N]
        events = events_of(fits)
        drop_bin_E = np.searchsorted(_DROP_EDGES, events.drop_E)
        alike = replace(events, drop_E=np.ones(len(events.drop_E)))
        self._shape_SK += _event_sums(alike, drop_bin_E, len(self._shape_SK), x_K)
        self._events_S += np.bincount(drop_bin_E, minlength=len(self._events_S))
        # Add up by cell of every grouping: measured curves, predicted curves, and the drops that
        # give the permuted curves.
        if source_NK is not None:
            source_at_NK = interpolated(source_NK[whole_N], fits.x_K, x_K)
        own_events = None if own is None else events_of(own.rows(whole_N))
        for sums in self._sums.values():
            cell_N, n_cells = sums.cells(at)[whole_N], sums.n_cells
            sums.add("tokens", np.bincount(cell_N, minlength=n_cells)[:, None].astype(np.float64))
            cell_E = cell_N[events.token_E]
            shape = (n_cells, len(self._events_S))
            sums.add("drop", table_of(shape, cell_E, drop_bin_E, events.drop_E))
            sums.add("measured", loss_sums(loss_NK, cell_N, n_cells))
            sums.add("events", _event_sums(events, cell_E, n_cells, x_K))
            sums.add("full", model_sums(fits, cell_N, n_cells, self.alignment.x_K))
            if source_NK is not None:
                sums.add("source", loss_sums(source_at_NK, cell_N, n_cells))
            if own_events is not None and own_x_K is not None:
                own_cell_E = cell_N[own_events.token_E]
                sums.add("own", _event_sums(own_events, own_cell_E, n_cells, at_probes(own_x_K)))
        self._keep(np.flatnonzero(whole_N) + at.start, events, loss_NK)

    def _keep(self, token_N: Integers, events: Events, loss_NK: Floats32) -> None:
        """Keep the sampled tokens' events and losses for the permutations."""
        kept_N = self._sampled_N[token_N]
        events = events.rows(kept_N[events.token_E])
        x_K = at_probes(self.alignment.x_K)
        s_EK = expit((events.midpoint_E[:, None] - x_K) / events.width_E[:, None])
        self._samples.append(
            _PermutationSample(
                token_N[kept_N],
                (np.cumsum(kept_N) - 1)[events.token_E],
                events.drop_E,
                s_EK.astype(np.float32),
                loss_NK[kept_N],
            )
        )

    def tests(self, weight_RU: Floats, seed: int) -> dict[str, GroupTest]:
        """Return the skills by grouping, with intervals, p-values and verdicts.

        The claim is a gain over permuted times above zero. It holds only if the events' skill
        itself is above zero, too, and if at most 5% of the permutations of a sample's events have
        as much skill. `DESCRIBED` groupings have no test.
        """
        return {
            name: GroupTest(**vars(each), test=None if name in DESCRIBED else _test(name, each))
            for name, each in self.skills(weight_RU, seed).items()
        }

    def skills(self, weight_RU: Floats, seed: int) -> dict[str, GroupSkill]:
        """Return the skills by grouping, with intervals and p-values but no verdict."""
        sample = _PermutationSample.joined(self._samples)
        operator_KX = _shortest(self.alignment.operator_KX)
        return {
            name: self._skill(sums, weight_RU, operator_KX, sample.p_value(sums, operator_KX, seed))
            for name, sums in self._sums.items()
        }

    def _skill(
        self, sums: GroupSums, weight_RU: Floats, operator_KX: Floats, p_value: float
    ) -> GroupSkill:
        """Return the skills for one grouping.

        Under the null model, an event's sigmoid is replaced by the mean sigmoid of its bin of drop:
        the mean over all permutations within the bin.
        """
        mean_shape_SK = self._shape_SK / np.maximum(self._events_S, 1)[:, None]
        sums.put("permuted", sums.cell_sum("drop") @ mean_shape_SK)

        def skill_R(name: str) -> Floats:
            return sums.skill(name, "measured", weight_RU, operator_KX)

        def estimate(name: str) -> Estimate:
            return Estimate.from_resamples(skill_R(name), most=1)

        events_R, permuted_R = skill_R("events"), skill_R("permuted")
        return GroupSkill(
            groups=len(sums.names),
            events=Estimate.from_resamples(events_R, most=1),
            permuted=Estimate.from_resamples(permuted_R, most=1),
            full=estimate("full"),
            source=estimate("source") if sums.has("source") else None,
            own=estimate("own") if sums.has("own") else None,
            gain_over_permuted=Estimate.from_resamples(events_R - permuted_R),
            p_value=p_value,
        )


def _test(name: str, grouping: GroupSkill) -> ClaimTest:
    """Return the test of one grouping: the gain, and the two conditions on the skill itself."""
    claim = Claim(f"the times say which {name} falls when, better than permuted times", least=0.0)
    gain = ClaimTest.of(claim, grouping.gain_over_permuted)
    if gain.verdict is not Verdict.HOLDS:
        return gain
    skill_test = ClaimTest.of(Claim("skill", least=0.0), grouping.events)
    largest = max(gain.p_value, grouping.p_value, skill_test.p_value)
    holds = skill_test.verdict is Verdict.HOLDS and largest <= LEVEL
    verdict = Verdict.HOLDS if holds else Verdict.UNDECIDED
    return replace(gain, verdict=verdict, p_value=largest if holds else 1.0)


def corrected(families: Sequence[GroupTests]) -> list[GroupTests]:
    """Return tests of several alignments with Holm's correction over all of them."""
    rows = [
        (n, name, each.test)
        for n, tests in enumerate(families)
        if not isinstance(tests, Undefined)
        for name, each in tests.items()
        if each.test is not None
    ]
    after = dict(zip([row[:2] for row in rows], holm([row[2] for row in rows]), strict=True))
    return [
        tests
        if isinstance(tests, Undefined)
        else {name: replace(each, test=after.get((n, name))) for name, each in tests.items()}
        for n, tests in enumerate(families)
    ]


@dataclass(frozen=True)
class _PermutationSample:
    """Sampled tokens whose events are permuted.

    Attributes:
        token_N: number of each token.
        row_E: row of each event's token.
        drop_E: drop of each event.
        s_EK: sigmoid of each event at B's probes.
        loss_NK: losses of each token in B.
    """

    token_N: Integers
    row_E: Integers
    drop_E: Floats
    s_EK: Floats32
    loss_NK: Floats32

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the samples of all blocks as one."""
        first = np.cumsum([0, *(len(part.token_N) for part in parts)])
        return cls(
            np.concatenate([part.token_N for part in parts]),
            np.concatenate([part.row_E + n for part, n in zip(parts, first, strict=False)]),
            np.concatenate([part.drop_E for part in parts]),
            np.concatenate([part.s_EK for part in parts]),
            np.concatenate([part.loss_NK for part in parts]),
        )

    def p_value(self, sums: GroupSums, operator_KX: Floats, seed: int) -> float:
        """Return the share of permutations whose skill is at least that of the events' own order.

        It is NaN if there are no events or fewer than two groups.
        """
        group_N, n_groups = sums.group_N[self.token_N], len(sums.names)
        tokens_G = np.bincount(group_N, minlength=n_groups)
        if not len(self.drop_E) or (tokens_G > 0).sum() < 2:
            return math.nan
        share_1G = (tokens_G / tokens_G.sum())[None]
        count_G = np.maximum(tokens_G, 1)[:, None]

        def deviation(sum_GX: Floats) -> Floats:
            return np.asarray(sum_GX / count_G - sum_GX.sum(axis=0) / tokens_G.sum())[None]

        measured = deviation(loss_sums(self.loss_NK, group_N, n_groups) @ operator_KX)
        s_EX = self.s_EK @ operator_KX.astype(np.float32)
        shape = (n_groups, len(self.drop_E))
        drop_GE = csr_array(
            (self.drop_E.astype(np.float32), (group_N[self.row_E], np.arange(shape[1]))), shape
        )
        orders = [np.arange(shape[1]), *self._permutations(seed)]
        skill_P = np.array(
            [skill(measured, deviation(drop_GE @ s_EX[order]), share_1G)[0] for order in orders]
        )
        return float((skill_P >= skill_P[0]).mean()) if np.isfinite(skill_P[0]) else math.nan

    def _permutations(self, seed: int) -> Iterator[Integers]:
        """Yield permutations of the events within bins of drop."""
        rng = np.random.default_rng(seed)
        drop_bin_E = np.searchsorted(_DROP_EDGES, self.drop_E)
        by_bin_E = np.argsort(drop_bin_E, kind="stable")
        for _ in range(PERMUTATIONS):
            order_E = np.empty_like(by_bin_E)
            order_E[by_bin_E] = np.lexsort((rng.random(len(drop_bin_E)), drop_bin_E))
            yield order_E


def _shortest(operator_KX: Floats) -> Floats:
    """Return an operator with at most K columns, under which all skills are the same.

    Skills depend on sums of squares and products of the compared values alone.
    """
    if operator_KX.shape[1] <= len(operator_KX):
        return operator_KX
    return np.asarray(np.linalg.qr(operator_KX.T, mode="r").T)


def _event_sums(events: Events, cell_E: Integers, n_cells: int, x_K: Floats) -> Floats:
    """Return sums by cell of drop * s((midpoint - x)/width) over events."""
    total_CK = np.zeros((n_cells, len(x_K)))
    columns = (events.drop_E, events.midpoint_E, events.width_E, x_K)
    add_sigmoids(total_CK, cell_E, *(column.astype(np.float32) for column in columns))
    return total_CK

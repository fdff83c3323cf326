"""The hazard of falls by group, and the falls that it foretells: a forecast token by token.

At an origin every watched token is one of these:

- *fallen*: its event lies in the scored range. What its sigmoid has still to do after the origin is
  its *remainder*.
- *waiting*: it has no event in the scored range, and its loss is ln 2 or more. It is censored: it
  falls later, or never. An event before the scored range belongs to the unigram phase, in which
  all tokens fall together, so it is no event here.
- known or done: neither falls any more.

A waiting token is expected to lose the share of its loss that the fallen tokens of its group have
lost. The hazard lambda of a group is the rate in x, over the last two octaves, at which drops that
were still to come came (each event counts by its drop: the weighted form of events over time at
risk, the maximum-likelihood rate of an exponential with censoring). It is extrapolated flat: a flat
hazard in ln t is a power law t^-lambda of what is left. A drop that comes at c takes the time of a
sigmoid of a typical width: by x it has added A (s((c - origin)/w) - s((c - x)/w)).

Hazards and shares of small groups are shrunk to those of all tokens. All of this is our choice; the
back-tests of a run, and benchmarks/results/forecast.md, say how well it does.

Shapes: N tokens, E events, U units, G groups, C classes (groups of another grouping), H horizons, R
resamples (the first is the data as they are), W widths, P points of the integral.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers32
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results.forecast import FACTORS
from megatron_tokscale.spectrum.events import Events, events_of
from megatron_tokscale.spectrum.evidence.falls import OCTAVE
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import table_of
from megatron_tokscale.store.token_state import KNOWN_BELOW

_RECENT: Final = 2 * OCTAVE
"""Range of x before the origin over which the hazard is counted (our choice): one octave of a few
thousand tokens has few events in a group, and over four the hazard changes."""
_SHRUNK: Final = 20.0
"""Events of a group at which its hazard is half its own, half that of all tokens (our choice)."""
_LAST_PROBES: Final = 4  # probes whose mean is a token's loss at the origin (our choice)
_WIDTHS: Final = np.array([0.1, 0.3, 0.5, 0.7, 0.9])  # quantiles of the widths that stand for all
_NARROWEST: Final = 0.02  # width in x; a narrower one is a step on any probe schedule
_POINTS: Final = 300  # of the integral over later events; twice as many change it by 0.1%
_BEYOND: Final = 3.0  # range of x behind the last horizon in which a fall may begin early


@dataclass(frozen=True)
class Rates:
    """Hazards and expected falls of the waiting tokens, of each resample.

    Attributes:
        hazard_RG: hazard of each group per unit of x.
        share_RG: share of its loss that a waiting token of each group is expected to lose.
        pooled_R: hazard of all tokens per unit of x.
        fallen_RGH: share of the expected drop that has come by each horizon.
    """

    hazard_RG: Floats
    share_RG: Floats
    pooled_R: Floats
    fallen_RGH: Floats


@dataclass(frozen=True)
class Census:
    """Fallen and waiting tokens at an origin, and what their groups have done until then.

    Attributes:
        origin: x of the origin.
        span: range of x before the origin over which the hazard is counted.
        groups: groups with a hazard of their own.
        remainder_NH: what a token's sigmoid has still to do by each horizon, in nats.
        waiting_N: loss of each waiting token at the origin in nats; 0 for every other token.
        events: events in the scored range, by token.
        before_E: loss of their tokens before they fell, in nats.
        width_W: widths that stand for all.
    """

    origin: float
    span: float
    groups: Groups
    remainder_NH: Floats
    waiting_N: Floats
    events: Events
    before_E: Floats
    width_W: Floats

    @classmethod
    def of(
        cls, fits: SigmoidFits, loss_NK: Floats | Floats32, groups: Groups, from_x: float
    ) -> Self:
        """Take the census at the last probe of the fits.

        Args:
            fits: fits of the losses up to the origin.
            loss_NK: these losses.
            groups: groups with a hazard of their own.
            from_x: start of the scored range.

        Raises:
            UndefinedError: the origin lies less than an octave behind the start, or no token has
                fallen in between.
        """
        origin = float(fits.x_K[-1])
        span = min(_RECENT, origin - from_x)
        if span < OCTAVE * (1 - 1e-6):
            raise UndefinedError(
                "less than a factor of two in time lies between the start of the scored range and "
                "the origin, too little for a hazard; train on"
            )
        learned = events_of(fits, from_x=from_x, to_x=origin).learned
        late = learned.rows(learned.midpoint_E >= from_x)
        if not len(late.token_E):
            raise UndefinedError("no token has fallen in the scored range, so there is no hazard")
        now_N = loss_NK[:, -_LAST_PROBES:].mean(axis=1, dtype=np.float64)
        until_EK = (fits.x_K[-_LAST_PROBES:] - late.midpoint_E[:, None]) / late.width_E[:, None]
        done_E = late.drop_E * expit(until_EK).mean(axis=1)
        waits_N = now_N >= KNOWN_BELOW
        waits_N[late.token_E] = False
        return cls(
            origin=origin,
            span=span,
            groups=groups,
            remainder_NH=_remainders(learned, origin, len(fits)),
            waiting_N=np.where(waits_N, now_N, 0.0),
            events=late,
            before_E=np.maximum(now_N[late.token_E], 0.0) + done_E,
            width_W=np.maximum(np.quantile(late.width_E, _WIDTHS), _NARROWEST),
        )

    def rates(self, unit_N: Integers | Integers32, weight_RU: Floats) -> Rates:
        """Return the rates under each row of weights of the units."""
        n_groups, n_units = len(self.groups.names), weight_RU.shape[1]
        group_N, events = self.groups.group_N, self.events
        unit_E, group_E = unit_N[events.token_E], group_N[events.token_E]
        start = self.origin - self.span
        recent_E = events.midpoint_E >= start
        at_risk_E = np.maximum(events.midpoint_E - start, 0.0) * recent_E

        def sums(value_E: Floats) -> Floats:
            return weight_RU @ table_of((n_units, n_groups), unit_E, group_E, value_E)

        waiting_RG = weight_RU @ table_of((n_units, n_groups), unit_N, group_N, self.waiting_N)
        count_RG = sums(np.ones(len(unit_E)))
        share_RG = _shrunk_ratio(sums(events.drop_E), sums(self.before_E), count_RG)
        came_RG = sums(events.drop_E * recent_E)
        at_risk_RG = sums(events.drop_E * at_risk_E) + waiting_RG * share_RG * self.span
        hazard_RG = _shrunk_ratio(came_RG, at_risk_RG, sums(recent_E.astype(np.float64)))
        pooled_R = _ratio(came_RG.sum(axis=1), at_risk_RG.sum(axis=1))
        return Rates(hazard_RG, share_RG, pooled_R, self._fallen(hazard_RG))

    def falls(
        self,
        classes: Groups,
        unit_N: Integers | Integers32,
        weight_RU: Floats,
        rates: Rates,
    ) -> Floats:
        """Return the falls of the classes by each horizon, in nats per token of the set, (R, C, H).

        Args:
            classes: groups of the tokens, not those that have the hazards.
            unit_N: resampling unit of each token.
            weight_RU: weights of the units.
            rates: the rates under these weights.
        """
        n_units, n_groups, n_classes = (
            weight_RU.shape[1],
            len(self.groups.names),
            len(classes.names),
        )
        tokens_R = weight_RU @ np.bincount(unit_N, minlength=n_units)
        shape = (n_units, n_classes)
        remainder_RCH = np.stack(
            [
                weight_RU @ table_of(shape, unit_N, classes.group_N, remainder_N)
                for remainder_N in self.remainder_NH.T
            ],
            axis=-1,
        )
        cell_N = classes.group_N * n_groups + self.groups.group_N
        waiting_UJ = table_of((n_units, n_classes * n_groups), unit_N, cell_N, self.waiting_N)
        waiting_RCG = (weight_RU @ waiting_UJ).reshape(-1, n_classes, n_groups)
        expected_RCG = waiting_RCG * rates.share_RG[:, None]
        later_RCH = expected_RCG @ rates.fallen_RGH
        return np.asarray((remainder_RCH + later_RCH) / tokens_R[:, None, None])

    @cached_property
    def learned(self) -> float:
        """Share of the tokens that have fallen in the scored range."""
        return len(self.events.token_E) / len(self.waiting_N)

    @cached_property
    def censored(self) -> float:
        """Share of the tokens that wait."""
        return float((self.waiting_N > 0).mean())

    def _fallen(self, hazard_RG: Floats) -> Floats:
        """Return the share of a waiting drop that has come by each horizon, (R, G, H)."""
        last = math.log(max(FACTORS)) + _BEYOND
        edge_P = np.linspace(0, last, _POINTS + 1)
        u_P1 = ((edge_P[1:] + edge_P[:-1]) / 2)[:, None]
        kernel_PH = np.stack(
            [
                (expit(u_P1 / self.width_W) - expit((u_P1 - math.log(factor)) / self.width_W)).mean(
                    axis=1
                )
                for factor in FACTORS
            ],
            axis=1,
        )
        surviving = np.exp(-np.maximum(hazard_RG, 0)[..., None] * edge_P)
        return np.asarray(-np.diff(surviving, axis=-1) @ kernel_PH)


def _remainders(learned: Events, origin: float, n_tokens: int) -> Floats:
    """Return what the sigmoids of learned tokens have still to do by each horizon, (N, H)."""
    begun_E = expit((learned.midpoint_E - origin) / learned.width_E)
    remainder_NH = np.zeros((n_tokens, len(FACTORS)))
    for h, factor in enumerate(FACTORS):
        left_E = expit((learned.midpoint_E - origin - math.log(factor)) / learned.width_E)
        remainder_NH[learned.token_E, h] = learned.drop_E * (begun_E - left_E)
    return remainder_NH


def _shrunk_ratio(top_RG: Floats, bottom_RG: Floats, count_RG: Floats) -> Floats:
    """Return top over bottom of each group, shrunk to that of all groups by `_SHRUNK` events."""
    overall_R1 = _ratio(top_RG.sum(axis=1), bottom_RG.sum(axis=1))[:, None]
    own_RG = _ratio(top_RG, bottom_RG)
    return np.asarray((own_RG * count_RG + overall_R1 * _SHRUNK) / (count_RG + _SHRUNK))


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """Return top / bottom; 0 where the bottom is 0."""
    return np.asarray(top / np.where(bottom > 0, bottom, np.inf))

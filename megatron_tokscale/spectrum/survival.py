"""Tokens learned and not yet learned: Kaplan and Meier's estimate, and outcomes by group.

A token that has not fallen by the end of the scored range is censored there: it is learned later,
or never. Among the drops it counts with the mean drop of the learned tokens of its group, since it
is expected to fall as they did (our choice).

Shapes: N tokens, C bins of x, G groups, U units, R resamples (the first is the data as they are),
O outcomes.
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.spectrum.events import Events, Outcome, outcomes
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import table_of

_OUTCOMES = len(Outcome) - 1  # all but UNFITTED


def product_limit(event_RC: Floats, censored_RC: Floats) -> Floats:
    """Return the share that survives each bin, (R, C) (Kaplan and Meier 1958).

    Args:
        event_RC: number of events in each bin, or their weight; bins ascend.
        censored_RC: number or weight of what is censored in the bin, after its events.
    """
    leaving_RC = event_RC + censored_RC
    risk_RC = np.cumsum(leaving_RC[:, ::-1], axis=1)[:, ::-1]
    hazard_RC = event_RC / np.where(risk_RC > 0, risk_RC, 1)
    return np.asarray(np.cumprod(1 - np.minimum(hazard_RC, 1), axis=1))


def median_time(x_C: Floats, surviving_RC: Floats) -> Floats:
    """Return x by which one half survives, (R,), between bins; NaN where more survives all bins."""
    median_R = np.full(len(surviving_RC), np.nan)
    for r in np.flatnonzero(surviving_RC[:, -1] <= 0.5):
        median_R[r] = np.interp(-0.5, -surviving_RC[r], x_C)
    return median_R


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the tokens under each row of weights.

    Attributes:
        tokens_RO: tokens by outcome, in the order of `Outcome` from KNOWN on.
        learned_R: drops of the learned tokens in nats per token.
        expected_R: expected drops of the censored tokens in nats per token.
    """

    tokens_RO: Floats
    learned_R: Floats
    expected_R: Floats

    def count(self, outcome: Outcome) -> int:
        """Return the number of tokens with an outcome, in the data as they are."""
        return round(float(self.tokens_RO[0, outcome]))

    def share(self, outcome: Outcome) -> Floats:
        """Return the share of the tokens with an outcome, (R,)."""
        total_R = self.tokens_RO.sum(axis=1)
        return np.asarray(self.tokens_RO[:, outcome] / np.where(total_R > 0, total_R, np.nan))


class OutcomeSums:
    """Outcomes and drops by resampling unit, and by group of tokens.

    Args:
        groups: groups whose censored tokens are expected to drop as their learned tokens did.
        units: resampling units.
    """

    def __init__(self, groups: Groups, units: Units):
        self._groups, self._units = groups, units
        shape_UG = (len(units), len(groups.names))
        self._tokens_UO = np.zeros((len(units), _OUTCOMES))
        self._learned_UG, self._drop_UG, self._censored_UG = (np.zeros(shape_UG) for _ in range(3))

    def add(self, at: slice, fits: SigmoidFits, events: Events) -> None:
        """Add the tokens in the slice; `events` are those of the fits."""
        outcome_N = outcomes(fits, events)
        unit_N, group_N = self._units.unit_N[at], self._groups.group_N[at]
        fitted_N = outcome_N != Outcome.UNFITTED
        shape_UO = (len(self._units), _OUTCOMES)
        self._tokens_UO += table_of(shape_UO, unit_N[fitted_N], outcome_N[fitted_N])
        learned = events.learned
        unit_E, group_E = unit_N[learned.token_E], group_N[learned.token_E]
        censored_N = outcome_N == Outcome.CENSORED
        shape_UG = (len(self._units), len(self._groups.names))
        self._learned_UG += table_of(shape_UG, unit_E, group_E)
        self._drop_UG += table_of(shape_UG, unit_E, group_E, learned.drop_E)
        self._censored_UG += table_of(shape_UG, unit_N[censored_N], group_N[censored_N])

    def resampled(self, weight_RU: Floats) -> Outcomes:
        """Return the outcomes under each row of weights.

        A group without a learned token has the mean drop of all learned tokens.
        """
        tokens_RO = weight_RU @ self._tokens_UO
        learned_RG, drop_RG, censored_RG = (
            weight_RU @ table for table in (self._learned_UG, self._drop_UG, self._censored_UG)
        )
        mean_R = _ratio(drop_RG.sum(axis=1), learned_RG.sum(axis=1))
        mean_RG = np.where(learned_RG > 0, _ratio(drop_RG, learned_RG), mean_R[:, None])
        total_R = tokens_RO.sum(axis=1)
        total_R[total_R == 0] = np.nan  # no token is drawn
        expected_R = (censored_RG * mean_RG).sum(axis=1)
        return Outcomes(tokens_RO, drop_RG.sum(axis=1) / total_R, expected_R / total_R)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """Return top / bottom; 0 where the bottom is 0."""
    return np.asarray(top / np.where(bottom > 0, bottom, np.inf))

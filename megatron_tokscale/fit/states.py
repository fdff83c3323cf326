"""The state of every token at a time, by its fitted curve (our choice).

A token's curve has one transition or, of a two-step token, two. Its *net fall* at x is what the
transitions took off its loss until then. The *fitted drop* is the largest net fall that the curve
comes to: after the one transition, after both, or between a fall and a rise.

- learned: the net fall is at least 80% of the fitted drop. Under way: from 20 to 80%. To come:
  less, and the curve falls later.
- forgotten: the loss stands above an earlier value of the curve by at least 20% of the curve's
  whole range. A token whose loss only rises was known before.
- A flat token was known before the first probe or has never moved, by its class.

A gradual token has the one sigmoid that is its event (`spectrum.events`). So the fall of 50% is at
the midpoint, and a token with one sigmoid is under way for 2.77 widths.

Shapes: N tokens, S transitions of a token (2), P values after 0, 1 and 2 of them (3).
"""

from typing import Final

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Integers8
from megatron_tokscale.fit.table import SigmoidFits, TokenClass
from megatron_tokscale.store.token_state import BEGUN, TokenState

DONE: Final = 0.8
"""Share of the fitted drop from which on a token is learned."""

_MOVING: Final = (
    TokenClass.FALLING,
    TokenClass.RISING,
    TokenClass.TWO_STEP,
    TokenClass.GRADUAL,
)


def states_at(fits: SigmoidFits, x: float | None = None) -> Integers8:
    """Return the `TokenState` of every token at `x`, by default at the last probe.

    A token that is not fitted, or misses a loss, is unknown.
    """
    x = float(fits.x_K[-1]) if x is None else x
    fall_N, risen_N = net_fall(fits, x)
    end_NP = _partial_sums(_transitions(fits, "drop"))
    drop_N, range_N = end_NP.max(axis=1), np.ptp(end_NP, axis=1)
    moving_N = fits.is_class(*_MOVING)
    state_N = np.full(len(fits), TokenState.TO_COME, dtype=np.int8)
    # The later of two masks wins.
    for state, mask_N in (
        (TokenState.UNDER_WAY, fall_N >= BEGUN * drop_N),
        (TokenState.LEARNED, fall_N >= DONE * drop_N),
        (TokenState.KNOWN, drop_N <= 0),
        (TokenState.FORGOTTEN, risen_N >= BEGUN * range_N),
        (TokenState.KNOWN, ~moving_N | (range_N == 0)),
        (TokenState.UNMOVED, fits.is_class(TokenClass.FLAT_UNLEARNED)),
        (TokenState.UNKNOWN, ~fits.complete_N),
    ):
        state_N[mask_N] = state
    return state_N


def net_fall(fits: SigmoidFits, x: float) -> tuple[Floats, Floats]:
    """Return the net fall of every token's curve at `x`, and its rise since its largest net fall.

    Both are in nats, and 0 for a flat token.
    """
    drop_NS, midpoint_NS, width_NS = (
        _transitions(fits, name) for name in ("drop", "midpoint", "width")
    )
    fall_NP = _partial_sums(drop_NS * expit((x - midpoint_NS) / width_NS))
    return fall_NP[:, -1], fall_NP.max(axis=1) - fall_NP[:, -1]


def _transitions(fits: SigmoidFits, name: str) -> Floats:
    """Return one parameter of each token's transitions, (N, S); a drop of 0 where it has none."""
    single_N = getattr(fits, f"{name}_N").astype(np.float64)
    none_N = np.full(len(fits), 0.0 if name == "drop" else 1.0)
    steps = (getattr(fits, f"step{s}_{name}_N").astype(np.float64) for s in (1, 2))
    two_N1 = fits.is_class(TokenClass.TWO_STEP)[:, None]
    one_N1 = fits.is_class(TokenClass.FALLING, TokenClass.RISING, TokenClass.GRADUAL)[:, None]
    single_NS = np.stack([single_N, none_N], axis=1)
    none_NS = np.stack([none_N, none_N], axis=1)
    return np.where(two_N1, np.stack(list(steps), axis=1), np.where(one_N1, single_NS, none_NS))


def _partial_sums(fall_NS: Floats) -> Floats:
    """Return the net fall after none, the first and both of the transitions, (N, P)."""
    return np.pad(fall_NS.cumsum(axis=1), ((0, 0), (1, 0)))

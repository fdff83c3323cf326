"""Learning events: the one definition of the time at which a token is learned (our choice).

- A token whose loss falls has one event, also if it falls gradually: the midpoint, drop and width
  of its one sigmoid. A two-step token has its main step: the larger fall of those at or after the
  start of the scored range, else the larger fall. (In planted worlds with a unigram phase, learning
  times by this rule have a rank correlation of 0.65 to 0.68 with the true ones, by the larger step
  anywhere of 0.54 to 0.57, and by the one sigmoid of 0.52 to 0.54; without such a phase all three
  agree to 0.005.)
- The event is censored if its midpoint lies beyond the end: the token has not fallen half-way. A
  flat token that is not known is censored too, and has no event.
- A flat token that is known was learned before the first probe: neither learned nor censored.
- A token whose loss rises is forgotten, and counts apart.

Shapes: N tokens, E events, S sigmoids of a token: the one, the earlier and the later of two.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.fit import SigmoidFits, TokenClass

_MOVING = (TokenClass.FALLING, TokenClass.RISING, TokenClass.TWO_STEP, TokenClass.GRADUAL)


class Outcome(IntEnum):
    """Outcome of a token by the end of the scored range."""

    UNFITTED = -1
    KNOWN = 0
    LEARNED = 1
    CENSORED = 2
    FORGOTTEN = 3


@dataclass(frozen=True)
class Events:
    """The learning events of some tokens, one per token whose loss falls.

    Attributes:
        token_E: index of the token.
        drop_E: fall in nats, above 0.
        midpoint_E: learning time in units of x, up to one probe spacing outside of the range.
        width_E: width w in units of x.
        censored_E: true if the midpoint lies beyond the end.
    """

    token_E: Integers
    drop_E: Floats
    midpoint_E: Floats
    width_E: Floats
    censored_E: Mask

    def rows(self, index_E: Integers | Mask) -> Self:
        """Return the events selected by an index array or a mask."""
        return type(self)(*(getattr(self, field.name)[index_E] for field in fields(self)))

    @property
    def learned(self) -> Self:
        """The events that are not censored."""
        return self.rows(~self.censored_E)


def events_of(fits: SigmoidFits, *, from_x: float = -np.inf, to_x: float = np.inf) -> Events:
    """Return the events of the fitted tokens that miss no loss.

    Args:
        fits: fits of the tokens.
        from_x: start of the scored range.
        to_x: its end; later midpoints, and those behind the last probe, are censored.
    """
    drop_SN, midpoint_SN, width_SN = (
        _sigmoids(fits, name) for name in ("drop", "midpoint", "width")
    )
    main_N = _main_sigmoid(fits, drop_SN, midpoint_SN, from_x)
    token_N = np.arange(len(fits))
    falls_N = fits.complete_N & fits.is_class(*_MOVING) & (drop_SN[main_N, token_N] > 0)
    token_E, main_E = token_N[falls_N], main_N[falls_N]
    midpoint_E = midpoint_SN[main_E, token_E]
    return Events(
        token_E=token_E,
        drop_E=drop_SN[main_E, token_E],
        midpoint_E=midpoint_E,
        width_E=width_SN[main_E, token_E],
        censored_E=midpoint_E > min(to_x, float(fits.x_K[-1])),
    )


def outcomes(fits: SigmoidFits, events: Events) -> Integers:
    """Return the `Outcome` of every token; `events` are those of the fits."""
    outcome_N = np.full(len(fits), Outcome.UNFITTED, dtype=np.int64)
    for outcome, classes in (
        (Outcome.KNOWN, (TokenClass.FLAT_KNOWN,)),
        (Outcome.CENSORED, (TokenClass.FLAT_UNLEARNED,)),
        (Outcome.FORGOTTEN, _MOVING),
    ):
        outcome_N[fits.complete_N & fits.is_class(*classes)] = outcome
    outcome_N[events.token_E] = np.where(events.censored_E, Outcome.CENSORED, Outcome.LEARNED)
    return outcome_N


def learning_times(fits: SigmoidFits, *, from_x: float = -np.inf, to_x: float = np.inf) -> Floats:
    """Return each learned token's learning time in x; NaN for every other token.

    Args:
        fits: fits of the tokens.
        from_x: start of the scored range.
        to_x: its end.
    """
    learned = events_of(fits, from_x=from_x, to_x=to_x).learned
    time_N = np.full(len(fits), np.nan)
    time_N[learned.token_E] = learned.midpoint_E
    return time_N


def _sigmoids(fits: SigmoidFits, name: str) -> Floats:
    """Return one parameter of the one sigmoid, the earlier and the later step, (S, N)."""
    columns = (getattr(fits, f"{prefix}{name}_N") for prefix in ("", "step1_", "step2_"))
    return np.stack([column.astype(np.float64) for column in columns])


def _main_sigmoid(
    fits: SigmoidFits, drop_SN: Floats, midpoint_SN: Floats, from_x: float
) -> Integers:
    """Return the index in S of the sigmoid that is each token's event."""
    fall_2N = np.nan_to_num(np.maximum(drop_SN[1:], 0.0))
    late_2N = np.where(midpoint_SN[1:] >= from_x, fall_2N, 0.0)
    fall_2N = np.where(late_2N.any(axis=0), late_2N, fall_2N)
    main_N = 1 + (fall_2N[1] > fall_2N[0]).astype(np.int64)
    return np.where(fits.is_class(TokenClass.TWO_STEP), main_N, 0)

"""A row per token and run: state, late loss and its variance, learning time and drop.

Shapes: N tokens, K probe steps, H shifts of the clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final, Self

import numpy as np

from megatron_tokscale.compare.common_end import CutRun
from megatron_tokscale.compare.late_loss import (
    WINDOW,
    late_variance,
    used_probes,
    window_weights,
)
from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers8, Mask
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.fit.states import states_at
from megatron_tokscale.spectrum.events import events_of
from megatron_tokscale.store.token_state import TokenState

SHIFTS: Final = (-0.8, -0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.8)
"""Shifts of the clock in x at which a token's curve is kept (our choice): to an octave and more,
closer where most differences between seeds are."""


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one run, as a comparison needs them: a row per token.

    Attributes:
        complete_N: true if the token is fitted and misses no loss up to the common end.
        state_N: its `TokenState` at the common end.
        class_N: its `TokenClass`.
        late_N: its late loss in nats.
        variance_N: variance of the late loss by the token's own noise, in nats^2.
        time_N: its learning time in x of the clock, also behind the common end; NaN without one.
        drop_N: its drop in nats; 0 without a learning time.
        moved_NH: its fitted loss if the run were sooner by each of `SHIFTS`, less that without a
            shift, at the middle of the window of the late loss, in nats.
    """

    complete_N: Mask
    state_N: Integers8
    class_N: Integers8
    late_N: Floats32
    variance_N: Floats32
    time_N: Floats32
    drop_N: Floats32
    moved_NH: Floats32

    @classmethod
    def of_block(
        cls,
        fits: SigmoidFits,
        loss_NK: Floats32,
        weight_K: Floats,
        *,
        end_x: float,
        from_x: float = -np.inf,
    ) -> Self:
        """Return the rows of a block of tokens; learning times are in x of the fits.

        Args:
            fits: fits of the tokens.
            loss_NK: their losses at all probes, those of the fits first.
            weight_K: weights of the late loss.
            end_x: x of the common end, in the time of the fits.
            from_x: start of the compared range, in the time of the fits.
        """
        used = used_probes(weight_K)
        late_N = loss_NK[:, :used] @ weight_K[:used].astype(np.float32)
        events = events_of(fits, from_x=from_x)
        curve_NH = fits.predict(end_x - WINDOW / 2 + np.array([0.0, *SHIFTS]))
        time_N = np.full(len(fits), np.nan, np.float32)
        drop_N = np.zeros(len(fits), np.float32)
        time_N[events.token_E] = events.midpoint_E
        drop_N[events.token_E] = events.drop_E
        return cls(
            complete_N=fits.complete_N & np.isfinite(late_N),
            state_N=states_at(fits, end_x),
            class_N=fits.class_N,
            late_N=late_N,
            variance_N=late_variance(fits, loss_NK, weight_K).astype(np.float32),
            time_N=time_N,
            drop_N=drop_N,
            moved_NH=(curve_NH[:, 1:] - curve_NH[:, :1]).astype(np.float32),
        )

    @classmethod
    def concatenate(cls, parts: Iterable["TokenTable"]) -> Self:
        """Return the rows of all parts, in order."""
        parts = list(parts)
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def rows(self, index_N: Integers) -> Self:
        """Return the tokens in `index_N`."""
        return type(self)(*(getattr(self, field.name)[index_N] for field in fields(self)))

    @property
    def learned_N(self) -> Mask:
        """Mask of the tokens learned by the common end, or known before the first probe."""
        return np.isin(self.state_N, (TokenState.LEARNED, TokenState.KNOWN))

    @property
    def moving_N(self) -> Mask:
        """Mask of the tokens whose loss falls: they have a learning time."""
        return np.isfinite(self.time_N)


def read_table(run: CutRun, from_x: float) -> TokenTable:
    """Return the table of a run, from one pass over its fits and losses.

    Args:
        run: the run.
        from_x: start of the compared range, in x of the clock.
    """
    weight_K = window_weights(run.x_K, run.end)
    parts = []
    for _, fits, loss_NK in run.blocks():
        finite_K = np.isfinite(fits.x_K)
        to_fit = (run.x_K[: len(fits.x_K)][finite_K], fits.x_K[finite_K])
        ends = [float(np.interp(x, *to_fit)) for x in (from_x, run.end)]
        part = TokenTable.of_block(fits, loss_NK, weight_K, from_x=ends[0], end_x=ends[1])
        part.time_N[:] = run.on_clock(fits, part.time_N.astype(np.float64))
        parts.append(part)
    return TokenTable.concatenate(parts)

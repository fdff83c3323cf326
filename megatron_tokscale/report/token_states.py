"""Shares of a run's tokens by their state: now, and over time by the fits of the whole run.

Shapes: N tokens, U units of resampling, R resamples (the first is the data as they are), S states,
D datasets, G grid points.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers8
from megatron_tokscale.fit import SigmoidFits, TokenState, states_at
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.store import WatchedTokens
from megatron_tokscale.store.token_state import STATE_ORDER

_POINTS: Final = 60  # times in the picture: smooth at its size
_RESAMPLES: Final = 200  # as many as those of the spectrum

type Shares = dict[TokenState, Estimate]
"""Share of the fitted tokens in each state, with its interval."""


@dataclass(frozen=True)
class StateShares:
    """Shares of the fitted tokens by state.

    Attributes:
        state_N: state of each token at the last probe.
        overall: shares in all tokens at the last probe.
        by_dataset: shares in each dataset; None for a dataset without a fitted token.
        x_G: grid of x, from the first probe after step 0 to the last one.
        share_DSG: shares over x in each dataset, states in `STATE_ORDER`; NaN without a token.
    """

    state_N: Integers8
    overall: Shares
    by_dataset: tuple[Shares | None, ...]
    x_G: Floats
    share_DSG: Floats

    @classmethod
    def of(cls, fits: SigmoidFits, tokens: WatchedTokens, seed: int) -> Self:
        """Count the tokens of a run by state; the intervals are over its documents."""
        state_N = states_at(fits)
        units = tokens.units(seed)
        n_datasets = len(tokens.datasets)
        weight_RU = units.weights(_RESAMPLES, seed)
        count_US = _counts(state_N, units.unit_N, len(units))
        finite_K = fits.x_K[np.isfinite(fits.x_K)]
        x_G = np.linspace(finite_K[0], finite_K[-1], _POINTS)
        count_GDS = np.stack(
            [_counts(states_at(fits, x), tokens.dataset_N, n_datasets) for x in x_G.tolist()]
        )
        with np.errstate(invalid="ignore"):
            share_GDS = count_GDS / count_GDS.sum(axis=2, keepdims=True)
        return cls(
            state_N,
            _shares(weight_RU @ count_US),
            tuple(
                _shares(units.of_dataset(weight_RU, dataset) @ count_US)
                if count_US[units.dataset_U == dataset].any()
                else None
                for dataset in range(n_datasets)
            ),
            x_G,
            share_GDS.transpose(1, 2, 0),
        )


def _counts(state_N: Integers8, group_N: np.ndarray, n_groups: int) -> Floats:
    """Return the number of tokens of each group (rows) in each of `STATE_ORDER`."""
    n_codes = len(TokenState)
    code_N = group_N.astype(np.int64) * n_codes + (state_N - min(TokenState))
    table = np.bincount(code_N, minlength=n_groups * n_codes).reshape(n_groups, n_codes)
    return table[:, np.array(STATE_ORDER) - min(TokenState)].astype(np.float64)


def _shares(count_RS: Floats) -> Shares:
    with np.errstate(invalid="ignore"):
        share_RS = count_RS / count_RS.sum(axis=1, keepdims=True)
    return {
        state: Estimate.from_resamples(share_RS[:, s], least=0.0, most=1.0)
        for s, state in enumerate(STATE_ORDER)
    }

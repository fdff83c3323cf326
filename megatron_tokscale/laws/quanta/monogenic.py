"""Tokens that are learned in one step: from one plateau of the loss to another (papers.md 4.3).

Michaud et al. call tokens *monogenic* if one quantum decides their loss.
Shapes: N tokens, K probes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import TokscaleError, UndefinedError

HEIGHT = 0.7  # nats; this and the numbers below are those of the authors' search
LOWEST_UPPER = 2.7
HIGHEST_UPPER = 11.0
MIN_FALL = 2.0
_BLOCK = 65_536


def monogenic_mask(loss_NK: ArrayLike, *, max_before: int | None = None) -> Mask:
    """Whether each token's first j losses lie in one band, and all the rest in a band well below.

    The upper band is [u, u + 0.7] nats with u from 2.7 to 11, the lower [l, l + 0.7] with l from 0
    to u - 2. The authors' search steps u and l by 0.2; here they are any numbers, which needs no
    search. Their code holds the first j losses against both bands, which nothing can pass; this is
    the rule that they meant. Their losses are of models 2 to 3 times apart in size: the closer the
    probes, the harsher the rule; thin them to compare.

    Args:
        loss_NK: losses in nats, N x K, also memory-mapped: read by blocks of tokens. Start it when
            the run is past what all tokens share (the unigram frequencies).
        max_before: the largest j; by default all but one of the probes. The authors have 5.

    Returns:
        mask_N; False for a token that misses losses (NaN).

    Raises:
        UndefinedError: fewer than two probes.
    """
    loss = np.asanyarray(loss_NK)
    if loss.ndim != 2 or loss.shape[1] < 2:
        raise UndefinedError(
            f"losses of shape {loss.shape} show no steps; give tokens x probes, 2 probes or more"
        )
    blocks = [
        _block_mask(np.asarray(loss[start : start + _BLOCK], np.float64), max_before)
        for start in range(0, len(loss), _BLOCK)
    ]
    return np.concatenate([*blocks, np.empty(0, np.bool_)])


def _block_mask(loss_NK: Floats, max_before: int | None) -> Mask:
    """Column j - 1 of the bands' ends is for j losses before the fall."""
    before_NK, after_NK = loss_NK[:, :-1], loss_NK[:, :0:-1]
    lowest_before = np.minimum.accumulate(before_NK, axis=1)
    highest_before = np.maximum.accumulate(before_NK, axis=1)
    lowest_after = np.minimum.accumulate(after_NK, axis=1)[:, ::-1]
    highest_after = np.maximum.accumulate(after_NK, axis=1)[:, ::-1]
    upper = np.minimum(lowest_before, HIGHEST_UPPER)
    lower = np.maximum(highest_after - HEIGHT, 0.0)
    fits_NK = (
        (np.maximum(highest_before - HEIGHT, LOWEST_UPPER) <= upper)
        & (lower <= lowest_after)
        & (lower <= upper - MIN_FALL)
    )
    return np.asarray(fits_NK[:, :max_before].any(axis=1))


@dataclass(frozen=True)
class MonogenicShare:
    """How many tokens fall from plateau to plateau in one step.

    Attributes:
        share: of the run's tokens.
        null_share: of the same tokens if each followed the mean curve.
        n_tokens: number of tokens.
    """

    share: float
    null_share: float
    n_tokens: int

    @staticmethod
    def from_blocks(
        blocks: Iterable[tuple[ArrayLike, ArrayLike]], *, max_before: int | None = None
    ) -> "MonogenicShare":
        """The shares over blocks of tokens, each its loss_NK and its losses under the null.

        Args:
            blocks: loss_NK and, of the same shape, what the losses would be without steps of their
                own, as of `scaled_mean_curve`.
            max_before: as of `monogenic_mask`.

        Raises:
            TokscaleError: the arguments do not fit together.
            UndefinedError: no tokens, fewer than two probes, or a null of another shape.
        """
        n_tokens, n_monogenic, n_null = 0, 0, 0
        for loss_NK, null_NK in blocks:
            if np.shape(loss_NK) != np.shape(null_NK):
                raise TokscaleError(
                    f"losses of shape {np.shape(loss_NK)} and a null of shape {np.shape(null_NK)} "
                    "do not go together; give one null curve per token"
                )
            n_tokens += len(np.asanyarray(loss_NK))
            n_monogenic += int(monogenic_mask(loss_NK, max_before=max_before).sum())
            n_null += int(monogenic_mask(null_NK, max_before=max_before).sum())
        if not n_tokens:
            raise UndefinedError("no tokens, so none fall in one step; give blocks of losses")
        return MonogenicShare(n_monogenic / n_tokens, n_null / n_tokens, n_tokens)


def scaled_mean_curve(mean_K: ArrayLike, loss_NK: ArrayLike) -> Floats:
    """The null: a run's mean losses, scaled to each token's first and last losses.

    It has no noise, which can only bring it nearer to plateaus.

    Raises:
        UndefinedError: the mean losses begin and end alike.
    """
    mean, loss = np.asarray(mean_K, np.float64), np.asarray(loss_NK, np.float64)
    if mean[0] == mean[-1]:
        raise UndefinedError(f"mean losses from {mean[0]:g} to {mean[-1]:g} nats have no fall")
    progress_K = (mean - mean[0]) / (mean[-1] - mean[0])
    return np.asarray(loss[:, :1] + (loss[:, -1:] - loss[:, :1]) * progress_K)

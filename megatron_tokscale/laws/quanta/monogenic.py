"""Tokens learned in one step, from one plateau of the loss to another (docs/references.md 4.3).

Michaud et al. call tokens *monogenic* if one quantum decides their loss.
Shapes: N tokens, M tokens of a sample, K probes.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Floats32, Mask
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.results.laws import MonogenicShare
from megatron_tokscale.store import Run

HEIGHT = 0.7  # nats, height of a band; this and the next three are the authors' (4.3)
LOWEST_UPPER = 2.7  # nats, least lower end of the upper band
HIGHEST_UPPER = 11.0  # nats, greatest lower end of the upper band
MIN_FALL = 2.0  # nats, least distance of the bands' lower ends
_BLOCK = 65_536  # tokens at a time, which bounds the memory of the running extremes
_SAMPLE = 20_000  # tokens of a run; our choice: a share then has a standard error below 0.4%
_LEAST_TIME = 1e-300  # stands for a time of zero, whose logarithm is infinite


def monogenic_mask(loss_NK: ArrayLike, *, max_before: int | None = None) -> Mask:
    """Mark the tokens whose first j losses lie in one band and all later ones in a lower band.

    The upper band is [u, u + 0.7] nats, with u from 2.7 to 11; the lower one is [l, l + 0.7], with
    l from 0 to u - 2. The authors' code searches u and l in steps of 0.2. Here u and l are any
    numbers, which needs no search. That code compares the first j losses with both bands, which no
    token can pass; this function follows the authors' text.

    The authors' losses come from models whose sizes are 2 to 3 times apart. Fewer tokens pass with
    probes that are closer, so thin the probes before you compare.

    Args:
        loss_NK: losses in nats, N x K; a memory map is read by blocks of tokens. Begin where the
            run has learned what all tokens share (the unigram frequencies).
        max_before: the largest j; by default all but one of the probes. The authors use 5.

    Returns:
        mask_N; False for a token that misses losses (NaN).

    Raises:
        UndefinedError: there are fewer than two probes.
    """
    loss = np.asanyarray(loss_NK)
    if loss.ndim != 2 or loss.shape[1] < 2:
        raise UndefinedError(
            f"losses are of shape {loss.shape}; expected tokens x probes, 2 probes or more"
        )
    blocks = [
        _block_mask(np.asarray(loss[start : start + _BLOCK], np.float64), max_before)
        for start in range(0, len(loss), _BLOCK)
    ]
    return np.concatenate([*blocks, np.empty(0, np.bool_)])


def _block_mask(loss_NK: Floats, max_before: int | None) -> Mask:
    """Mark the monogenic tokens of a block.

    Column j - 1 of the arrays below stands for a fall between the first j losses and the others.
    """
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


def monogenic_share(
    blocks: Iterable[tuple[ArrayLike, ArrayLike]], *, max_before: int | None = None
) -> MonogenicShare:
    """Return the share of monogenic tokens over blocks, and the share under the null model.

    Args:
        blocks: pairs of loss_NK and the null model's losses, of the same shape, as from
            `scaled_mean_curve`.
        max_before: see `monogenic_mask`.

    Raises:
        TokscaleError: losses and null losses are of different shapes.
        UndefinedError: there are no tokens, or there are fewer than two probes.
    """
    n_tokens, n_monogenic, n_null = 0, 0, 0
    for loss_NK, null_NK in blocks:
        if np.shape(loss_NK) != np.shape(null_NK):
            raise TokscaleError(
                f"losses are of shape {np.shape(loss_NK)} and null losses of shape "
                f"{np.shape(null_NK)}; expected one null curve per token"
            )
        n_tokens += len(np.asanyarray(loss_NK))
        n_monogenic += int(monogenic_mask(loss_NK, max_before=max_before).sum())
        n_null += int(monogenic_mask(null_NK, max_before=max_before).sum())
    if not n_tokens:
        raise UndefinedError("there are no tokens, so no share of them; give blocks of losses")
    return MonogenicShare(n_monogenic / n_tokens, n_null / n_tokens, n_tokens)


def measure_monogenic(run: Run, inputs: Inputs, seed: int) -> MonogenicShare:
    """Return the share of monogenic tokens in a sample of a run's tokens, drawn by `seed`.

    Only one probe per octave of time is used: over more probes, noise moves more losses out of the
    bands.

    Raises:
        UndefinedError: as in `monogenic_share` and `scaled_mean_curve`.
    """
    octave_K = np.floor(np.log2(np.maximum(inputs.t_K, _LEAST_TIME)))
    thinned = np.flatnonzero(np.diff(octave_K, append=np.inf) > 0)
    rows = np.sort(np.random.default_rng(seed).permutation(run.n_tokens)[:_SAMPLE])

    def blocks() -> Iterator[tuple[Floats32, Floats]]:
        for at_N, loss_NK in run.finite_blocks():
            chosen_N = np.isin(at_N, rows)
            loss_MK = loss_NK[chosen_N][:, thinned]
            if len(loss_MK):
                yield loss_MK, scaled_mean_curve(inputs.mean_loss_RK[0, thinned], loss_MK)

    return monogenic_share(blocks())


def scaled_mean_curve(mean_K: ArrayLike, loss_NK: ArrayLike) -> Floats:
    """Return the null model's losses: the mean curve, scaled to each token's first and last loss.

    They have no noise. Noise would move losses out of the bands, so the share of monogenic tokens
    under the null model is rather too high than too low.

    Raises:
        UndefinedError: the first and the last mean loss are the same.
    """
    mean, loss = np.asarray(mean_K, np.float64), np.asarray(loss_NK, np.float64)
    if mean[0] == mean[-1]:
        raise UndefinedError(
            f"mean losses do not fall: they begin and end at {mean[0]:g} nats; take other probes"
        )
    progress_K = (mean - mean[0]) / (mean[-1] - mean[0])
    return np.asarray(loss[:, :1] + (loss[:, -1:] - loss[:, :1]) * progress_K)

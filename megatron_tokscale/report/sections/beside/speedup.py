"""Two runs on the same probe set: their mean losses, and the time saved to the same loss.

Shapes: N tokens, K probe steps, F groups of tokens (all of them, then each dataset).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Mask
from megatron_tokscale.store import Run

_VALUES_PER_READ: Final = 2**24  # losses in memory at a time: 64 MiB


@dataclass(frozen=True)
class Curves:
    """Mean losses of one run.

    Attributes:
        step_K: probe steps.
        tokens_K: consumed training tokens; NaN if unknown.
        loss_FK: mean loss in nats: of all tokens, then of each dataset.
    """

    step_K: Integers
    tokens_K: Floats
    loss_FK: Floats


def mean_curves(runs: tuple[Run, Run]) -> tuple[tuple[Curves, Curves], int]:
    """Return both curves over the tokens that are finite in both runs, and the number of others."""
    finite_N = np.ones(runs[0].n_tokens, dtype=bool)
    for run in runs:
        for rows, loss_NK in _blocks(run):
            finite_N[rows] &= np.isfinite(loss_NK).all(axis=1)
    first, second = (_curves(run, finite_N) for run in runs)
    return (first, second), int((~finite_N).sum())


def _blocks(run: Run) -> Iterator[tuple[slice, Floats32]]:
    size = max(_VALUES_PER_READ // max(len(run.records), 1), 1)
    for start in range(0, run.n_tokens, size):
        rows = slice(start, min(start + size, run.n_tokens))
        yield rows, run.read_losses(rows.start, rows.stop)


def _curves(run: Run, used_N: Mask) -> Curves:
    """Return the mean losses of the tokens in `used_N`."""
    dataset_N, n_datasets = run.tokens.dataset_N, len(run.tokens.datasets)
    sum_DK, count_D = np.zeros((n_datasets, len(run.records))), np.zeros(n_datasets)
    for rows, loss_NK in _blocks(run):
        for d in range(n_datasets):
            of_dataset = used_N[rows] & (dataset_N[rows] == d)
            sum_DK[d] += loss_NK[of_dataset].sum(axis=0, dtype=np.float64)
            count_D[d] += of_dataset.sum()
    overall_K = sum_DK.sum(axis=0) / max(count_D.sum(), 1)
    return Curves(
        run.step_K,
        _tokens_K(run),
        np.vstack([overall_K, sum_DK / np.maximum(count_D, 1)[:, None]]),
    )


def _tokens_K(run: Run) -> Floats:
    """Return the consumed tokens at each probe, NaN where unknown."""
    tokens = [record.consumed_tokens for record in run.records]
    return np.array([np.nan if n is None else n for n in tokens], dtype=np.float64)


def time_to_reach(time_K: Integers | Floats, loss_K: Floats, target: float) -> float | None:
    """Return the first time at which the loss is at most `target`; None if it never is.

    Times between two probes are interpolated in ln time. Between time 0 and the next probe this is
    impossible: the next probe counts.
    """
    reached = np.flatnonzero(loss_K <= target)
    if not len(reached):
        return None
    k = int(reached[0])
    if k == 0 or time_K[k - 1] == 0:
        return float(time_K[k])
    share = (loss_K[k - 1] - target) / (loss_K[k - 1] - loss_K[k])
    before, after = np.log(time_K[k - 1 : k + 1].astype(np.float64))
    return float(np.exp(before + share * (after - before)))


def faster(baseline: float, reached: float | None) -> float | None:
    """Return the share of the baseline's time that a run with its loss at `reached` saves."""
    return None if reached is None else 1 - reached / baseline

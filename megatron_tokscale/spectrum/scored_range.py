"""The scored range: the part of a run in which spectra and their tests count (our choice).

Before it lies the unigram phase, in which all tokens fall together as the model learns how frequent
each token is: sigmoids of single tokens say nothing there. A predictor that ignores the context has
at least the entropy of the labels as its mean loss, over all datasets together, since it cannot
tell one dataset from another. So the phase is over at the first probe whose mean loss is at most
this entropy. Behind the range lies the decay of the learning rate, which lowers the losses of all
tokens together as well.

Shapes: N tokens, K probe steps, V ids of labels.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Integers32
from megatron_tokscale.results.scored_range import RangeEnd, RangeStart, ScoredRange
from megatron_tokscale.spectrum.density import finite_range
from megatron_tokscale.store import Run

LEAST_PROBES: Final = 8
"""Least number of probes in a scored range: twice the least of a slope (our choice)."""
DECAYED: Final = 0.5  # share of the peak rate below which probes lie in the decay (our choice)


def scored_range_of(run: Run, x_K: Floats, mean_loss_K: Floats) -> ScoredRange:
    """Return the scored range of a run.

    Args:
        run: the run.
        x_K: natural logarithm of time at its probes, in any time.
        mean_loss_K: its mean loss in nats over all watched tokens that miss no loss.
    """
    label_N = run.tokens.label_N
    entropy = None if label_N is None else label_entropy(label_N)
    return scored_range(x_K, mean_loss_K, entropy, probe_rates(run))


def scored_range(
    x_K: Floats, mean_loss_K: Floats, entropy: float | None, rate_K: Floats
) -> ScoredRange:
    """Return the scored range of a mean loss curve.

    Args:
        x_K: natural logarithm of time at the probes; -inf at step 0.
        mean_loss_K: mean loss in nats.
        entropy: entropy of the labels in nats; None if the labels are not known.
        rate_K: learning rate at each probe; NaN where it is not known.
    """
    first, last = finite_range(x_K)
    to_x, end = _end(x_K, rate_K)
    if np.sum((x_K >= first) & (x_K <= to_x)) < LEAST_PROBES and to_x < last:
        to_x, end = last, RangeEnd.FEW_PROBES
    if entropy is None:
        return ScoredRange(first, to_x, RangeStart.NO_LABELS, end)
    timed_K = np.isfinite(x_K)
    below_K = timed_K & (mean_loss_K <= entropy)
    if not below_K.any():
        return ScoredRange(first, to_x, RangeStart.NEVER_BELOW, end, entropy)
    from_x = float(x_K[below_K.argmax()])
    if np.sum((x_K >= from_x) & (x_K <= to_x)) < LEAST_PROBES:
        return ScoredRange(first, to_x, RangeStart.FEW_PROBES, end, entropy)
    return ScoredRange(from_x, to_x, RangeStart.UNIGRAM_PHASE, end, entropy)


def certain_part(scored: ScoredRange, x_K: Floats, width: float) -> ScoredRange:
    """Return the part of a scored range in which events are certain.

    An event less than two widths before the last probe has not reached its floor: its drop and its
    midpoint are fitted together, and are uncertain. If less than half of the range would remain, or
    less than half of its probes, or too few, the range is returned as it is. R² of a slope that
    hardly varies over a short range is ill-conditioned; and checkpoints that are evenly spaced in
    steps have most of their probes at the end, without which the noise is not known (our choice).

    Args:
        scored: the scored range.
        x_K: the probes.
        width: common width of the events; NaN without events.
    """
    to_x = certain_end(x_K, width)
    if not to_x < scored.to_x:
        return scored
    is_short = to_x - scored.from_x < (scored.to_x - scored.from_x) / 2
    remaining, counted = (
        np.sum((x_K >= scored.from_x) & (x_K <= end)) for end in (to_x, scored.to_x)
    )
    if is_short or remaining < max(LEAST_PROBES, counted / 2):
        return scored
    return replace(scored, to_x=to_x, end_reason=RangeEnd.UNCERTAIN)


def certain_end(x_K: Floats, width: float) -> float:
    """Return x two widths before the last probe; the last probe if the width is NaN."""
    return float(x_K[-1] - 2 * np.nan_to_num(width))


def label_entropy(label_N: Integers | Integers32) -> float:
    """Return the entropy of the labels' ids in nats.

    It is the entropy of the observed shares with the correction of Miller (1955) for their small
    counts, (ids seen - 1) / (2 N). On a long-tailed vocabulary it is still too low; the scored
    range then starts later than it could.
    """
    count_V = np.unique(label_N, return_counts=True)[1]
    share_V = count_V / count_V.sum()
    entropy = -(share_V * np.log(share_V)).sum() + (len(count_V) - 1) / (2 * count_V.sum())
    return float(entropy)


def probe_rates(run: Run) -> Floats:
    """Return the learning rate at each probe, (K,); NaN where neither record nor launch has it."""
    return np.array([_rate(run, k) for k in range(len(run.records))], dtype=np.float64)


def _rate(run: Run, k: int) -> float:
    """Return the rate at probe k: that of its record, else that of its launch's schedule."""
    record = run.records[k]
    if np.isfinite(record.learning_rate) or not run.launches:
        return record.learning_rate
    launch = run.launch_of(record.step + 1)
    if launch.scheduler_samples is None:
        return record.learning_rate
    taken = record.consumed_samples - launch.consumed_samples
    return launch.learning_rate.at(launch.scheduler_samples + taken)


def _end(x_K: Floats, rate_K: Floats) -> tuple[float, RangeEnd]:
    """Return the last probe before the rate falls below half its peak, after the warm-up."""
    last = float(x_K[-1])
    known_K = np.isfinite(rate_K)
    if not known_K.any() or not np.nanmax(rate_K) > 0:
        return last, RangeEnd.NO_RATES
    peak = int(np.nanargmax(rate_K))
    decayed_K = known_K & (rate_K < DECAYED * rate_K[peak])
    decayed_K[: peak + 1] = False
    if not decayed_K.any():
        return last, RangeEnd.LAST_PROBE
    return float(x_K[decayed_K.argmax() - 1]), RangeEnd.DECAY

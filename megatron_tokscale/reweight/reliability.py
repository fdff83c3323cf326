"""The reliability of documents' mean differences, and scores that are shrunk by it.

A document d has a true mean difference theta_d. Its n_d watched tokens measure it as
y_d = theta_d + e_d, where e_d has variance s2 / n_d. The halves a_d and b_d of its tokens measure
it independently, so over documents

    Cov(a, b) = Var(theta) = t2                                         (signal variance)
    E[(a_d - b_d - mean)^2] = s2 (1 / n_d1 + 1 / n_d2)                  (noise variance s2)
    reliability of y = 2 r / (1 + r), where r is the correlation of a and b    (Spearman and Brown)

and the best linear estimate of theta_d, given the documents of its cell, is

    m + (y_d - m) t2 / (t2 + s2 / n_d)                                         (Kelley; Morris)

with m the mean of y over the cell, weighted by 1 / (t2 + s2 / n_d). A cell holds the documents of a
dataset of about one length and one predicted score, so t2 is what length and prediction do not tell
already. Sources: docs/references.md 9.1.

Shapes: W watched documents of a dataset, 2 halves.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Integers32, Mask
from megatron_tokscale.data.scores import Reliability
from megatron_tokscale.reweight.halves import Halves

_MOST_GROUPS: Final = 10  # deciles of length, and of the prediction
_CELL_DOCUMENTS: Final = 200
"""Documents of a cell on average, at least; our choice: fewer groups than deciles then. A cell of
50 takes noise for signal: in a simulation, scores without any signal kept 5% of the variance of
their noise, and strata by them promise a gain that is not there."""

_FEWEST: Final = 10
"""Documents of a cell that has variances of its own, at least; our choice: equal lengths or
predictions can leave a cell with any number."""


_SURE: Final = 2.0
"""Standard errors, 1 / sqrt(documents), by which the correlation of halves is above zero before it
corrects the correlation of predictions; our choice: 95%."""


@dataclass(frozen=True)
class Variances:
    """The two variances of documents' mean differences.

    Attributes:
        signal: variance of the true means, t2, in squared nats per token; it is an unbiased
            estimate and may be negative.
        noise: variance of a single token's difference, s2, in squared nats.
    """

    signal: float
    noise: float


def variances(halves: Halves) -> Variances | None:
    """Return the variances over documents that have a token in each half; None for fewer than two.

    Documents are weighted by their tokens in the signal variance.
    """
    if halves.has_both_W.sum() < 2:
        return None
    halves = halves.rows(halves.has_both_W)
    weight_W, half_W2 = halves.tokens_W, halves.sum_W2 / halves.count_W2
    # Unbiased with weights: their sum less the sum of their squares over their sum.
    effective = weight_W.sum() - (weight_W**2).sum() / weight_W.sum()
    signal = _sum_of_products(half_W2, weight_W)[0, 1] / effective
    # a - b has variance s2 / h, with h below; the halves may differ in their means.
    h_W = halves.count_W2.prod(axis=1) / weight_W
    gap_W = half_W2[:, 0] - half_W2[:, 1]
    noise = (h_W * (gap_W - np.average(gap_W, weights=h_W)) ** 2).sum() / (len(gap_W) - 1)
    return Variances(float(signal), float(noise))


def reliability(halves: Halves, predicted_W: Floats | None) -> Reliability:
    """Return the reliability of a dataset's mean differences, and of their predictions.

    The squared correlation of predictions with y is divided by the reliability of y: Spearman's
    correction for attenuation. It is None where the halves may agree by chance. Documents are
    weighted by their tokens.

    Args:
        halves: the watched documents, each with a token at least.
        predicted_W: predictions from folds that the document was not in; None without any.
    """
    found = variances(halves)
    watched = predicted = None
    if found is not None:
        both = halves.rows(halves.has_both_W)
        r = _correlation(both.sum_W2 / both.count_W2, both.tokens_W)
        watched = None if r is None else 2 * r / (1 + r) if r > 0 else 0.0
        is_sure = r is not None and r > _SURE / np.sqrt(len(both.document_W))
        if watched and is_sure and predicted_W is not None:
            pair_W2 = np.stack([predicted_W, halves.mean_W], axis=1)
            of_y = _correlation(pair_W2, halves.tokens_W) or 0.0
            predicted = min(max(of_y, 0.0) ** 2 / watched, 1.0)
    weight_W = halves.tokens_W
    return Reliability(
        watched=watched,
        predicted=predicted,
        mean=float(np.average(halves.mean_W, weights=weight_W)) if len(weight_W) else 0.0,
        signal_variance=max(found.signal, 0.0) if found else 0.0,
        documents=len(weight_W),
    )


def cells(length_W: Integers | Integers32, predicted_W: Floats | None) -> Integers:
    """Return the cell of each document: group of length, and of the prediction where there is one.

    Groups are of about equal size; documents of equal value are in one group. There are at most ten
    of each kind, fewer where cells would hold less than 200 documents on average.
    """
    kinds = [length_W.astype(np.float64)] + ([] if predicted_W is None else [predicted_W])
    most = (len(length_W) / _CELL_DOCUMENTS) ** (1 / len(kinds))
    n_groups = int(np.clip(most, 1, _MOST_GROUPS))
    cell_W = np.zeros(len(length_W), np.int64)
    for value_W in kinds:
        if len(value_W):
            edges = np.quantile(value_W, np.arange(1, n_groups) / n_groups)
            cell_W = cell_W * n_groups + np.searchsorted(edges, value_W, side="left")
    return cell_W


def shrunk(halves: Halves, cell_W: Integers) -> Floats:
    """Return each document's mean difference, shrunk towards the mean of its cell.

    The formula is in the module's docstring. A cell with fewer than ten documents takes mean and
    variances of the whole dataset; if fewer than two documents of the dataset have a token in each
    half, the means stay as they are. A negative signal variance counts as zero: all documents of
    the cell get its mean.
    """
    every = np.ones(len(cell_W), np.bool_)
    pooled = _shrunk_in(halves, every)
    if pooled is None:
        return halves.mean_W
    for cell in np.unique(cell_W):
        within = cell_W == cell
        found = _shrunk_in(halves, within) if within.sum() >= _FEWEST else None
        if found is not None:
            pooled[within] = found
    return pooled


def _shrunk_in(halves: Halves, within_W: Mask) -> Floats | None:
    """Return the shrunk means of the documents in a mask; None without their variances."""
    halves = halves.rows(within_W)
    found = variances(halves)
    if found is None:
        return None
    signal = max(found.signal, 0.0)
    total_W = signal + found.noise / halves.tokens_W
    # Without signal and noise all documents are alike.
    weight_W = np.divide(1.0, total_W, out=halves.tokens_W.copy(), where=total_W > 0)
    centre = np.average(halves.mean_W, weights=weight_W)
    share_W = np.divide(signal, total_W, out=np.ones_like(total_W), where=total_W > 0)
    return np.asarray(centre + share_W * (halves.mean_W - centre))


def _sum_of_products(value_W2: Floats, weight_W: Floats) -> Floats:
    """Return the weighted sums of squares and products of two columns, about their means."""
    centred_W2 = value_W2 - np.average(value_W2, axis=0, weights=weight_W)
    return np.asarray(centred_W2.T @ (weight_W[:, None] * centred_W2))


def _correlation(value_W2: Floats, weight_W: Floats) -> float | None:
    """Return the weighted correlation of two columns; None if one of them is constant."""
    if np.ptp(value_W2, axis=0).min() == 0:
        return None
    products = _sum_of_products(value_W2, weight_W)
    return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))

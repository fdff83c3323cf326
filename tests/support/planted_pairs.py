"""Planted pairs of runs: tokens in documents, which learn or do not learn as a claim has it.

The text has documents of unequal length in two datasets, and words of unequal frequency. A token's
learning time has parts that it shares with its document, its word, its dataset and its position;
so has its drop. Noise is autoregressive along the probes, a part of it common to a document.

Shapes: N tokens, K probes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from correlated import correlated_noise
from runs import log_time, probe_steps
from scipy import special
from scipy.special import expit

from megatron_tokscale.probe import ProbeSet

AUTOCORRELATION = 0.6
CENTRE, SPREAD, LATER = 4.5, 1.1, 1.8
EXPONENT = 0.5
_WORDS, _LENGTH = 400, 32
_FLAT, _RISING = 0.15, 0.05


@dataclass(frozen=True)
class Text:
    """Watched tokens and what is random about them but the noise.

    Attributes:
        probe_set: documents of 8 to 32 watched tokens, half of them in each dataset.
        score_N: what sets learning times apart, of mean zero and about unit variance.
        drop_N: falls in nats; zero for flat tokens, negative for rising ones.
        floor_N: losses in the end.
    """

    probe_set: ProbeSet
    score_N: np.ndarray
    drop_N: np.ndarray
    floor_N: np.ndarray

    @cached_property
    def document_N(self):
        return self.probe_set.document_N

    def __len__(self):
        return len(self.score_N)


def text_of(documents, rng):
    """A text with its documents in two datasets by turns."""
    shape = (documents, _LENGTH)
    share = 1 / (np.arange(_WORDS) + 5)
    word_BS = rng.choice(_WORDS, (documents, _LENGTH + 1), p=share / share.sum()).astype(np.int32)
    length_B = rng.integers(8, _LENGTH + 1, documents)
    mask_BS = np.arange(_LENGTH) < length_B[:, None]
    number_B = np.arange(documents, dtype=np.int32)
    probe_set = ProbeSet(
        tokens_BS=word_BS[:, :-1],
        labels_BS=word_BS[:, 1:],
        mask_BS=mask_BS,
        document_BS=np.repeat(number_B[:, None], _LENGTH, axis=1),
        position_BS=np.tile(np.arange(_LENGTH, dtype=np.int32), (documents, 1)),
        dataset_BS=np.repeat((number_B % 2).astype(np.int16)[:, None], _LENGTH, axis=1),
        datasets=("prose", "code"),
        vocab_size=_WORDS,
    )
    rarity_BS = (np.log(word_BS[:, 1:] + 5) - 4) / 1.3
    position_BS = np.linspace(1, -1, _LENGTH) * np.ones(shape)
    dataset_BS = np.where(number_B % 2, 1.0, -1.0)[:, None]
    score_BS = (
        0.35 * dataset_BS
        + 0.5 * rng.standard_normal((documents, 1))
        + 0.5 * rarity_BS
        + 0.25 * position_BS
        + 0.6 * rng.standard_normal(shape)
    )
    size_BS = (
        0.4 * dataset_BS
        + 0.5 * rng.standard_normal((documents, 1))
        + 0.4 * rarity_BS
        + 0.6 * rng.standard_normal(shape)
    )
    kind_BS = rng.random(shape)
    sign_BS = np.where(kind_BS < _FLAT, 0.0, np.where(kind_BS < _FLAT + _RISING, -0.4, 1.0))
    drop_BS = 2.5 * np.exp(0.35 * size_BS) * sign_BS
    floor_BS = rng.uniform(0.2, 3, shape) + np.maximum(-drop_BS, 0)
    return Text(probe_set, *(each[mask_BS] for each in (score_BS, drop_BS, floor_BS)))


def axis(n_probes=40):
    """x of step 0 and of the other probes, to step 20,000."""
    return log_time(probe_steps(n_probes))


def losses(text, shape_NK, rng, noise=0.25):
    """floor + drop * shape + noise in nats; the noise's size differs between tokens."""
    size_N = noise * np.exp(0.4 * rng.standard_normal(len(text)))
    own_NK = correlated_noise(rng, shape_NK.shape, AUTOCORRELATION)
    common_JK = correlated_noise(
        rng, (text.document_N.max() + 1, shape_NK.shape[1]), AUTOCORRELATION
    )
    loss_NK = text.floor_N[:, None] + text.drop_N[:, None] * shape_NK
    loss_NK += size_N[:, None] * own_NK + 0.2 * noise * common_JK[text.document_N]
    return loss_NK.astype(np.float32)


def local_shape(x_K, midpoint_N, rng, width=0.2):
    """Every token's own sigmoid, of widths that differ by about a half."""
    width_N = width * np.exp(0.4 * rng.standard_normal(len(midpoint_N)))
    return expit((midpoint_N[:, None] - x_K) / width_N[:, None])


def times(text):
    """Learning times, in units of x, of a run like any other."""
    return CENTRE + SPREAD * text.score_N


def genuine(text, x_K, rng):
    """Local transitions, at times that agree between the runs but for a quarter of their spread."""
    again_N = times(text) + 0.25 * SPREAD * rng.standard_normal(len(text))
    return tuple(losses(text, local_shape(x_K, c, rng), rng) for c in (times(text), again_N))


def permuted(text, x_K, rng):
    """Run B has run A's times, at other tokens."""
    again_N = rng.permutation(times(text))
    return tuple(losses(text, local_shape(x_K, c, rng), rng) for c in (times(text), again_N))


def later(text, x_K, rng):
    """Run B learns what run A does, in the same order, six times as late."""
    again_N = times(text) + LATER + 0.25 * SPREAD * rng.standard_normal(len(text))
    return tuple(losses(text, local_shape(x_K, c, rng), rng) for c in (times(text), again_N))


def power_law(text, x_K, rng):
    """One run with a density of learning times exp(-EXPONENT x) from x = 2 on."""
    common_J = rng.standard_normal(text.document_N.max() + 1)
    score_N = 0.6 * common_J[text.document_N] + 0.8 * rng.standard_normal(len(text))
    late_N = -np.log(special.ndtr(score_N)) / EXPONENT
    return losses(text, local_shape(x_K, 2 + late_N, rng), rng)


def seen_beginning(text, x_K, rng):
    """One run of wide transitions, most past their middle when the last factor of two begins."""
    midpoint_N = x_K[-1] - 1.5 + 0.45 * text.score_N
    return losses(text, local_shape(x_K, midpoint_N, rng, width=0.4), rng, noise=0.05)

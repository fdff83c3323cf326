"""Planted worlds in which the claim of stepwise learning is exactly true, or exactly false.

The probe axis and the noise are those of the demo's run of 640 steps (59 probes; residuals of
0.4 nats, their lag-one autocorrelation 0.5). In worlds A and B every token has one sigmoid of its
own; in C and D no token has: all follow one power law. B, C and D begin with a unigram phase, in
which every token moves to the surprisal of its label. The frequency of the label is known to the
tests as groups.

Shapes: N tokens, K probes, D datasets.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from correlated import correlated_noise
from scipy.special import expit

from megatron_tokscale.fit.common_shifts import shift_table, shifts_of, without_shifts

DATASETS = ("first", "second")
VOCABULARY = 2048
DOCUMENT_TOKENS = 200
AUTOCORRELATION = 0.5
UNIGRAM_STEP, UNIGRAM_WIDTH = 9, 0.22
_RATE_BUMP_STEP, _DECAY_STEP, _LAST_STEP = 27, 320, 640


@dataclass(frozen=True)
class Text:
    """Watched tokens: documents of 200 tokens in two datasets by turns, labels by Zipf's law.

    Attributes:
        label_N: id of each label.
        log_share_N: logarithm of the label's share in the language.
        document_N: document of each token.
        dataset_N: dataset of each token.
        entropy: entropy of the labels in the language, in nats.
    """

    label_N: np.ndarray
    log_share_N: np.ndarray
    document_N: np.ndarray
    dataset_N: np.ndarray
    entropy: float

    def __len__(self):
        return len(self.label_N)


@dataclass(frozen=True)
class World:
    """A world's noiseless losses, drawn for a text.

    Attributes:
        stepwise: true if every token has a transition of its own.
        draw: function of (text, x_K, rng) that returns loss_NK without noise, in nats.
    """

    stepwise: bool
    draw: Callable[[Text, np.ndarray, np.random.Generator], np.ndarray]


def text_of(n_tokens, rng, document_tokens=DOCUMENT_TOKENS):
    """A text of whole documents."""
    share_V = 1 / (np.arange(VOCABULARY) + 5.0)
    share_V /= share_V.sum()
    label_N = rng.choice(VOCABULARY, n_tokens, p=share_V)
    document_N = (np.arange(n_tokens) // document_tokens).astype(np.int32)
    entropy = float(-(share_V * np.log(share_V)).sum())
    dataset_N = (document_N % 2).astype(np.int16)
    return Text(label_N, np.log(share_V)[label_N], document_N, dataset_N, entropy)


def axis(last=_LAST_STEP):
    """x of step 0 and of eight probes per octave to the last step."""
    steps = np.unique(np.round(2 ** (np.arange(0, 8 * np.log2(last) + 1e-9) / 8)))
    return np.concatenate([[-np.inf], np.log(np.union1d(steps, [last]))])


def noise(text, n_probes, rng, common=0.0):
    """Noise in nats: each token's own, and `common` of each dataset's probes."""
    size_N = 0.4 * np.exp(0.4 * rng.standard_normal(len(text)))
    own_NK = size_N[:, None] * correlated_noise(rng, (len(text), n_probes), AUTOCORRELATION)
    shared_DK = common * rng.standard_normal((2, n_probes))
    return own_NK + shared_DK[text.dataset_N]


def seeds(world, text, x_K, rng, *, common=0.0, runs=2):
    """The losses of several training seeds of one world: the same curves, other noise."""
    clean_NK = world.draw(text, x_K, rng)
    return [(clean_NK + noise(text, len(x_K), rng, common)).astype(np.float32) for _ in range(runs)]


def as_fitted(x_K, loss_NK, dataset_N):
    """Return losses without the shifts that all tokens of a dataset share, as `fit` takes them.

    The shifts are returned too.
    """
    shifts = shifts_of(x_K, [(loss_NK, dataset_N)], DATASETS)
    return without_shifts(loss_NK, shift_table(shifts), dataset_N), shifts


def _finite(x_K):
    return np.where(np.isfinite(x_K), x_K, -1e6)


def _sigmoids(midpoint_N, drop_N, width_N, x_K):
    u_NK = (midpoint_N[:, None] - _finite(x_K)) / width_N[:, None]
    return drop_N[:, None] * expit(u_NK)


def _widths(n_tokens, median, rng, spread=0.6):
    return median * np.exp(spread * rng.standard_normal(n_tokens))


def _power_law_times(n_tokens, rng):
    return np.log(20) + rng.exponential(2, n_tokens)


def _equal(text, x_K, rng):
    n = len(text)
    times_N = _power_law_times(n, rng)
    return 2 + _sigmoids(times_N, np.full(n, 4.0), np.full(n, 0.3), x_K)


def _unequal(width):
    def draw(text, x_K, rng):
        n = len(text)
        drop_N = np.exp(rng.normal(np.log(4), 0.5, n))
        return 2 + _sigmoids(_power_law_times(n, rng), drop_N, _widths(n, width, rng), x_K)

    return draw


def _unigram_phase(text, x_K):
    """From the uniform distribution to the surprisal of each label; the least loss is 1 nat."""
    moved_N = np.log(VOCABULARY) + text.log_share_N
    n = len(text)
    phase_NK = _sigmoids(np.full(n, np.log(UNIGRAM_STEP)), moved_N, np.full(n, UNIGRAM_WIDTH), x_K)
    return 1 + phase_NK - phase_NK.min()


def _beyond_unigram(text, rng):
    """Drops from the surprisal of the label to a floor, at least 0.3 nats."""
    return np.maximum(-text.log_share_N - 2 - rng.exponential(0.5, len(text)), 0.3)


def _rarer_later(text):
    """Onset in x: rarer labels later."""
    return np.log(45) - 0.25 * (text.log_share_N - text.log_share_N.mean())


def _after_unigrams(width, *, transients=False):
    def draw(text, x_K, rng):
        times_N = _rarer_later(text) + rng.exponential(1 / 0.6, len(text))
        widths_N = _widths(len(text), width, rng)
        steps_NK = _sigmoids(times_N, _beyond_unigram(text, rng), widths_N, x_K)
        common_K = _transients(x_K) if transients else 0
        return _unigram_phase(text, x_K) + steps_NK + common_K

    return draw


def _transients(x_K):
    """A bump of the loss after the warm-up, and a fall while the learning rate decays."""
    x = _finite(x_K)
    bump_K = 0.15 * np.exp(-0.5 * ((x - np.log(_RATE_BUMP_STEP)) / 0.12) ** 2)
    decayed_K = np.clip((np.exp(x) - _DECAY_STEP) / _DECAY_STEP, 0, None)
    return bump_K - 0.25 * decayed_K**1.5


def _one_power_law(text, x_K, rng):
    shape_K = np.minimum(1, (np.exp(np.maximum(_finite(x_K), 0)) / 40) ** -0.33)
    return _unigram_phase(text, x_K) + _beyond_unigram(text, rng)[:, None] * shape_K


def _power_law_by_frequency(text, x_K, rng):
    after_NK = np.maximum(_finite(x_K)[None] - _rarer_later(text)[:, None], 0)
    return _unigram_phase(text, x_K) + _beyond_unigram(text, rng)[:, None] * np.exp(
        -0.33 * after_NK
    )


WORLDS = {
    "A1": World(True, _equal),
    "A2": World(True, _unequal(0.3)),
    "A3": World(True, _unequal(0.6)),
    "B1": World(True, _after_unigrams(0.3)),
    "B2": World(True, _after_unigrams(0.6)),
    "B3": World(True, _after_unigrams(0.3, transients=True)),
    "C": World(False, _one_power_law),
    "D": World(False, _power_law_by_frequency),
}
"""A1: equal drops and widths, a power-law spectrum; A2: both vary; A3: wider. B1: A2 after a
unigram phase; B2: wider; B3: with transients of the learning rate. C: one power law for all after
the unigram phase; D: from an onset that the label's frequency sets."""

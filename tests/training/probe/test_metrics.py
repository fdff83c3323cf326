"""Bits per byte against texts whose bytes are known."""

import math

import numpy as np
import pytest
from runs import plain_probe_set

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.progress import ProgressTracker
from megatron_tokscale.training.probe.metrics import Metrics

TEXTS = ["plain words, and no more", "Grüße aus Ōsaka — ½ €"]


class ByteTokenizer:
    """One id per UTF-8 byte; like many tokenizers it strips the space at the start of a text."""

    def detokenize(self, ids):
        return bytes(ids).decode("utf-8").removeprefix(" ")


def probe_set_of_texts():
    """Each text as a sequence of bytes, padded, with its first byte as context only."""
    rows = [list(text.encode()) for text in TEXTS]
    length = max(map(len, rows)) - 1
    shape = len(rows), length
    tokens, labels, mask = (
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
    )
    for row, ids in enumerate(rows):
        n = len(ids) - 1
        tokens[row, :n], labels[row, :n], mask[row, :n] = ids[:-1], ids[1:], True
    dataset = np.repeat(np.arange(2, dtype=np.int16)[:, None], length, axis=1)
    blank = np.zeros(shape, np.int32)
    return ProbeSet(tokens, labels, mask, blank, blank, dataset, ("english", "mixed"), 256)


def test_bits_per_byte_are_bits_over_the_bytes_of_the_text():
    probe_set = probe_set_of_texts()
    metrics = Metrics(probe_set, 0.1, ByteTokenizer())
    loss_N = np.random.default_rng(0).random(probe_set.n_tokens).astype(np.float32)
    named = metrics.named(metrics.measure(loss_N, None))
    bits_N = loss_N.astype(np.float64) / math.log(2)
    start = 0
    for dataset, text in zip(probe_set.datasets, TEXTS, strict=True):
        n_bytes = len(text.encode()) - 1
        expected = bits_N[start : start + n_bytes].sum() / n_bytes
        assert named[f"probe bits per byte/{dataset}"] == pytest.approx(expected, rel=1e-12)
        start += n_bytes
    assert named["probe bits per byte"] == pytest.approx(bits_N.mean(), rel=1e-12)
    assert "share of tokens fallen by 0.1 nats" not in named


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_without_text_there_are_no_bits_per_byte(tokenizer):
    probe_set = plain_probe_set(32)
    metrics = Metrics(probe_set, 0.1, tokenizer)
    loss_N = np.arange(32, dtype=np.float32)
    named = metrics.named(metrics.measure(loss_N, loss_N + 0.2))
    assert not any("byte" in name for name in named)
    assert named["share of tokens fallen by 0.1 nats"] == 1
    assert named["probe loss"] == pytest.approx(15.5)


def spoiled():
    """Losses of a probe set of two datasets of 16 tokens each; some are not finite."""
    probe_set = plain_probe_set(32)
    loss_N = np.arange(32, dtype=np.float32)
    left_N = probe_set.dataset_N == 0
    bad = [*np.flatnonzero(left_N)[[1, 3]], np.flatnonzero(~left_N)[0]]
    loss_N[bad] = [np.nan, np.inf, -np.inf]
    return probe_set, loss_N, left_N, bad


def test_means_are_over_finite_losses_and_the_others_are_counted():
    probe_set, loss_N, left_N, bad = spoiled()
    metrics = Metrics(probe_set, 0.1)
    named = metrics.named(metrics.measure(loss_N, None))
    left, right = probe_set.datasets
    good_N = np.ones(32, bool)
    good_N[bad] = False
    values = np.arange(32)
    assert named["probe loss"] == pytest.approx(values[good_N].mean(), rel=1e-12)
    assert named[f"probe loss/{left}"] == pytest.approx(values[good_N & left_N].mean(), rel=1e-12)
    assert named[f"probe loss/{right}"] == pytest.approx(values[good_N & ~left_N].mean(), rel=1e-12)
    assert named["tokens without finite loss"] == 3
    assert named[f"tokens without finite loss/{left}"] == 2
    assert named[f"tokens without finite loss/{right}"] == 1


def test_the_share_fallen_is_of_the_tokens_that_are_finite_at_both_probes():
    probe_set, loss_N, _, bad = spoiled()
    before_N = np.arange(32, dtype=np.float32) + 1  # all have fallen by 1
    before_N[:8] -= 1  # but for these
    lost_before = next(n for n in range(8, 32) if n not in bad)
    before_N[lost_before] = np.nan
    metrics = Metrics(probe_set, 0.1)
    named = metrics.named(metrics.measure(loss_N, before_N))
    counted = [n for n in range(32) if n not in bad and n != lost_before]
    expected = sum(n >= 8 for n in counted) / len(counted)
    assert named["share of tokens fallen by 0.1 nats"] == pytest.approx(expected, rel=1e-12)


def test_without_a_finite_loss_only_their_number_is_known():
    probe_set, loss_N, _, _ = spoiled()
    metrics = Metrics(probe_set, 0.1)
    named = metrics.named(metrics.measure(np.full_like(loss_N, np.nan), loss_N))
    left, right = probe_set.datasets
    assert named == {
        "tokens without finite loss": 32,
        f"tokens without finite loss/{left}": 16,
        f"tokens without finite loss/{right}": 16,
    }


def test_bits_per_byte_are_not_known_where_a_loss_is_not_finite():
    """The bytes of single tokens are not known, so those of the finite ones are not."""
    probe_set = probe_set_of_texts()
    metrics = Metrics(probe_set, 0.1, ByteTokenizer())
    loss_N = np.ones(probe_set.n_tokens, np.float32)
    loss_N[0] = np.nan
    named = metrics.named(metrics.measure(loss_N, None))
    assert [name for name in named if "byte" in name] == ["probe bits per byte/mixed"]
    assert named["probe bits per byte/mixed"] == pytest.approx(1 / math.log(2), rel=1e-12)


def test_the_falls_and_states_of_the_last_octave_are_those_of_its_tokens():
    """Of 32 tokens, 8 fell from 8 to 2 nats in the last octave and 4 have lost a former fall."""
    probe_set = plain_probe_set(32)
    tracker = ProgressTracker()
    for step in [0, *(round(2 ** (k / 8)) for k in range(24, 73))]:  # steps 8 to 512
        loss_N = np.full(32, 8 if step < 300 else 2, np.float32)
        loss_N[8:] = 8
        loss_N[8:12] = 1 if 32 <= step < 128 else 8
        tracker.add(step, loss_N)
    progress = tracker.progress()
    assert progress.octave_ago == 256
    metrics = Metrics(probe_set, 0.1)
    named = metrics.named(metrics.measure(loss_N, None, progress))
    assert named["share of tokens under way"] == pytest.approx(8 / 32)
    assert named["share of tokens forgotten"] == pytest.approx(4 / 32)
    fall_N = np.where(np.arange(32) < 8, 6.0, 0.0)
    assert named["nats learned in the last octave"] == pytest.approx(fall_N.mean())
    for number, dataset in enumerate(probe_set.datasets):
        expected = fall_N[probe_set.dataset_N == number].mean()
        assert named[f"nats learned in the last octave/{dataset}"] == pytest.approx(expected)
    assert not any("octave" in name for name in metrics.named(metrics.measure(loss_N, None)))

"""Bits per byte against texts whose bytes are known."""

import math

import numpy as np
import pytest
from runs import plain_probe_set

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.training.metrics import Metrics

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
    domain = np.repeat(np.arange(2, dtype=np.int16)[:, None], length, axis=1)
    blank = np.zeros(shape, np.int32)
    return ProbeSet(tokens, labels, mask, blank, blank, domain, ("english", "mixed"), 256)


def test_bits_per_byte_are_bits_over_the_bytes_of_the_text():
    probe_set = probe_set_of_texts()
    metrics = Metrics(probe_set, 0.1, ByteTokenizer())
    loss_N = np.random.default_rng(0).random(probe_set.n_tokens).astype(np.float32)
    named = metrics.named(metrics.measure(loss_N, None))
    bits_N = loss_N.astype(np.float64) / math.log(2)
    start = 0
    for domain, text in zip(probe_set.domains, TEXTS, strict=True):
        n_bytes = len(text.encode()) - 1
        expected = bits_N[start : start + n_bytes].sum() / n_bytes
        assert named[f"probe bits per byte/{domain}"] == pytest.approx(expected, rel=1e-12)
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

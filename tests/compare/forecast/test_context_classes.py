"""Classes of context against a loop over the tokens. B sequences, S positions."""

import numpy as np
from runs import plain_probe_set

from megatron_tokscale.compare.forecast.groups import (
    context_classes,
    label_before,
    missing_columns,
)
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import WatchedTokens
from megatron_tokscale.store.tokens import ImportedTokens, TokenColumns


def repeating():
    """Sequences of few ids, a third of them watched."""
    rng = np.random.default_rng(0)
    shape = (20, 16)
    rows = np.arange(20, dtype=np.int32)[:, None] * np.ones(16, dtype=np.int32)
    token_BT = rng.integers(0, 12, (20, 17)).astype(np.int32)
    return ProbeSet(
        tokens_BS=token_BT[:, :-1].copy(),
        labels_BS=token_BT[:, 1:].copy(),
        mask_BS=rng.random(shape) < 1 / 3,
        document_BS=rows,
        position_BS=np.tile(np.arange(16, dtype=np.int32), (20, 1)),
        dataset_BS=np.zeros(shape, np.int16),
        datasets=("prose",),
        vocab_size=12,
    )


def test_a_label_occurred_before_if_its_context_holds_it():
    tokens = repeating()
    expected = [
        tokens.labels_BS[b, s] in tokens.tokens_BS[b, : s + 1]
        for b, s in zip(*np.nonzero(tokens.mask_BS), strict=True)
    ]
    found_N = label_before(tokens)
    assert found_N.tolist() == expected
    assert 0 < found_N.mean() < 1


def test_a_run_with_text_has_all_classes_and_misses_nothing():
    for tokens in (WatchedTokens(repeating()), WatchedTokens(plain_probe_set(64))):
        found = context_classes(tokens)
        assert set(found) == {"dataset", "frequency decile", "position decile", "label before"}
        assert all(len(each.group_N) == tokens.n_tokens for each in found.values())
        assert missing_columns(tokens) == ()


def test_an_imported_run_says_what_it_does_not_know():
    columns = TokenColumns(dataset_N=np.zeros(10, np.int16))
    tokens = WatchedTokens(ImportedTokens(10, "0" * 16, ("all",), columns))
    assert set(context_classes(tokens)) == {"dataset"}
    said = " ".join(missing_columns(tokens))
    for word in ("datasets", "labels", "positions", "text"):
        assert word in said

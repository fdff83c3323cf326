"""Known columns of a run's watched tokens, with text and without."""

import numpy as np
import pytest
from small_probe_sets import make_probe_set

from megatron_tokscale.spectrum.groups import baseline_predictors, groupings
from megatron_tokscale.store.tokens import ImportedTokens, TokenColumns, WatchedTokens


def imported(n_tokens, **columns):
    dataset_N = np.zeros(n_tokens, np.int16)
    return WatchedTokens(
        ImportedTokens(n_tokens, "f", ("all",), TokenColumns(dataset_N=dataset_N, **columns))
    )


def partition(unit_N):
    """The sets of tokens that share a unit."""
    return {tuple(np.flatnonzero(unit_N == unit)) for unit in np.unique(unit_N)}


def test_rows_are_the_rows_of_the_columns():
    probe_set = make_probe_set(n_sequences=7)
    tokens, n = WatchedTokens(probe_set), probe_set.n_tokens
    for part in (slice(0, 1), slice(3, 9), slice(n - 2, n), slice(0, n)):
        rows = tokens.rows(part).known()
        assert sorted(rows) == ["context_N", "dataset_N", "document_N", "label_N", "position_N"]
        for name, array_N in rows.items():
            np.testing.assert_array_equal(array_N, getattr(probe_set, name)[part])


def test_labels_are_counted_in_the_whole_text():
    probe_set = make_probe_set(n_sequences=7)
    assert not probe_set.mask_BS.all()
    counts = [int((probe_set.labels_BS == label).sum()) for label in range(probe_set.vocab_size)]
    assert WatchedTokens(probe_set).label_count_V.tolist() == counts


def test_samples_are_units_without_documents():
    sample_N = np.array([5, 5, 7, 5, 9, 7], np.int32)
    tokens = imported(6, sample_N=sample_N)
    units = tokens.units(seed=0)
    assert (units.kind, units.documents) == ("samples", 3)
    assert partition(units.unit_N) == {(0, 1, 3), (2, 5), (4,)}
    assert "samples" in tokens.note_on_units()


def test_documents_are_units_before_samples():
    tokens = imported(
        4, sample_N=np.arange(4, dtype=np.int32), document_N=np.array([0, 0, 1, 1], np.int32)
    )
    assert partition(tokens.units(seed=0).unit_N) == {(0, 1), (2, 3)}
    assert tokens.note_on_units() is None


@pytest.mark.parametrize(("n_tokens", "length", "count"), [(640, 10, 64), (10**6, 256, 3907)])
def test_blocks_of_consecutive_tokens_are_units_without_either(n_tokens, length, count):
    tokens = imported(n_tokens)
    units = tokens.units(seed=0, most=n_tokens)
    assert (units.kind, units.documents) == ("blocks", count)
    assert np.unique(np.flatnonzero(np.diff(units.unit_N)) + 1).tolist() == list(
        range(length, n_tokens, length)
    )
    assert f"blocks of {length} consecutive tokens" in tokens.note_on_units()


def test_what_is_not_known_is_left_out_of_groupings_and_predictors():
    assert groupings(imported(20)) == {}
    assert baseline_predictors(imported(20)) == {}
    label_N = np.repeat(np.arange(4, dtype=np.int32), [1, 3, 6, 10])
    labelled = imported(20, label_N=label_N)
    assert set(groupings(labelled)) == {"frequency decile"}
    found = baseline_predictors(labelled)
    assert set(found) == {"unigram"}
    np.testing.assert_allclose(found["unigram"], np.log([1, 3, 6, 10])[label_N])

"""Probe sets hold the held-out tokens that Megatron would hold out, and know where each is from."""

import dataclasses
import time

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus, write_documents
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.corpus.source import parse_data_path, split_range
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set, describe
from megatron_tokscale.probe.draw import draw, quotas

SPLITS = ["969,30,1", "900,100,0", "90,5,5", "0.7,0.2,0.1", "1,1,1", "100", "99,1"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n_sequences", [1, 10, 333, 100_003])
def test_split_is_megatrons(split, n_sequences):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for part, bounds in zip(("train", "valid", "test"), matrix, strict=True):
        first, last = (round(bound * float(n_sequences)) for bound in bounds or (0, 0))
        assert list(split_range(split, part, n_sequences))[:3] == list(range(first, last))[:3]
        assert len(split_range(split, part, n_sequences)) == last - first


BLENDS = [
    ["a"],
    ["a", "b", "c"],
    ["30", "a", "70", "b"],
    ["1e-1", "a", "2.5", "b", "3", "c"],
    ["a", "b"],
]


@pytest.mark.parametrize("words", BLENDS)
def test_data_path_is_read_as_megatron_reads_it(words):
    from megatron.core.datasets.utils import get_blend_from_list

    prefixes, weights = get_blend_from_list(words)
    found, found_weights = parse_data_path(words)
    assert list(found) == list(prefixes)
    expected = weights and [weight / sum(weights) for weight in weights]
    assert found_weights == (expected and pytest.approx(expected))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_tokens_are_those_of_megatrons_reader(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{tmp_path}/data.bin", dtype=dtype)
    for _ in range(20):
        document = generator.integers(0, 60_000, generator.integers(1, 50))
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{tmp_path}/data.idx")
    expected = IndexedDataset(f"{tmp_path}/data")
    found = IndexedTokens.open(f"{tmp_path}/data")
    assert_array_equal(found.lengths, expected.sequence_lengths)
    for index in range(20):
        assert_array_equal(found.sequence(index), expected[index])


@pytest.fixture
def settings(corpus: Corpus) -> ProbeSettings:
    return ProbeSettings(
        data_path=corpus.data_path,
        split="900,100,0",
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        n_tokens=500,
        eod=EOD,
    )


def test_every_token_is_where_the_set_says(settings, corpus):
    probe_set = build_probe_set(settings)
    datasets = [IndexedTokens.open(prefix) for prefix in corpus.prefixes]
    held_out = split_range("900,100,0", "valid", 300)
    checked = 0
    for row, column in zip(*np.nonzero(probe_set.mask_BS), strict=True):
        document = int(probe_set.document_BS[row, column])
        position = int(probe_set.position_BS[row, column])
        ids = datasets[probe_set.dataset_BS[row, column]].sequence(document)
        assert document in held_out
        assert probe_set.labels_BS[row, column] == ids[position] != EOD
        assert_array_equal(
            probe_set.tokens_BS[row, : column + 1], ids[position - column - 1 : position]
        )
        checked += 1
    assert checked == probe_set.n_tokens >= 480
    assert_array_equal(
        probe_set.context_N,
        probe_set.position_N % SEQ_LENGTH + (probe_set.position_N % SEQ_LENGTH == 0) * SEQ_LENGTH,
    )


def test_no_token_is_watched_twice(settings):
    probe_set = build_probe_set(settings)
    places = zip(probe_set.dataset_N, probe_set.document_N, probe_set.position_N, strict=True)
    assert len(set(places)) == probe_set.n_tokens


def test_datasets_share_the_tokens_equally(settings):
    counts = np.bincount(build_probe_set(settings).dataset_N)
    assert abs(int(counts[0]) - int(counts[1])) <= 2 * SEQ_LENGTH


@pytest.mark.parametrize("n_sequences", [2, 5, 16])
def test_a_set_has_the_sequences_asked_for(settings, n_sequences):
    probe_set = build_probe_set(
        dataclasses.replace(settings, n_tokens=None, n_sequences=n_sequences)
    )
    assert probe_set.n_sequences == n_sequences
    counts = np.bincount(probe_set.dataset_BS[:, 0], minlength=2)
    assert abs(int(counts[0]) - int(counts[1])) <= 1


def test_datasets_share_by_weight_on_request(settings, corpus):
    words = ["3", corpus.prefixes[0], "1", corpus.prefixes[1]]
    by_weight = dataclasses.replace(
        settings, data_path=words, per_dataset="proportional", n_tokens=None, n_sequences=20
    )
    counts = np.bincount(build_probe_set(by_weight).dataset_BS[:, 0])
    assert counts.tolist() == [15, 5]


def test_a_dataset_of_no_weight_gets_nothing(settings, corpus):
    words = ["0", corpus.prefixes[0], "1", corpus.prefixes[1]]
    probe_set = build_probe_set(
        dataclasses.replace(settings, data_path=words, per_dataset="proportional")
    )
    assert probe_set.datasets == ("right",)


def test_a_drawn_window_is_the_same_whatever_else_is_drawn(settings):
    fewer, more = (
        build_probe_set(dataclasses.replace(settings, n_tokens=None, n_sequences=n))
        for n in (6, 14)
    )

    def rows(probe_set):
        arrays = (probe_set.dataset_BS, probe_set.document_BS, probe_set.position_BS)
        return {tuple(array[row, 0] for array in arrays) for row in range(probe_set.n_sequences)}

    assert rows(fewer) < rows(more)


@pytest.mark.parametrize("seq_length", [1, 7, 32, 500])
@pytest.mark.parametrize("n_tokens", [1, 60, 900])
def test_windows_are_those_of_a_plain_loop(corpus, seq_length, n_tokens):
    """Every window listed, then taken in the generator's order until there are enough."""
    tokens = IndexedTokens.open(corpus.prefixes[0])
    held_out = range(270, 300)
    listed = [
        (document, start, min(seq_length, int(tokens.lengths[document]) - 1 - start))
        for document in held_out
        for start in range(0, int(tokens.lengths[document]) - 1, seq_length)
    ]
    expected, held = [], 0
    for index in np.random.default_rng([1, 0]).permutation(len(listed)):
        if held < n_tokens:
            expected.append(listed[index])
            held += listed[index][2]
    windows = draw(Portion(tokens, held_out, 1.0), 0, seq_length, n_tokens, "tokens", 1)
    found = zip(windows.document_W, windows.start_W, windows.n_labels_W, strict=True)
    assert [tuple(int(value) for value in window) for window in found] == expected


def test_quotas_add_up_and_follow_the_shares():
    generator = np.random.default_rng(0)
    for total in (1, 10, 1000, 10**9):
        for n in (1, 3, 10):
            shares = generator.uniform(0, 5, n)
            found = quotas(total, list(shares))
            assert sum(found) == total
            assert np.all(np.abs(found - total * shares / shares.sum()) <= 1)


def test_a_draw_from_millions_of_documents_is_fast():
    """A set is drawn from 5 million documents without an object per document."""

    class Many:
        lengths = np.random.default_rng(0).integers(0, 3000, 5_000_000).astype(np.int32)

    started = time.perf_counter()
    windows = draw(Portion(Many, range(5_000_000), 1.0), 0, 1024, 10**6, "tokens", 1)
    assert time.perf_counter() - started < 20
    assert windows.n_labels_W.sum() - 1024 < 10**6 <= windows.n_labels_W.sum()


def test_same_settings_same_set_and_other_seed_another(settings):
    first, again = build_probe_set(settings), build_probe_set(settings)
    other = build_probe_set(dataclasses.replace(settings, seed=7))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_set_survives_the_disk(settings, tmp_path):
    probe_set = build_probe_set(settings)
    probe_set.save(tmp_path / "probe.safetensors")
    loaded = ProbeSet.load(tmp_path / "probe.safetensors")
    assert loaded.fingerprint == probe_set.fingerprint
    assert loaded.origin == probe_set.origin
    assert_array_equal(loaded.labels_BS, probe_set.labels_BS)
    assert "left: " in describe(loaded)


def test_a_set_tells_what_is_in_it(settings):
    probe_set = build_probe_set(settings)
    text = describe(probe_set)
    assert f"{probe_set.n_tokens:,} tokens in {probe_set.n_sequences} sequences of 32" in text
    assert "vocabulary 255" in text
    assert "from the valid part of split 900,100,0, seed 1234\n" in text
    for dataset, name in enumerate(("left", "right")):
        mask_BS = probe_set.mask_BS[probe_set.dataset_BS[:, 0] == dataset]
        context = np.broadcast_to(np.arange(1, SEQ_LENGTH + 1), mask_BS.shape)[mask_BS].mean()
        documents = len(
            set(probe_set.document_BS[probe_set.dataset_BS[:, 0] == dataset, 0].tolist())
        )
        assert (
            f"  {name}: {mask_BS.sum()} tokens in {len(mask_BS)} sequences of {documents} "
            f"documents, mean context {context:.0f}, {1 - mask_BS.mean():.1%} of the positions"
        ) in text
    assert "not looked for" in text


def test_a_set_of_training_text_says_so(settings):
    probe_set = build_probe_set(dataclasses.replace(settings, part="train"))
    assert probe_set.origin.part == "train"
    assert set(probe_set.document_N) <= set(split_range("900,100,0", "train", 300))
    assert "TRAINED ON" in describe(probe_set)


def test_names_from_a_file_are_shown_escaped(settings):
    probe_set = build_probe_set(settings)
    evil = dataclasses.replace(
        probe_set,
        datasets=("\x1b[31mred\r", "übrig\n"),
        origin=dataclasses.replace(probe_set.origin, split="\x1b]0;x\x07", part="\u202e"),
    )
    lines = describe(evil).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 5
    assert "\\x1b[31mred\\r" in lines[2]
    assert "übrig\\n" in lines[3]


def test_an_altered_set_is_refused(settings, tmp_path):
    path = tmp_path / "probe.safetensors"
    build_probe_set(settings).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokscaleError, match="fingerprint"):
        ProbeSet.load(path)


def test_a_set_of_schema_1_is_refused_with_the_verb_that_makes_one(tmp_path):
    """Schema 1 had the array "domain" and the value "domains" in place of dataset and datasets."""
    path, ids = tmp_path / "probe.safetensors", np.ones((1, 4), np.int32)
    arrays = dict.fromkeys(("tokens", "labels", "document", "position"), ids)
    arrays |= {"mask": np.ones((1, 4), np.bool_), "domain": np.zeros((1, 4), np.int16)}
    metadata = {"kind": "tokscale-probe-set", "schema_version": "1", "fingerprint": "0" * 16}
    metadata |= {"domains": '["left"]', "vocab_size": "9", "details": "{}"}
    save_file(arrays, path, metadata)
    with pytest.raises(TokscaleError) as caught:
        ProbeSet.load(path)
    assert str(caught.value) == (
        f"{path} is of an older schema; make it again with `megatron-tokscale probe build` "
        "(its schema version is 1; expected 2)"
    )


def test_bad_settings_are_refused(settings, tmp_path, corpus):
    small = write_documents(tmp_path / "small", [[1, 2, 3, EOD]] * 20)
    cases = {
        "is not there": {"data_path": [str(tmp_path / "nowhere")]},
        "token id": {"vocab_size": 100},
        "ask for fewer": {"data_path": [small]},
        "give up to three numbers": {"split": "a,b"},
        "weights must be positive": {"data_path": ["0", corpus.prefixes[0]]},
        "in --tokens or in --sequences": {"n_sequences": 7},
        "too few for 2 datasets": {"n_tokens": 1},
        "--seq-length 0": {"seq_length": 0},
    }
    for message, change in cases.items():
        with pytest.raises(TokscaleError, match=message):
            build_probe_set(dataclasses.replace(settings, **change))


def test_damaged_data_is_refused(tmp_path):
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, EOD]] * 20)
    index = tmp_path / "data.idx"
    whole = index.read_bytes()
    for damage, message in ((whole[:60], "truncated"), (b"x" * 200, "not a Megatron index")):
        index.write_bytes(damage)
        with pytest.raises(TokscaleError, match=message):
            IndexedTokens.open(prefix)
    index.write_bytes(whole)
    (tmp_path / "data.bin").write_bytes(b"\0" * 10)
    with pytest.raises(TokscaleError, match="shorter than its index"):
        IndexedTokens.open(prefix)

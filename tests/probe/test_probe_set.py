"""Probe sets hold the held-out tokens that Megatron would hold out, and know where each is from."""

import dataclasses

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus, write_documents
from numpy.testing import assert_array_equal

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.indexed import IndexedTokens, parse_data_path, split_range
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set, describe

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
        ids = datasets[probe_set.domain_BS[row, column]].sequence(document)
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
    places = zip(probe_set.domain_N, probe_set.document_N, probe_set.position_N, strict=True)
    assert len(set(places)) == probe_set.n_tokens


def test_datasets_share_the_tokens_equally(settings):
    counts = np.bincount(build_probe_set(settings).domain_N)
    assert abs(int(counts[0]) - int(counts[1])) <= 2 * SEQ_LENGTH


def test_same_settings_same_set_and_other_seed_another(settings):
    first, again = build_probe_set(settings), build_probe_set(settings)
    other = build_probe_set(dataclasses.replace(settings, seed=7))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_set_survives_the_disk(settings, tmp_path):
    probe_set = build_probe_set(settings)
    probe_set.save(tmp_path / "probe.safetensors")
    loaded = ProbeSet.load(tmp_path / "probe.safetensors")
    assert loaded.fingerprint == probe_set.fingerprint
    assert loaded.details == probe_set.details
    assert_array_equal(loaded.labels_BS, probe_set.labels_BS)
    assert "left: " in describe(loaded)


def test_an_altered_set_is_refused(settings, tmp_path):
    path = tmp_path / "probe.safetensors"
    build_probe_set(settings).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokscaleError, match="fingerprint"):
        ProbeSet.load(path)


def test_bad_settings_are_refused(settings, tmp_path, corpus):
    small = write_documents(tmp_path / "small", [[1, 2, 3, EOD]] * 20)
    cases = {
        "is not there": {"data_path": [str(tmp_path / "nowhere")]},
        "token id": {"vocab_size": 100},
        "ask for fewer": {"data_path": [small]},
        "of one name": {"data_path": [corpus.prefixes[0]] * 3},
        "give up to three numbers": {"split": "a,b"},
        "weights must be positive": {"data_path": ["0", corpus.prefixes[0]]},
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

"""Watched text that is also trained on is found: exactly that, wherever it is."""

import dataclasses

import numpy as np
import pytest
from jobs import EOD, VOCAB_SIZE, write_documents
from recorded_progress import RecordedProgress

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.probe import duplicates
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set, describe
from megatron_tokscale.probe.duplicates import PASSAGE, documents_in, passages_in

SEQ_LENGTH = 128


silent = NoProgress().meter("search", 0, "tokens")


def random_documents(seed, n, longest=400):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, n)
    return [[*generator.integers(0, EOD, length).tolist(), EOD] for length in lengths]


@pytest.fixture(params=[1 << 17, 97])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(duplicates, "_TOKENS", request.param)
    monkeypatch.setattr(duplicates, "_DOCUMENTS", request.param)


@pytest.mark.usefixtures("small_chunks")
def test_documents_found_are_those_of_a_plain_search(tmp_path):
    short = [[a, b, EOD] for a in range(6) for b in range(6)]
    training = [random_documents(0, 60) + short[:20], [*random_documents(1, 40), []]]
    prefixes = [write_documents(tmp_path / f"{i}", some) for i, some in enumerate(training)]
    known = training[0][3:30] + training[1][5:9]
    changed = [[*ids[:-2], (ids[-2] + 1) % EOD, EOD] for ids in known if len(ids) > 3]
    cut = [ids[1:] for ids in known if len(ids) > 2]
    candidates = [*known, *changed, *cut, *short]
    expected = [ids in training[0] or ids in training[1] for ids in candidates]
    portions = DataSource({"train": prefixes}, None).portions("train")
    found = documents_in(portions, [np.array(ids) for ids in candidates], silent)
    assert found.tolist() == expected
    assert 20 < sum(expected) < len(expected) - 20


@pytest.mark.usefixtures("small_chunks")
def test_passages_found_are_those_of_a_plain_search(tmp_path):
    training = [random_documents(0, 60), [*random_documents(1, 20), [7] * 300, [7] * 9]]
    prefixes = [write_documents(tmp_path / f"{i}", some) for i, some in enumerate(training)]
    streams = [[token for ids in some for token in ids] for some in training]
    grams = {
        tuple(stream[i : i + PASSAGE])
        for stream in streams
        for i in range(len(stream) - PASSAGE + 1)
    }
    generator = np.random.default_rng(2)
    taken = [
        stream[start : start + PASSAGE]
        for stream in streams
        for start in generator.integers(0, len(stream) - PASSAGE, 50)
    ]
    ends = [streams[0][:PASSAGE], streams[0][-PASSAGE:], streams[1][-PASSAGE:]]
    across = [streams[0][-10:] + streams[1][: PASSAGE - 10]]
    spoilt = [[*ids[:20], (ids[20] + 1) % EOD, *ids[21:]] for ids in taken]
    unseen = generator.integers(0, EOD, (50, PASSAGE)).tolist()
    passages = [*taken, *ends, *across, *spoilt, *unseen, [7] * PASSAGE, [8] * PASSAGE]
    expected = [tuple(ids) in grams for ids in passages]
    portions = DataSource({"train": prefixes}, None).portions("train")
    found = passages_in(portions, np.array(passages, np.uint16), silent)
    assert found.tolist() == expected
    assert sum(expected) == len(taken) + len(ends) + 1


def test_token_types_do_not_matter(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = random_documents(0, 20)
    builder = IndexedDatasetBuilder(f"{tmp_path}/wide.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{tmp_path}/wide.idx")
    portions = DataSource({"train": [f"{tmp_path}/wide"]}, None).portions("train")
    arrays = [np.array(ids, np.uint16) for ids in documents]
    assert documents_in(portions, arrays, silent).all()
    long = [ids[:PASSAGE] for ids in arrays if ids.size >= PASSAGE]
    assert passages_in(portions, np.stack(long), silent).all()


def test_an_empty_training_part_has_no_duplicates(tmp_path):
    portions = DataSource({"train": [write_documents(tmp_path / "a", [[1, EOD]])]}, None).portions(
        "train"
    )
    assert not passages_in(portions, np.zeros((3, PASSAGE)), silent).any()
    assert passages_in(portions, np.zeros((0, PASSAGE)), silent).size == 0
    assert not documents_in(portions[:0], [np.array([1, 2])], silent).any()


@pytest.fixture
def settings(tmp_path):
    """Two datasets, each with 5 held-out documents that are copies and 5 that quote training."""
    train, valid = [], []
    for index in range(2):
        trained = random_documents(index, 200, longest=300)
        copies = [ids for ids in trained if len(ids) > 10][:5]
        long = [ids for ids in trained if len(ids) > 250][:5]
        quotes = [[*range(7), *ids[40 : 40 + 2 * PASSAGE], EOD] for ids in long]
        own = random_documents(10 + index, 40, longest=300)
        train.append(write_documents(tmp_path / f"train{index}", trained))
        valid.append(write_documents(tmp_path / f"valid{index}", copies + own + quotes))
    return ProbeSettings(
        data_path={"train": train, "valid": valid},
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        n_tokens=11_000,
        eod=EOD,
    )


def grams_of(prefixes):
    streams = [
        portion.tokens for portion in DataSource({"train": prefixes}, None).portions("train")
    ]
    return {
        tuple(ids[i : i + PASSAGE].tolist())
        for tokens in streams
        for ids in [tokens.stream(range(tokens.n_sequences))]
        for i in range(len(ids) - PASSAGE + 1)
    }


def is_duplicate(probe_set, settings, row, grams):
    """By a plain search: the window's document is a copy, or a passage of it is in training."""
    valid = DataSource(settings.data_path, None).portions("valid")
    train = DataSource(settings.data_path, None).portions("train")
    tokens = valid[probe_set.dataset_BS[row, 0]].tokens
    document = tokens.sequence(int(probe_set.document_BS[row, 0])).tolist()
    start = int(probe_set.position_BS[row, 0]) - 1
    window = document[start : start + SEQ_LENGTH + 1]
    pieces = [tuple(window[i : i + PASSAGE]) for i in range(0, len(window), PASSAGE)]
    copies = any(
        document == portion.tokens.sequence(index).tolist()
        for portion in train
        for index in portion.sequences
    )
    return copies or any(piece in grams for piece in pieces)


def test_reported_duplicates_are_those_of_a_plain_search(settings):
    plain = build_probe_set(settings)
    probe_set = build_probe_set(dataclasses.replace(settings, duplicates="report"))
    assert probe_set.fingerprint == plain.fingerprint
    grams = grams_of(settings.data_path["train"])
    rows = range(probe_set.n_sequences)
    expected = np.array([is_duplicate(probe_set, settings, row, grams) for row in rows])
    found = probe_set.origin.duplicates.datasets
    for dataset, counts in enumerate(found):
        is_dataset = probe_set.dataset_BS[:, 0] == dataset
        assert counts.windows == is_dataset.sum()
        assert counts.duplicate_windows == expected[is_dataset].sum() >= 4
        assert counts.duplicate_tokens == probe_set.mask_BS[expected & is_dataset].sum()
        assert 1 <= counts.duplicate_documents <= 5
    assert f"{found[0].duplicate_windows} of {found[0].windows} windows" in describe(probe_set)


def test_dropped_duplicates_are_replaced_by_others(settings):
    fewer = dataclasses.replace(settings, n_tokens=5000)
    probe_set = build_probe_set(dataclasses.replace(fewer, duplicates="drop"))
    grams = grams_of(settings.data_path["train"])
    rows = range(probe_set.n_sequences)
    assert not any(is_duplicate(probe_set, settings, row, grams) for row in rows)
    assert probe_set.n_tokens >= 4900
    assert all(counts.duplicate_windows for counts in probe_set.origin.duplicates.datasets)
    assert "passed over" in describe(probe_set)
    again = build_probe_set(dataclasses.replace(fewer, duplicates="drop"))
    assert again.fingerprint == probe_set.fingerprint


def test_dropping_changes_nothing_where_there_are_no_duplicates(settings, tmp_path):
    clean = write_documents(tmp_path / "clean", random_documents(99, 50))
    data_path = {**settings.data_path, "train": [clean]}
    drop = dataclasses.replace(settings, data_path=data_path, duplicates="drop")
    plain = dataclasses.replace(drop, duplicates="ignore")
    assert build_probe_set(drop).fingerprint == build_probe_set(plain).fingerprint


def test_a_set_of_duplicates_alone_is_refused(settings):
    data_path = {"train": settings.data_path["valid"], "valid": settings.data_path["valid"]}
    drop = dataclasses.replace(settings, data_path=data_path, duplicates="drop")
    with pytest.raises(TokscaleError, match="duplicates of training text, too many"):
        build_probe_set(drop)


def test_a_set_of_the_training_part_has_no_duplicates_to_look_for(settings):
    report = dataclasses.replace(settings, part="train", duplicates="report")
    with pytest.raises(TokscaleError, match="all of it is trained on"):
        build_probe_set(report)


def test_progress_ends_where_it_should(settings):
    progress = RecordedProgress()
    build_probe_set(dataclasses.replace(settings, duplicates="report"), progress)
    assert {what.split()[-1] for what in progress.reports} == {"documents", "passages"}
    for reports in progress.reports.values():
        assert reports == sorted(reports)
        done, total = reports[-1]
        assert done == total

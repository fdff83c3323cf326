import json
from dataclasses import replace

import numpy as np
import pytest
from jobs import write_documents
from safetensors.numpy import load_file, save_file

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.plan_parts import DatasetIdentity
from megatron_tokscale.data.scores import (
    DocumentScores,
    Reliability,
    ScoreDetails,
    data_digest,
    holds_scores,
    identity_of,
    scores_path,
)

FITTED = ("learning_time_Q", "spread_Q", "drop_Q", "unlearned_Q")
ARRAYS = (*FITTED, "surprisal_Q", "watched_Q", "fall_Q", "target_Q")
DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def some_scores(**changes) -> DocumentScores:
    nan = np.nan
    scores = DocumentScores(
        learning_time_Q=np.array([20.5, nan, nan], np.float32),
        spread_Q=np.array([0.5, nan, nan], np.float32),
        drop_Q=np.array([1.5, 0.0, nan], np.float32),
        unlearned_Q=np.array([0.25, 1.0, nan], np.float32),
        surprisal_Q=np.array([7.0, 9.0, 8.0], np.float32),
        watched_Q=np.array([30, 16, 0], np.int32),
        dataset=DatasetIdentity("web", 3, 9),
        digest="0123456789abcdef",
        fall_Q=np.array([0.75, -0.25, nan], np.float32),
        target_Q=np.array([-0.5, 0.125, nan], np.float32),
        details=ScoreDetails(
            run="somewhere",
            log_tokens_range=(8.5, 14.0),
            reliability={"fall": Reliability(0.5, None, 0.25, 0.0625, 2)},
            fall_tokens=(2**20, 2**22),
            reference_parameters=3,
            reference_tokens=2**22,
        ),
    )
    return replace(scores, **changes)


@pytest.fixture
def tokens(tmp_path) -> IndexedTokens:
    return IndexedTokens.open(write_documents(tmp_path / "web", DOCUMENTS))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "web.tokscale.safetensors"
    some_scores().save(path)
    return path


def test_scores_lie_beside_the_data(tokens):
    path = scores_path(tokens.prefix)
    assert path.name == "web.tokscale.safetensors"
    assert path.with_name("web.bin").is_file()


def test_scores_read_back_are_the_scores_written(saved):
    written, read = some_scores(), DocumentScores.load(saved)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert (read.dataset, read.digest, read.details) == (
        written.dataset,
        written.digest,
        written.details,
    )
    assert read.fingerprint == written.fingerprint
    assert holds_scores(saved)


@pytest.mark.parametrize("name", ARRAYS)
def test_every_score_is_in_the_fingerprint(name):
    changed = getattr(some_scores(), name).copy()
    changed[0] = changed[0] + 1 if name != "unlearned_Q" else 0.5
    assert some_scores(**{name: changed}).fingerprint != some_scores().fingerprint


WITHOUT_FITS = dict.fromkeys(FITTED)
KINDS = [
    {"fall_Q": None, "target_Q": None},
    WITHOUT_FITS | {"target_Q": None},
    WITHOUT_FITS | {"fall_Q": None},
]


@pytest.mark.parametrize("without", KINDS)
def test_a_file_holds_the_scores_that_there_are(tmp_path, without):
    written = some_scores(**without)
    written.save(tmp_path / "some.safetensors")
    read = DocumentScores.load(tmp_path / "some.safetensors")
    assert read.fingerprint == written.fingerprint != some_scores().fingerprint
    for name in ARRAYS:
        if name in without:
            assert getattr(read, name) is None
        else:
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))


def test_each_order_has_its_score():
    scores = some_scores()
    for order, name in (
        ("learning-time", "learning_time_Q"),
        ("frequency", "surprisal_Q"),
        ("fall", "fall_Q"),
        ("target", "target_Q"),
    ):
        assert scores.ordering_Q(order) is getattr(scores, name)
    assert scores.require_fitted() == scores.fitted == tuple(getattr(scores, n) for n in FITTED)


@pytest.mark.parametrize(
    ("without", "order", "sentence"),
    [
        (
            WITHOUT_FITS,
            "learning-time",
            "scores of web have no learning times; run `megatron-tokscale fit somewhere`, which "
            "needs probes at 5 steps, then `megatron-tokscale score somewhere --force`",
        ),
        ({"fall_Q": None}, "fall", "have no falls; watch somewhere at a quarter and at the end"),
        ({"target_Q": None}, "target", "no target scores; run `megatron-tokscale score somewhere "),
    ],
)
def test_a_score_that_is_not_there_is_named_with_the_verb_that_makes_it(without, order, sentence):
    scores = some_scores(**without)
    with pytest.raises(TokscaleError, match=sentence) as caught:
        scores.ordering_Q(order)
    assert "\n" not in str(caught.value)
    if order == "learning-time":
        assert scores.fitted is None
        with pytest.raises(TokscaleError, match=sentence):
            scores.require_fitted()


def test_the_data_are_in_the_fingerprint_and_the_details_are_not():
    fingerprint = some_scores().fingerprint
    assert some_scores(digest="another").fingerprint != fingerprint
    assert some_scores(dataset=DatasetIdentity("web", 3, 10)).fingerprint != fingerprint
    assert some_scores(details=ScoreDetails()).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset": DatasetIdentity("web", 4, 9)}, "4 documents"),
        ({"drop_Q": np.zeros(3)}, "drop are float64"),
        ({"drop_Q": np.array([-1, 0, 0], np.float32)}, "drop .* out of range"),
        ({"spread_Q": np.array([-1, 0, 0], np.float32)}, "spread .* out of range"),
        ({"unlearned_Q": np.array([1.5, 0, 0], np.float32)}, "unlearned .* out of range"),
        ({"watched_Q": np.array([-1, 0, 0], np.int32)}, "watched .* out of range"),
        ({"surprisal_Q": np.array([np.inf, 0, 0], np.float32)}, "surprisal .* infinite"),
        ({"fall_Q": np.zeros(3)}, "fall are float64"),
        ({"target_Q": np.array([-np.inf, 0, 0], np.float32)}, "target .* infinite"),
        ({"drop_Q": None}, "expected all of learning_time, spread, drop, unl"),
        (WITHOUT_FITS | {"fall_Q": None, "target_Q": None}, "expected one of them at least"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(change, sentence):
    with pytest.raises(TokscaleError, match=sentence) as caught:
        some_scores(**change)
    assert "\n" not in str(caught.value)


def rewritten(path, arrays=lambda a: a, metadata=lambda m: m):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        found = file.metadata()
    save_file(arrays(load_file(path)), path, metadata(found))


def lacking(arrays, name):
    return {other: array for other, array in arrays.items() if other != name}


def other_dataset(metadata):
    return {**metadata, "dataset": json.dumps({"name": "web", "n_sequences": 3, "n_tokens": 8})}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "damaged"),
        (lambda path: path.write_bytes(b"x" * 1000), "damaged"),
        (
            lambda path: rewritten(path, metadata=lambda m: m | {"kind": "else"}),
            "is not a score file",
        ),
        (lambda path: rewritten(path, metadata=lambda _: None), "is not a score file"),
        (lambda path: rewritten(path, metadata=lambda m: m | {"schema_version": "9"}), "version 9"),
        (
            lambda path: rewritten(path, metadata=lambda m: m | {"schema_version": "1"}),
            "older schema; make it again .*schema version is 1; expected 3",
        ),
        (lambda path: rewritten(path, metadata=lambda m: m | {"dataset": "{"}), "damaged"),
        (lambda path: rewritten(path, metadata=lambda m: m | {"dataset": "{}"}), "damaged"),
        (lambda path: rewritten(path, metadata=lambda m: m | {"details": "?"}), "damaged"),
        (lambda path: rewritten(path, metadata=other_dataset), "fingerprint"),
        (lambda path: rewritten(path, metadata=lambda m: m | {"digest": "?"}), "fingerprint"),
        (lambda path: rewritten(path, lambda a: a | {"drop": a["drop"] + 1}), "fingerprint"),
        (lambda path: rewritten(path, lambda a: {"drop": a["drop"]}), "damaged"),
        (lambda path: rewritten(path, lambda a: lacking(a, "fall")), "fingerprint"),
        (lambda path: rewritten(path, lambda a: lacking(a, "spread")), "expected all of"),
        (lambda path: rewritten(path, lambda a: a | {"drop": a["drop"][:2]}), "shape"),
        (lambda path: rewritten(path, lambda a: a | {"drop": a["spread"] - 1}), "out of range"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(saved, damage, sentence):
    damage(saved)
    with pytest.raises(TokscaleError, match=sentence) as caught:
        DocumentScores.load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_other_than_safetensors_holds_no_scores(tmp_path):
    (tmp_path / "notes").write_text("my notes")
    assert not holds_scores(tmp_path / "notes")
    assert not holds_scores(tmp_path / "none")


def scores_of(tokens: IndexedTokens) -> DocumentScores:
    return some_scores(dataset=identity_of(tokens), digest=data_digest(tokens))


def test_scores_fit_the_data_they_were_made_for(tokens):
    assert identity_of(tokens) == DatasetIdentity("web", 3, 9)
    scores_of(tokens).check(tokens)


@pytest.mark.parametrize(
    "documents",
    [
        [[1, 2, 3], [4, 5], [6, 7, 8, 10]],  # another token
        [[1, 2], [3, 4, 5], [6, 7, 8, 9]],  # other documents of as many tokens
        [[1, 2, 3], [4, 5], [6, 7, 8, 9, 9]],
        [*DOCUMENTS, [1]],
    ],
)
def test_other_data_are_refused(tokens, tmp_path, documents):
    (tmp_path / "other").mkdir()
    other = IndexedTokens.open(write_documents(tmp_path / "other" / "web", documents))
    with pytest.raises(TokscaleError, match="made for other data or another tokenizer") as caught:
        scores_of(tokens).check(other)
    assert "\n" not in str(caught.value)


def test_the_digest_looks_at_both_ends_of_a_long_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_tokscale.data.scores._END_TOKENS", 4)
    long = list(range(20))

    def digest(name, document):
        return data_digest(IndexedTokens.open(write_documents(tmp_path / name, [document])))

    assert digest("same", long) == digest("again", long)
    assert digest("first", [99, *long[1:]]) != digest("last", [*long[:-1], 99])
    assert digest("first", [99, *long[1:]]) != digest("same", long)
    assert digest("last", [*long[:-1], 99]) != digest("same", long)
    assert digest("middle", [*long[:10], 99, *long[11:]]) == digest("same", long)

"""`probe build --plan`: the probe set of the documents that a plan keeps out of the training."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus
from planned_jobs import make_scores

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Cut, Plan, ScoreDetails, Stage, Stratum
from megatron_tokscale.data.document_strata import documents_of_strata, held_out_documents
from megatron_tokscale.data.scores import scores_file
from megatron_tokscale.probe import ProbeSet

HELD_OUT = 9
EDGES = (10.25, 10.75, 99.0)
"""No document has a learning time above the last edge: the fourth stratum is empty."""


@pytest.fixture(scope="module")
def scores(corpus: Corpus, tmp_path_factory):
    """The scores of both datasets, and their folder."""
    folder, found = tmp_path_factory.mktemp("scores"), []
    for seed, prefix in enumerate(corpus.prefixes):
        found.append(
            replace(make_scores(prefix, seed), details=ScoreDetails(vocab_size=VOCAB_SIZE))
        )
        found[-1].save(scores_file(IndexedTokens.open(prefix), folder))
    return found, folder


def plan_of(scores, **changes) -> Plan:
    """The left dataset in four strata of documents; the right one in one."""
    left, right = scores[0]
    cut = Cut(left.fingerprint, unit="documents", edges=EDGES, held_out=HELD_OUT)
    fields = {
        "datasets": (left.dataset, right.dataset),
        "strata": (
            *(Stratum(f"left/{n}", 0, share) for n, share in enumerate((0.3, 0.3, 0.4, 0.0))),
            Stratum("right/0", 1),
        ),
        "stages": (Stage(0, (1.0, 1.0)),),
        "seq_length": SEQ_LENGTH,
        "seed": 5,
        "cuts": (cut, replace(cut, scores=right.fingerprint, edges=())),
        "documents": ((0, 270), (10, 270)),
    }
    return Plan(**fields | changes)


def call(*flags) -> int:
    """Run the verb; return its exit code."""
    try:
        main(["probe", "build", *flags])
    except SystemExit as ending:
        return int(ending.code)
    return 0


@pytest.fixture
def build(scores, tmp_path, capsys):
    """Build the set of a plan with the verb; return it and what was printed."""

    def run(plan, *words):
        plan.save(tmp_path / "plan.json")
        out = tmp_path / "strata.safetensors"
        folder = ("--scores-dir", str(scores[1])) if "--scores-dir" not in words else ()
        flags = ("--plan", str(tmp_path / "plan.json"), "--out", str(out), *folder, *words)
        code = call(*flags)
        output = capsys.readouterr()
        assert out.exists() == (code == 0)
        return (ProbeSet.load(out), output.out) if code == 0 else (code, output.err)

    return run


def test_each_stratum_is_a_dataset_of_its_held_out_documents(corpus, scores, build):
    plan = plan_of(scores)
    found, _ = build(plan, "--eod", str(EOD))
    assert found.datasets == ("left/0", "left/1", "left/2", "right/0")
    assert (found.seq_length, found.vocab_size) == (SEQ_LENGTH, VOCAB_SIZE)
    assert found.origin.plan == plan.fingerprint
    assert found.origin.prefixes == (corpus.prefixes[0],) * 3 + (corpus.prefixes[1],)
    expected, trained = [], []
    for dataset, (prefix, documents) in enumerate(
        zip(corpus.prefixes, plan.documents, strict=True)
    ):
        words = (plan, dataset, scores[0][dataset], documents, IndexedTokens.open(prefix).lengths)
        expected += held_out_documents(*words)
        trained += documents_of_strata(*words)
    assert [len(documents) for documents in expected] == [HELD_OUT] * 3 + [0, HELD_OUT]
    del expected[3], trained[3]
    for stratum, documents in enumerate(expected):
        watched = np.unique(found.document_N[found.dataset_N == stratum])
        assert watched.tolist() == documents.tolist()
        assert not {*watched.tolist()} & {*trained[stratum].tolist()}
    # Without --tokens below their number, every token of these documents is watched but the first.
    for row in range(found.n_sequences):
        prefix = found.origin.prefixes[found.dataset_BS[row, 0]]
        ids = IndexedTokens.open(prefix).sequence(int(found.document_BS[row, 0]))
        is_watched_S = found.mask_BS[row]
        label_S = ids[found.position_BS[row][is_watched_S]]
        assert label_S.tolist() == found.labels_BS[row][is_watched_S].tolist()
    lengths = [IndexedTokens.open(prefix).lengths for prefix in corpus.prefixes]
    of_dataset = [0, 0, 0, 1]
    wanted = [
        int((lengths[d][documents] - 2).sum())  # the first token has no context; the last is EOD
        for d, documents in zip(of_dataset, expected, strict=True)
    ]
    assert np.bincount(found.dataset_N).tolist() == wanted


def test_data_that_have_moved_are_found_by_the_data_flags(corpus, scores, build, tmp_path):
    plan = plan_of(scores)
    expected, _ = build(plan)
    (tmp_path / "strata.safetensors").unlink()
    (tmp_path / "moved").mkdir()
    moved = [str(tmp_path / "moved" / name) for name in ("left", "right")]
    for old, new in zip(corpus.prefixes, moved, strict=True):
        for kind in (".bin", ".idx"):
            shutil.copy(old + kind, new + kind)
    gone = tuple(replace(each, prefix=f"/gone/{each.name}") for each in plan.datasets)
    code, error = build(replace(plan, datasets=gone))
    assert (code, error.count("\n")) == (2, 1) and "/gone/left" in error
    found, _ = build(replace(plan, datasets=gone), "--data-path", *reversed(moved))
    assert found.fingerprint == expected.fingerprint
    assert found.origin.prefixes == (moved[0],) * 3 + (moved[1],)


def test_strata_share_the_tokens_equally(scores, build):
    found, output = build(plan_of(scores), "--tokens", "800")
    counts = np.bincount(found.dataset_N)
    assert ((counts >= 200) & (counts < 200 + SEQ_LENGTH)).all()
    assert f"from documents that plan {found.origin.plan} keeps out of the training" in output
    assert "TRAINED ON" not in output
    assert "  left/2: " in output


def test_the_set_of_a_stratum_does_not_depend_on_the_weights_of_the_plan(scores, build, tmp_path):
    one, _ = build(plan_of(scores))
    (tmp_path / "strata.safetensors").unlink()
    other, _ = build(plan_of(scores, stages=(Stage(0, (9.0, 1.0)),)))
    assert one.fingerprint == other.fingerprint
    assert one.origin.plan != other.origin.plan


def test_what_names_no_held_out_documents_gets_one_line(corpus, scores, build):
    plan, (left, right) = plan_of(scores), scores[0]
    none = tuple(replace(cut, held_out=0) for cut in plan.cuts)
    other = tuple(replace(cut, scores=left.fingerprint) for cut in plan.cuts)
    larger = replace(right.dataset, n_tokens=right.dataset.n_tokens + 1)
    cases = (
        (plan_of(scores, cuts=none), (), "keeps no documents out of the training; expected some"),
        (plan_of(scores, cuts=other), (), f"was made with scores {left.fingerprint} of right"),
        (plan_of(scores, datasets=(left.dataset, larger)), (), "for which the plan was made"),
        (plan, ("--scores-dir", "/nowhere"), "/nowhere/left.tokscale.safetensors"),
        (plan, ("--tokens", "3"), "3 tokens are too few for 4 strata"),
        (plan, ("--vocab-size", "100"), "the vocabulary ends at 99"),
        (plan, ("--data-path", corpus.prefixes[0]), "the plan is for other data: it has right"),
        (plan, ("--split", "1,0,0"), "--split does nothing beside --plan"),
        (plan, ("--part", "train"), "--part does nothing beside --plan"),
        (plan, ("--sequences", "9"), "--sequences does nothing beside --plan"),
        (plan, ("--drop-duplicates",), "--drop-duplicates does nothing beside --plan"),
        (plan, ("--seq-length", "32"), "--seq-length does nothing beside --plan"),
        (plan, ("--train-iters", "9"), "--train-iters is given without --budget"),
    )
    for given, words, reason in cases:
        code, error = build(given, *words)
        assert code == 2
        assert reason in error, error
        assert error.count("\n") == 1


def test_a_vocabulary_that_the_scores_do_not_name_has_to_be_given(corpus, scores, build, tmp_path):
    for one in scores[0]:
        nameless = replace(one, details=ScoreDetails())
        nameless.save(tmp_path / f"{one.dataset.name}.tokscale.safetensors")
    words = ("--scores-dir", str(tmp_path))
    code, error = build(plan_of(scores), *words)
    assert (code, error.count("\n")) == (2, 1)
    assert "give --vocab-size" in error
    found, _ = build(plan_of(scores), *words, "--vocab-size", str(VOCAB_SIZE))
    assert found.vocab_size == VOCAB_SIZE


def test_a_set_of_a_part_needs_the_length_and_the_vocabulary(corpus, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out.safetensors"), "--data-path", *corpus.data_path)
    for words, flag in (
        (("--vocab-size", "255"), "--seq-length"),
        (("--seq-length", "32"), "--vocab-size"),
    ):
        assert call(*out, *words) == 2
        assert f"{flag} is missing; expected the job's; give it, or" in capsys.readouterr().err
    both = ("--vocab-size", "255", "--seq-length", "32", "--scores-dir", "x")
    assert call(*out, *both) == 2
    assert "--scores-dir does nothing without --plan" in capsys.readouterr().err

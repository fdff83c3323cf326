"""From a reference run to scores of unseen documents, by the commands of docs/guides/plan.md."""

import re

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus, run_job

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.scores import DocumentScores, scores_path
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run
from megatron_tokscale.trace.trace import Trace

pytestmark = pytest.mark.megatron

SPLIT = ["--split", "900,100,0"]
CHECKPOINTS = ("--ckpt-format", "torch_dist", "--save-interval", "6")
STEPS = 24


@pytest.fixture(scope="module")
def loop(corpus: Corpus, tmp_path_factory):
    """A reference, a probe set that it has not seen, both replayed; and the reference tuned."""
    folder = tmp_path_factory.mktemp("loop")
    data = ["--data-path", *corpus.data_path, *SPLIT]
    reference, tuned = str(folder / "reference"), str(folder / "tuned")
    watched = ("--tokscale-probe-set", str(corpus.probe_set))
    length = ("--train-iters", str(STEPS), *CHECKPOINTS)
    run_job(corpus, 1, *length, "--save", reference, *watched)

    sizes = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    build = ["probe", "build", *data, *sizes, "--part", "train", "--unseen-by", reference]
    unseen = str(folder / "unseen.safetensors")
    main([*build, "--tokens", "6000", "--out", unseen])

    # Tune on the text of one dataset alone.
    of_target = ("--finetune", "--train-iters", "6", "--lr", "1e-3", *CHECKPOINTS)
    run_job(
        corpus,
        1,
        *of_target,
        "--load",
        reference,
        "--save",
        tuned,
        *data[:1],
        "1",
        corpus.prefixes[1],
    )
    for name in ("reference", "tuned"):
        replayed = ("--tokscale-replay", str(folder / name), "--tokscale-probe-set", unseen)
        out = ("--tokscale-dir", str(folder / f"{name}-scores"))
        run_job(corpus, 1, "--ckpt-format", "torch_dist", *replayed, *out)
    return folder, data


def test_the_probe_set_holds_no_document_that_a_sample_has_read(loop, corpus):
    folder, _ = loop
    probe_set = ProbeSet.load(folder / "unseen.safetensors")
    assert probe_set.origin.unseen_by == Run.open(folder / "reference").info.run_id
    watched = set(zip(probe_set.dataset_N.tolist(), probe_set.document_N.tolist(), strict=True))
    assert len(watched) > 100
    trace = Trace.open(folder / "reference")
    names = ["left", "right"]
    for k in range(8 * STEPS):
        sample = trace.sample(k)
        for piece in sample.pieces:
            assert (names.index(sample.dataset.name), piece.document) not in watched


def test_falls_and_target_scores_come_from_replays_of_both(loop, corpus, capsys):
    folder, data = loop
    replayed = folder / "reference-scores"
    assert Run.open(replayed).step_K.tolist() == [6, 12, 18, 24]
    capsys.readouterr()
    main(
        [
            "score",
            str(replayed),
            *data,
            "--tuned",
            str(folder / "tuned-scores"),
            "--out",
            str(folder / "scores"),
        ]
    )
    shown = capsys.readouterr()
    assert "fall: loss at step 6 (the probe nearest to a quarter, step 6) less loss at step 24" in (
        shown.out
    )
    assert "trained on" not in shown.err
    loss_NK = Run.open(replayed).read_losses()
    probe_set = ProbeSet.load(folder / "unseen.safetensors")
    means = []
    for dataset, prefix in enumerate(corpus.prefixes):
        scores = DocumentScores.load(folder / "scores" / scores_path(prefix).name)
        scores.check(IndexedTokens.open(prefix))
        train = np.arange(scores.n_documents) < 270
        np.testing.assert_array_equal(np.isfinite(scores.fall_Q), train)
        np.testing.assert_array_equal(np.isfinite(scores.target_Q), train)
        chosen = np.flatnonzero(scores.watched_Q)
        of_N = (probe_set.dataset_N == dataset) & np.isin(probe_set.document_N, chosen)
        found = scores.details.reliability["fall"].mean
        assert found == pytest.approx(float(np.mean(loss_NK[of_N, 0] - loss_NK[of_N, 3])), rel=1e-4)
        means.append(scores.details.reliability["target"].mean)
        assert scores.details.fall_tokens == (6 * 8 * SEQ_LENGTH, 24 * 8 * SEQ_LENGTH)
    assert means[1] > means[0]  # tuned on the second dataset


def test_training_documents_that_were_watched_from_the_start_are_told(loop, corpus, capsys):
    """Falls need no replay, but a training set of a run's own has documents that it has drawn."""
    folder, data = loop
    sizes = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    own = str(folder / "own.safetensors")
    main(["probe", "build", *data, *sizes, "--part", "train", "--tokens", "6000", "--out", own])
    schedule = ("--tokscale-probe-schedule", "list:6,24", "--tokscale-probe-set", own)
    run = str(folder / "own")
    run_job(corpus, 1, "--train-iters", str(STEPS), *schedule, "--tokscale-dir", run)
    capsys.readouterr()
    main(["score", run, *data, "--out", str(folder / "own-scores")])
    note = re.search(
        r"was trained on (\d+) of the (\d+) watched documents", capsys.readouterr().err
    )
    seen, watched = map(int, note.groups())
    assert 20 < seen < watched

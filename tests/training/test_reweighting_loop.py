"""From a reference run to a job under its plan, by the commands of docs/guides/plan.md."""

import json

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus, job_flags, run_forked

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import followed_plan
from megatron_tokscale.data.scores import DocumentScores, scores_path

pytestmark = pytest.mark.megatron

SPLIT = ["--split", "900,100,0"]
STEPS = 28


@pytest.fixture(scope="module")
def loop(corpus: Corpus, tmp_path_factory):
    """A reference run, scores, a plan, and a job under the plan."""
    folder = tmp_path_factory.mktemp("loop")
    data = ["--data-path", *corpus.data_path, *SPLIT]
    sizes = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    probe_set = str(folder / "train.safetensors")
    build = ["probe", "build", *data, *sizes, "--part", "train", "--tokens", "9000"]
    main([*build, "--out", probe_set])
    schedule = ["--tokscale-probe-schedule", "log:per-octave=4+last"]
    train(corpus, folder / "reference", "--tokscale-probe-set", probe_set, *schedule)
    main(["fit", str(folder / "reference")])
    main(["score", str(folder / "reference"), *data, "--out", str(folder)])
    plan = str(folder / "plan.json")
    build = ["plan", "build", "frontier", *data, *sizes[:2], "--train-samples", str(8 * STEPS)]
    main([*build, "--scores", str(folder), "--quantiles", "3", "--out", plan])
    under_plan = ["--tokscale-plan", plan, "--tokscale-scores-dir", str(folder)]
    train(corpus, folder / "planned", *under_plan, "--tokscale-probe-set", str(corpus.probe_set))
    return folder


def train(corpus, run, *flags):
    length = ["--train-iters", str(STEPS), "--log-interval", "10"]
    words = job_flags(corpus, *length, *flags, "--tokscale-dir", str(run))
    run_forked(1, "-m", "megatron_tokscale.pretrain", *words)


def test_every_training_document_has_a_score(loop, corpus):
    for prefix in corpus.prefixes:
        tokens = IndexedTokens.open(prefix)
        scores = DocumentScores.load(loop / scores_path(prefix).name)
        scores.check(tokens)
        n_train = round(0.9 * tokens.n_sequences)
        assert np.isfinite(scores.drop_Q[:n_train]).all()
        assert np.isnan(scores.drop_Q[n_train:]).all()
        assert 50 < (scores.watched_Q > 0).sum() < n_train


def test_the_job_follows_strata_of_both_datasets(loop):
    plan = followed_plan(loop / "planned")
    assert (
        plan.fingerprint
        == json.loads((loop / "planned/tokscale/data.json").read_text())["records"][-1]["order"][
            "fingerprint"
        ]
    )
    assert {stratum.name for stratum in plan.strata} >= {"left/q1", "left/q2", "right/q1"}
    assert len(plan.segments) > 1
    assert {segment.weights for segment in plan.segments} == {(0.5, 0.5)}


def test_a_sample_of_the_job_is_traced_to_its_documents_and_back(loop, capsys):
    main(["trace", str(loop / "planned"), "--sample", "7"])
    shown = capsys.readouterr().out
    name = "left" if "left" in shown else "right"
    from megatron_tokscale.trace.trace import Trace

    trace = Trace.open(loop / "planned")
    sample = trace.sample(7)
    assert sample.dataset.name == name
    document = sample.pieces[0].document
    assert 7 in trace.document(name, document)
    main(["trace", str(loop / "planned"), "--document", f"{name}:{document}"])
    assert "7" in capsys.readouterr().out


def test_the_report_shows_the_plan(loop):
    run = str(loop / "planned")
    main(["fit", run])
    main(["spectrum", run])
    main(["report", run])
    page = (loop / "planned/analysis/report.html").read_text()
    assert "Data plan" in page
    assert "q1" in page[page.index("Data plan") :]

"""Datasets of one base name, dir/*/text, work everywhere, and never stand in for each other."""

import re
from dataclasses import replace

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus, markov_documents, write_documents
from numpy.testing import assert_allclose, assert_array_equal
from recorded_job import run_recorded
from runs import probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Plan,
    RealisedShares,
    Stage,
    Stratum,
    match_datasets,
)
from megatron_tokscale.data.history import load_run_plan
from megatron_tokscale.data.record import DataRecord, DatasetRecord, check_order
from megatron_tokscale.data.scores import (
    DocumentScores,
    ScoreDetails,
    data_digest,
    identity_of,
    scores_file,
)
from megatron_tokscale.data.take_over import take_over
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.reweight.live import slopes
from megatron_tokscale.store import Run
from megatron_tokscale.trace.trace import Span, Trace

STEPS = probe_steps(20)
JOB = ["--seq-length", str(SEQ_LENGTH), "--split", "900,100,0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a/text can be learned, b/text is noise; alike/* are the same under names of their own."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(5).integers(0, EOD, (300, 100))
    contents = {"a": markov_documents(0), "b": [[*row, EOD] for row in noise.tolist()]}
    for name, documents in contents.items():
        for place in (f"{name}/text", f"valid/{name}/text", f"moved/{name}/text", f"alike/{name}"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            write_documents(folder / place, documents)
    return folder


def paths(folder, *names):
    return [str(folder / name) for name in names]


def build(out, *words):
    sizes = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    main(["probe", "build", *words, *sizes, "--out", str(out)])
    return ProbeSet.load(out)


def planted_run(path, probe_set):
    """Tokens of the first dataset fall early and far, of the second late and little."""
    late_N = probe_set.dataset_N == 1
    random = np.random.default_rng(0)
    x_K = np.log(np.maximum(STEPS, 0.1))
    midpoint_N = np.where(late_N, 8, 4) + random.uniform(-1, 1, late_N.size)
    curve_NK = expit((midpoint_N[:, None] - x_K) / 0.2)
    loss_NK = 0.5 + np.where(late_N, 1, 4)[:, None] * curve_NK
    return write_run(path, STEPS, loss_NK + random.normal(0, 0.03, loss_NK.shape), probe_set)


def scored(path, names):
    found = {name: DocumentScores.load(path / f"{name}.tokscale.safetensors") for name in names}
    assert {file.name for file in path.iterdir()} == {f"{n}.tokscale.safetensors" for n in names}
    return list(found.values())


@pytest.mark.slow
def test_scores_and_plans_of_namesakes_are_those_of_other_names(folder, tmp_path, capsys):
    """The same data, once under unique names; and the blend of `score` is not that of `plan`."""
    plans, runs = {}, {}
    for case, names in {"alike": ("alike/a", "alike/b"), "same": ("a/text", "b/text")}.items():
        prefixes = paths(folder, *names)
        sizes = ["--tokens", "8000", "--part", "train", *JOB[2:]]
        probe_set = build(tmp_path / f"{case}.st", "--data-path", *prefixes, *sizes)
        assert probe_set.datasets == (("a", "b") if case == "alike" else ("text#0", "text#1"))
        runs[case] = planted_run(tmp_path / case, probe_set)
        main(["fit", str(runs[case].path)])
        main(["spectrum", str(runs[case].path), "--resamples", "10"])
        out = tmp_path / f"{case}-scores"
        data = ["--data-path", *(prefixes if case == "alike" else prefixes[::-1]), *JOB[2:]]
        main(["score", str(runs[case].path), *data, "--out", str(out)])
        for policy, flags in {
            "frontier": ["--quantiles", "3", "--scores", str(out)],
            "dataset": ["--run", str(runs[case].path)],
        }.items():
            path = tmp_path / f"{case}-{policy}.json"
            words = ["--data-path", *prefixes, *JOB, "--train-samples", "300", "--out", str(path)]
            main(["plan", "build", policy, *words, *flags, "--max-epochs", "100"])
            plans[case, policy] = Plan.load(path)
    assert_array_equal(*(run.probe_set.labels_BS for run in runs.values()))

    alike = scored(tmp_path / "alike-scores", ("a", "b"))
    b, a = scored(tmp_path / "same-scores", ("text#0", "text#1"))
    for expected, found in zip(alike, (a, b), strict=True):
        assert_array_equal(found.learning_time_Q, expected.learning_time_Q)
        assert_array_equal(found.drop_Q, expected.drop_Q)
    assert np.nanmean(a.drop_Q) > 2 * np.nanmean(b.drop_Q)

    for policy in ("frontier", "dataset"):
        expected, found = plans["alike", policy], plans["same", policy]
        assert found.stages == expected.stages
        names = [stratum.name.partition("/")[0] for stratum in found.strata]
        assert names == [
            {"a": "text#0", "b": "text#1"}[stratum.name.partition("/")[0]]
            for stratum in expected.strata
        ]
        assert [row.prefix for row in found.datasets] == paths(folder, "a/text", "b/text")
    leading = plans["same", "dataset"].stages[0].weights
    assert leading[0] > leading[1]
    main(["report", str(runs["same"].path)])


def test_scores_in_a_folder_are_found_by_what_they_are_of(folder, tmp_path):
    """Two copies of the same data are told apart by their prefixes, or refused if they moved."""
    for n, name in enumerate(("a/text", "valid/a/text", "b/text")):
        tokens = IndexedTokens.open(str(folder / name))
        nothing = np.zeros(tokens.n_sequences, np.float32)
        scores = DocumentScores(
            surprisal_Q=nothing,
            watched_Q=np.zeros(tokens.n_sequences, np.int32),
            dataset=identity_of(tokens),
            digest=data_digest(tokens),
            details=ScoreDetails(prefix=str(folder / name)),
            fall_Q=nothing,
        )
        scores.save(tmp_path / f"text#{n}.tokscale.safetensors")
    found = [
        scores_file(IndexedTokens.open(str(folder / name)), tmp_path).name
        for name in ("b/text", "a/text", "valid/a/text", "moved/b/text")
    ]
    assert [name[:6] for name in found] == ["text#2", "text#0", "text#1", "text#2"]
    with pytest.raises(TokscaleError, match=r"several files of scores of .*moved/a/text"):
        scores_file(IndexedTokens.open(str(folder / "moved/a/text")), tmp_path)


def plan_of(*prefixes, **changes):
    datasets = tuple(identity_of(IndexedTokens.open(prefix)) for prefix in prefixes)
    fields = {
        "datasets": datasets,
        "strata": tuple(Stratum(f"text#{d}", d) for d in range(len(datasets))),
        "stages": (Stage(0, (1.0,) * len(datasets)),),
        "seq_length": SEQ_LENGTH,
        "seed": 5,
    }
    return Plan(**fields | changes)


def test_live_weights_go_by_prefix_not_by_number(folder, tmp_path):
    """A probe set of the valid list has its own order, and other prefixes."""
    plan = plan_of(*paths(folder, "a/text", "b/text"))
    steps = np.array([0, 50, 60, 70, 80, 90, 100])
    for case, (names, expected) in {
        "the same": (("a/text", "b/text"), [0.5, 2.0]),
        "the other order": (("b/text", "a/text"), [2.0, 0.5]),
        "the valid list": (("valid/b/text", "valid/a/text"), [2.0, 0.5]),
    }.items():
        words = ["--valid-data-path", *paths(folder, *names), "--tokens", "400"]
        probe_set = build(tmp_path / f"{case}.st", *words)
        slope_N = np.where(probe_set.dataset_N == 1, 2.0, 0.5)
        loss_NK = 20 - slope_N[:, None] * np.log(np.maximum(steps, 1))
        run = write_run(tmp_path / case, steps, loss_NK, probe_set)
        assert_allclose(slopes(run, plan, 100), expected, rtol=1e-4)
    words = ["--valid-data-path", *paths(folder, "b/text"), "--tokens", "400"]
    only = build(tmp_path / "only.st", *words)
    run = write_run(tmp_path / "only", steps, np.ones((only.n_tokens, steps.size)), only)
    with pytest.raises(TokscaleError, match="watches no tokens of text#0"):
        slopes(run, plan, 100)
    unknown = replace(only, origin=None)
    run = write_run(tmp_path / "unknown", steps, np.ones((only.n_tokens, steps.size)), unknown)
    with pytest.raises(TokscaleError, match="cannot be told from its namesakes"):
        slopes(run, plan, 100)


def test_twins_of_a_plan_are_found_by_their_prefixes():
    """Namesakes of one size: only the prefix tells them, whatever the order of the job."""

    def of(*prefixes):
        return [DatasetIdentity("text", 10, 1000, prefix) for prefix in prefixes]

    def match(planned, found):
        strata = tuple(Stratum(str(d), d) for d in range(len(planned)))
        stages = (Stage(0, (1.0,) * len(planned)),)
        return match_datasets(Plan(tuple(planned), strata, stages, 8, 1), found, 8)

    a, b = of("/x/a/text", "/x/b/text")
    assert match([a, b], [b, a]) == [1, 0]
    assert match([a, b], of("/y/b/text", "/y/a/text")) == [1, 0]
    assert match([a], [a, a]) == [0]  # twice in the blend
    assert match(of("", ""), [b, a]) == [0, 1]  # a plan that does not know its prefixes
    with pytest.raises(TokscaleError, match="cannot be told"):
        match([a, b], of("/y/c/text", "/y/d/text"))
    with pytest.raises(TokscaleError, match="it has text"):
        match([a, b], [b])


def test_a_plan_is_the_same_wherever_its_data_lie(folder, tmp_path):
    plan = plan_of(*paths(folder, "a/text", "b/text"))
    moved = plan_of(*paths(folder, "moved/a/text", "moved/b/text"))
    assert (plan, plan.fingerprint) == (moved, moved.fingerprint)
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json").datasets
    assert [row.prefix for row in found] == paths(folder, "a/text", "b/text")


def test_a_message_about_many_datasets_is_short(tmp_path, capsys):
    prefixes = []
    for n in range(40):
        (tmp_path / f"part-{n:03d}").mkdir()
        prefixes.append(write_documents(tmp_path / f"part-{n:03d}" / "text", [[1, 2, 3]] * 4))
    with pytest.raises(SystemExit):
        build(tmp_path / "probe.st", "--data-path", *prefixes)
    words = " ".join(capsys.readouterr().err.split())
    assert "40 of 40 datasets have no document in the valid part of --split 969, 30, 1" in words
    assert "and 36 more" in words and len(words) < 1000


@pytest.fixture(scope="module")
def job(folder, tmp_path_factory):
    """A job on the namesakes whose probe set watches those of the valid list, in another order."""
    out = tmp_path_factory.mktemp("job")
    valid = ["--valid-data-path", *paths(folder, "valid/b/text", "valid/a/text")]
    train = ["--train-data-path", *paths(folder, "a/text", "b/text")]
    build(out / "probe.st", *valid, "--tokens", "600")
    words = [*train, *JOB[:2], "--train-samples", "160"]
    plan = ["--weights", "0:0.5,0.5", "--max-epochs", "50", "--out", str(out / "plan.json")]
    main(["plan", "build", "manual", *words, *plan])
    corpus = Corpus(("left", "right"), out / "probe.st")
    flags = [
        *("--train-iters", "20", "--save-interval", "20", "--lr", "1e-2"),
        *("--tokscale-replan-interval", "6", "--tokscale-plan", str(out / "plan.json")),
        *("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1"),
        *("--save", str(out / "run")),
    ]
    data = [*train, *valid]
    return out, run_recorded(corpus, out / "seen", 1, *flags, without=("--split",), data=data)


@pytest.mark.megatron
def test_a_job_on_namesakes_learns_from_the_right_one(job, folder):
    out, output = job
    run = Run.open(out / "run")
    assert run.probe_set.datasets == ("text#0", "text#1")
    plan, decisions = load_run_plan(out / "run")
    assert [row.prefix for row in plan.datasets] == paths(folder, "a/text", "b/text")

    # In the probe set a/text is the second; it is learned, the other is noise.
    loss_DK = np.stack(
        [run.read_losses()[run.probe_set.dataset_N == d].mean(axis=0) for d in (1, 0)]
    )
    assert loss_DK[0, 0] - loss_DK[0, -1] > 2 * (loss_DK[1, 0] - loss_DK[1, -1])
    assert decisions and all(row.weights[0] > 0.6 for row in decisions)
    # The log numbers the datasets as the training list does, for the probe as for the plan.
    means = re.findall(r"probe loss/text#0: (\S+)", output)
    assert_allclose([float(mean) for mean in means], loss_DK[0][: len(means)], rtol=1e-4)
    trace = Trace.open(out / "run")
    tokens = {name: IndexedTokens.open(str(folder / name)) for name in ("a/text", "b/text")}
    seen = {trace.sample(k).name: trace.sample(k) for k in range(40)}
    assert set(seen) == {"text#0", "text#1"}
    for name, prefix in {"text#0": "a/text", "text#1": "b/text"}.items():
        assert seen[name].dataset.prefix == tokens[prefix].prefix
        assert_array_equal(
            trace.document(name, seen[name].pieces[0].document),
            trace.document(str(folder / prefix), seen[name].pieces[0].document),
        )
    with pytest.raises(TokscaleError, match=r"2 datasets that are named text.*text#0 \(.*text#1"):
        trace.document("text", 0)


def test_a_plan_that_numbers_the_namesakes_of_a_run_anew_is_refused(folder):
    a, b, c = paths(folder, "a/text", "b/text", "alike/a")
    past = plan_of(a, b)
    assert take_over(past, plan_of(a, b, c), 5).datasets[:2] == past.datasets
    with pytest.raises(TokscaleError, match=r"b/text text#0, the run's past text#1; .*last"):
        take_over(past, plan_of(b, a), 5)


def test_metrics_of_a_plan_tell_namesakes_apart(folder):
    from megatron_tokscale.training.data.plan_monitor import named_shares

    rows = [(d, q, share) for d in (0, 1) for q, share in (("q1", 0.25), ("q2", 0.75))]
    strata = tuple(Stratum(f"text#{d}/{q}", d, share) for d, q, share in rows)
    cuts = (Cut("scores"),) * 2
    plan = plan_of(*paths(folder, "a/text", "b/text"), strata=strata, cuts=cuts)
    named = named_shares(RealisedShares(plan, 100, np.array([10, 20, 30, 40]), np.full(4, 50)))
    assert named["drawn share text#0"] == pytest.approx(0.3)
    assert named["drawn share text#1"] == pytest.approx(0.7)
    assert named["epochs text#1"] == pytest.approx(0.7)


def test_a_number_that_means_two_datasets_in_one_run_is_refused():
    """A run resumed with other data has numbered its namesakes anew."""

    def span(start, *names):
        rows = [DatasetRecord("text", f"/x/{n}/text", None, None, None, 1, 5, "") for n in names]
        return Span(DataRecord(tuple(rows), start=start), None, start + 10)

    trace = Trace((span(0, "a", "b"), span(10, "b", "a", "c")))
    assert trace.prefix("text#2") == trace.prefix("/x/c/text") == "/x/c/text"
    for name in ("text", "text#0", "text#1"):
        with pytest.raises(TokscaleError, match=f"datasets that are named {name}; give the prefix"):
            trace.prefix(name)


def test_a_record_is_held_against_the_dataset_itself(tmp_path):
    rows = [
        DatasetRecord("text", f"/x/{name}/text", None, None, None, 1, 5, "", order)
        for name, order in (("a", "--seed 1"), ("b", "--seed 2"))
    ]
    DataRecord(tuple(rows)).save(tmp_path / "data.json")
    check_order(tmp_path / "data.json", rows[::-1])
    with pytest.raises(TokscaleError, match="samples of text"):
        check_order(tmp_path / "data.json", [replace(rows[0], order="--seed 2")])

"""Every verb on a small run made by hand, and what each says to bad input."""

import json

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus
from runs import log_time, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Plan
from megatron_tokscale.data.history import Decision, save_run_plan
from megatron_tokscale.data.scores import (
    DocumentScores,
    data_digest,
    identity_of,
    scores_path,
)
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.losses import losses_name


@pytest.fixture
def run(corpus: Corpus, tmp_path):
    """A run whose tokens follow planted sigmoids."""
    probe_set = ProbeSet.load(corpus.probe_set)
    generator = np.random.default_rng(0)
    n = probe_set.n_tokens
    midpoint_N, drop_N = generator.uniform(1, 6, n), generator.uniform(1, 4, n)
    steps = np.array([0, *sorted({round(2 ** (i / 4)) for i in range(41)})])
    curve_NK = expit((midpoint_N[:, None] - log_time(steps)) / 0.2)
    loss_NK = 0.5 + drop_N[:, None] * curve_NK + generator.normal(0, 0.05, (n, len(steps)))
    return write_run(tmp_path / "run", steps, loss_NK, probe_set).path


def data_flags(corpus):
    flags = ["--split", "900,100,0", "--seq-length", str(SEQ_LENGTH)]
    return ["--data-path", *corpus.data_path, *flags]


def test_the_whole_loop_by_verbs(run, corpus, tmp_path, capsys):
    main(["fit", str(run)])
    assert "falling" in capsys.readouterr().out
    main(["spectrum", str(run)])
    assert "full: every token's own transition" in capsys.readouterr().out
    main(["laws", str(run)])
    capsys.readouterr()
    plan = tmp_path / "plan.json"
    main(
        [
            *("plan", "build", *data_flags(corpus), "--train-samples", "2000"),
            *("--policy", "dataset", "--run", str(run), "--out", str(plan), "--max-epochs", "1000"),
        ]
    )
    built = capsys.readouterr().out
    main(["plan", "show", str(plan)])
    assert capsys.readouterr().out == built
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "analysis/report.html")
    classes = json.loads((run / "analysis/fit.json").read_text())["classes"]
    assert classes["falling"]["share"] > 0.9
    recovered = json.loads((run / "analysis/reconstruction.json").read_text())
    assert recovered["same_tokens"]["full"]["value"] > 0.99


def test_probe_build_and_show_print_the_same(corpus, tmp_path, capsys):
    out = tmp_path / "probe.safetensors"
    flags = ["--vocab-size", str(VOCAB_SIZE), "--tokens", "300", "--eod", str(EOD)]
    main(["probe", "build", *data_flags(corpus), *flags, "--out", str(out)])
    built = capsys.readouterr().out
    main(["probe", "show", str(out)])
    assert capsys.readouterr().out == built
    assert "left: " in built


def test_probe_build_takes_per_split_data(corpus, tmp_path, capsys):
    left, right = corpus.prefixes
    out = tmp_path / "probe.safetensors"
    flags = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    data = ["--train-data-path", "1", left, "1", right, "--valid-data-path", right]
    main(
        [
            *("probe", "build", *data, *flags, "--sequences", "9", "--report-duplicates"),
            *("--out", str(out)),
        ]
    )
    captured = capsys.readouterr()
    assert "from the valid part of per-split data" in captured.out
    assert "9 of 9 windows" in captured.out  # what is held out here is trained on as well
    assert "duplicate passages" in captured.err
    assert ProbeSet.load(out).datasets == ("right",)


def test_a_budget_decides_the_size_of_a_probe_set(corpus, tmp_path, capsys):
    out = tmp_path / "probe.safetensors"
    flags = ["--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD), "--out", str(out)]
    job = [
        "--global-batch-size",
        "8",
        "--train-iters",
        "1000",
        "--tokscale-probe-schedule",
        "linear:100+last",
    ]
    main(["probe", "build", *data_flags(corpus), *flags, *job, "--budget", "0.01"])
    # 11 probes of n sequences against 3 x 8000 samples: n = 240 / 11
    assert ProbeSet.load(out).n_sequences == 21
    assert "budget: 11 probes of 21 sequences, 0.963% of the training" in capsys.readouterr().out
    model = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
    sizes = ["--vocab-size", str(VOCAB_SIZE), "--seq-length", str(SEQ_LENGTH)]
    main(["probe", "cost", "--probe-set", str(out), *model, *sizes, *job])
    printed = capsys.readouterr().out
    assert "probes: 11, at steps 0, 100, 200, 300, ..., 900, 1,000" in printed
    assert "0.963% of the training" in printed


def test_a_plan_by_hand(corpus, tmp_path, capsys):
    flags = ["--train-samples", "300", "--policy", "manual", "--out", str(tmp_path / "plan.json")]
    main(["plan", "build", *data_flags(corpus), *flags, "--weights", "0:1,1", "100:9,1"])
    assert "90.00%" in capsys.readouterr().out


@pytest.fixture
def scores(corpus, tmp_path):
    """A folder with scores of both datasets: the later in the file, the later learned."""
    folder = tmp_path / "scores"
    folder.mkdir()
    for prefix in corpus.prefixes:
        tokens = IndexedTokens.open(prefix)
        n = tokens.n_sequences
        DocumentScores(
            learning_time_Q=np.linspace(9, 13, n).astype(np.float32),
            **{f"{key}_Q": np.ones(n, np.float32) for key in ("spread", "drop", "surprisal")},
            unlearned_Q=np.zeros(n, np.float32),
            watched_Q=np.zeros(n, np.int32),
            dataset=identity_of(tokens),
            digest=data_digest(tokens),
            details={"run_id": "reference", "clock_range": [8.0, 14.0]},
        ).save(folder / scores_path(prefix).name)
    return folder


CONTROLS = ("uniform", "easy-first", "frequency")


def plan_flags(corpus, out, *flags):
    job = ["--train-samples", "2000", "--max-epochs", "1000", "--out", str(out)]
    return ["plan", "build", *data_flags(corpus), *job, *flags]


def test_a_plan_by_scores_and_its_controls_by_one_flag(corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    main(plan_flags(corpus, path, "--scores", str(scores), "--quantiles", "3"))
    built = capsys.readouterr().out
    assert "policy frontier; 2,000 samples of 32 tokens" in built
    assert "left/q3" in built
    main(["plan", "show", str(path)])
    assert capsys.readouterr().out == built
    plan = Plan.load(path)
    others = {}
    for control in CONTROLS:
        out = tmp_path / f"{control}.json"
        where = [] if control == "uniform" else ["--scores", str(scores), "--quantiles", "3"]
        main(plan_flags(corpus, out, *where, "--control", control))
        others[control] = Plan.load(out)
        assert (f"control {control}" in capsys.readouterr().out) == (control != "uniform")
    assert others["uniform"].n_strata == 2
    assert others["frequency"].stages == plan.stages
    assert others["easy-first"].stages != plan.stages
    assert len({each.fingerprint for each in (plan, *others.values())}) == 4


def test_controls_of_weights_by_dataset(run, corpus, tmp_path, capsys):
    main(["fit", str(run)])
    main(["spectrum", str(run), "--resamples", "2"])
    main(plan_flags(corpus, tmp_path / "d.json", "--policy", "dataset", "--run", str(run)))
    assert "policy dataset;" in capsys.readouterr().out
    main(plan_flags(corpus, tmp_path / "u.json", "--policy", "dataset", "--control", "uniform"))
    assert len(Plan.load(tmp_path / "u.json").segments) == 1


def test_a_clock_run_changes_the_time_of_a_plan(run, corpus, scores, tmp_path):
    main(["fit", str(run)])
    main(["spectrum", str(run), "--resamples", "2"])
    plans = []
    for flags in ([], ["--time-map", str(run)]):
        out = tmp_path / f"{len(flags)}.json"
        main(plan_flags(corpus, out, "--scores", str(scores), *flags))
        plans.append(Plan.load(out))
    assert plans[0].strata == plans[1].strata
    assert plans[0].stages != plans[1].stages
    assert plans[1].provenance["clock"] == str(run)


def test_show_draws_what_a_run_follows(run, corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    main(plan_flags(corpus, path, "--scores", str(scores)))
    save_run_plan(Plan.load(path), [Decision(10, 1000, (1.0, 3.0))], run)
    capsys.readouterr()
    main(["plan", "show", str(run)])
    assert "1 decided while the job trained (*)" in capsys.readouterr().out


def few_probes(run, corpus):
    for step in range(4, 2000):
        (run / "tokscale/losses" / losses_name(step)).unlink(missing_ok=True)
    return ["fit", str(run)]


def truncated_losses(run, corpus):
    path = run / "tokscale/losses" / losses_name(16)
    path.write_bytes(path.read_bytes()[:-1])
    return ["fit", str(run)]


def damaged_losses(run, corpus):
    path = run / "tokscale/losses" / losses_name(16)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    return ["fit", str(run)]


def no_run(run, corpus):
    return ["fit", str(run / "elsewhere")]


def no_fit(run, corpus):
    return ["spectrum", str(run)]


def no_analysis(run, corpus):
    return ["report", str(run)]


def out_exists(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(corpus.probe_set)]
    return ["probe", "build", *data_flags(corpus), *flags]


def two_ways_to_the_data(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    data = [*data_flags(corpus), "--valid-data-path", corpus.prefixes[0]]
    return ["probe", "build", *data, *flags]


def split_of_per_split_data(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    data = ["--valid-data-path", corpus.prefixes[0], "--split", "9,1", "--seq-length", "8"]
    return ["probe", "build", *data, *flags]


def budget_of_no_job(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    return ["probe", "build", *data_flags(corpus), *flags, "--budget", "0.01"]


def plan_of_another_length(run, corpus):
    model = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
    sizes = ["--vocab-size", str(VOCAB_SIZE), "--seq-length", "77"]
    job = ["--global-batch-size", "8", "--train-iters", "1000"]
    return ["probe", "cost", "--probe-set", str(corpus.probe_set), *model, *sizes, *job]


def plan_without_scores(run, corpus):
    return plan_flags(corpus, run / "plan.json")


def plan_without_run(run, corpus):
    return plan_flags(corpus, run / "plan.json", "--policy", "dataset")


def run_of_no_policy(run, corpus):
    return plan_flags(corpus, run / "plan.json", "--run", str(run))


def control_that_the_policy_lacks(run, corpus):
    flags = ["--policy", "dataset", "--run", str(run), "--control", "easy-first"]
    return plan_flags(corpus, run / "plan.json", *flags)


def control_of_a_plan_by_hand(run, corpus):
    flags = ["--policy", "manual", "--weights", "0:1,1", "--control", "uniform"]
    return plan_flags(corpus, run / "plan.json", *flags)


def plan_by_no_hand(run, corpus):
    return plan_flags(corpus, run / "plan.json", "--policy", "manual")


def schedule_of_no_policy(run, corpus):
    return plan_flags(corpus, run / "plan.json", "--weights", "0:1,1")


def plan_of_nothing(run, corpus):
    flags = ["--policy", "manual", "--weights", "0:1,1", "100:0,0"]
    return plan_flags(corpus, run / "plan.json", *flags)


def plan_of_too_many_epochs(run, corpus):
    flags = ["--control", "uniform", "--max-epochs", "0.5"]
    return plan_flags(corpus, run / "plan.json", *flags)


def unreadable_schedule(run, corpus):
    flags = ["--policy", "manual", "--weights", "0:a,b", "--out", str(run / "plan.json")]
    return ["plan", "build", *data_flags(corpus), "--train-samples", "300", *flags]


def flag_that_the_verb_lacks(run, corpus):
    return [*plan_flags(corpus, run / "plan.json"), "--bogus", "3"]


def folder_for_a_probe_set(run, corpus):
    return ["probe", "show", str(run)]


def run_without_a_plan(run, corpus):
    return ["plan", "show", str(run)]


def trace_of_a_run_without_a_record(run, corpus):
    return ["trace", str(run), "--sample", "0"]


BAD_INPUT = {
    few_probes: "at least 5",
    truncated_losses: "truncated",
    damaged_losses: "checksum",
    no_run: "no run in",
    no_fit: "megatron-tokscale fit",
    no_analysis: "megatron-tokscale fit",
    out_exists: "choose another name",
    two_ways_to_the_data: "in one way",
    split_of_per_split_data: "--split",
    budget_of_no_job: "--global-batch-size",
    plan_of_another_length: "not of --seq-length 77",
    plan_without_scores: "score the data with `megatron-tokscale score`, or plan with --policy dat",
    plan_without_run: "needs a reference run with its spectrum (--run)",
    run_of_no_policy: "--run is for --policy dataset",
    control_that_the_policy_lacks: "its only control is uniform",
    control_of_a_plan_by_hand: "has no controls",
    plan_by_no_hand: "needs --weights",
    schedule_of_no_policy: "--weights is for --policy manual",
    plan_of_nothing: "not all 0",
    plan_of_too_many_epochs: "would be gone through",
    unreadable_schedule: "cannot read '0:a,b'",
    flag_that_the_verb_lacks: "--bogus 3; `megatron-tokscale plan build --help` says what it takes",
    folder_for_a_probe_set: "it is a directory; name a file",
    run_without_a_plan: "follows no plan",
    trace_of_a_run_without_a_record: "a replay trains nothing",
}


@pytest.mark.parametrize("spoil", BAD_INPUT, ids=lambda spoil: spoil.__name__)
def test_bad_input_gets_one_line_and_writes_nothing(run, corpus, capsys, spoil):
    command = spoil(run, corpus)
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(command)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("megatron-tokscale: ")
    assert error.count("\n") == 1
    assert BAD_INPUT[spoil] in error
    assert sorted(run.rglob("*")) == before

"""`plan`: each policy, its controls, and what a run follows."""

import json
from fnmatch import fnmatch

import pytest
from verb_world import build_plan

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Decision, Plan
from megatron_tokscale.data.history import save_run_plan

CONTROLS = ("uniform", "permuted", "easy-first", "frequency")


def test_manual_weights_are_planned(corpus, tmp_path, capsys):
    weights = ["--weights", "0:1,1", "100:9,1"]
    main(build_plan("manual", corpus, tmp_path / "plan.json", *weights))
    assert "90.00%" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["fall", "target", "frontier"])
def test_one_flag_makes_each_control_of_a_plan_by_scores(policy, corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    where = ["--scores", str(scores), "--quantiles", "3"]
    main(build_plan(policy, corpus, path, *where))
    built = capsys.readouterr().out
    assert f"policy {policy}; 2,000 samples of 32 tokens" in built
    assert "left/q3" in built
    main(["plan", "show", str(path)])
    assert capsys.readouterr().out == built
    plan = Plan.load(path)
    others = {}
    for control in CONTROLS:
        out = tmp_path / f"{control}.json"
        main(build_plan(policy, corpus, out, *where, "--control", control))
        others[control] = Plan.load(out)
        assert f"control {control}" in capsys.readouterr().out
    assert others["uniform"].strata == others["permuted"].strata == plan.strata
    assert len(others["uniform"].segments) == 1
    assert {cut.order for cut in others["frequency"].cuts} == {"frequency"}
    assert {cut.order for cut in others["easy-first"].cuts} == {"learning-time"}
    assert others["easy-first"].stages != plan.stages
    assert len({each.fingerprint for each in (plan, *others.values())}) == 5


def test_a_plan_by_falls_says_what_it_can_gain(corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    size = ["--parameters", "1000000", "--seed-sd", "3"]
    main(build_plan("fall", corpus, path, "--scores", str(scores), "--quantiles", "3", *size))
    built = capsys.readouterr().out
    # A uniform fall from 0.1 to 0.5 has the variance 0.4² / 12 about its mean 0.3.
    assert "CV² 0.148, free of noise" in built
    assert "gain                at most " in built
    assert "of a training of 1,000,000 parameters" in built
    assert "sd of 3 points between seeds" in built
    assert json.loads(path.read_text())["provenance"]["settings"]["gain"]["spread"] > 0.1
    small = ["--parameters", "10", "--scores", str(scores)]
    main(build_plan("fall", corpus, tmp_path / "small.json", *small))
    assert "advice: do not train this plan:\n  it can gain" in capsys.readouterr().out


def test_a_plan_that_keeps_documents_out_says_how_to_watch_them(corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["--scores", str(scores), "--quantiles", "3", "--held-out", "4"]
    main(build_plan("fall", corpus, path, *flags))
    said, note = capsys.readouterr()
    assert note == ""
    assert "It keeps 24 of 540 documents out of the training" in said
    assert f"probe build --plan {path} --scores-dir {scores} --out strata.safetensors" in said
    assert "--tokscale-replan-interval" in said
    assert [cut.held_out for cut in Plan.load(path).cuts] == [4, 4]


@pytest.mark.parametrize(("held_out", "share"), [("10", "1?%"), ("90", "50%")])
def test_a_plan_that_keeps_much_of_a_stratum_out_is_told(
    held_out, share, corpus, scores, tmp_path, capsys
):
    """A stratum has some 90 documents; it keeps out half of them at most."""
    flags = ["--scores", str(scores), "--quantiles", "3", "--held-out", held_out]
    main(build_plan("fall", corpus, tmp_path / "plan.json", *flags))
    note = capsys.readouterr().err
    assert fnmatch(note, f"*--held-out keeps up to {share} of a stratum's documents out *\n")
    assert note.count("\n") == 1 and "expected 10% at most; give a lower one" in note


def test_strata_of_documents_serve_every_policy(corpus, scores, tmp_path):
    where = ["--scores", str(scores), "--quantiles", "3"]
    strata = ["--strata", "documents", "--by", "fall"]
    main(build_plan("frontier", corpus, tmp_path / "a.json", *where, *strata))
    main(build_plan("fall", corpus, tmp_path / "b.json", *where))
    frontier, fall = (Plan.load(tmp_path / f"{name}.json") for name in "ab")
    assert (frontier.strata, frontier.cuts) == (fall.strata, fall.cuts)


@pytest.mark.parametrize(
    ("policy", "flags", "sentence"),
    [
        ("frontier", ["--by", "fall"], "samples are ranked by fall; expected samples ranked by"),
        ("frontier", ["--held-out", "3"], "samples are held out; expected samples ranked by"),
        ("fall", ["--share-limit", "0.5"], "the limit on shares is 0.5; expected a finite factor"),
        (
            "target",
            ["--held-out", "4"],
            "--held-out 4; see `megatron-tokscale plan build target",
        ),
        ("target", ["--top", "2"], "the share that is drawn from is 2; expected"),
    ],
)
def test_flags_out_of_range_are_one_line(policy, flags, sentence, corpus, scores, tmp_path, capsys):
    out = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as exit_:
        main(build_plan(policy, corpus, out, "--scores", str(scores), *flags))
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert sentence in line and line.count("\n") == 1
    assert not out.exists()


def test_the_uniform_control_of_weights_by_dataset_has_one_segment(run, corpus, tmp_path, capsys):
    main(["fit", str(run)])
    main(["spectrum", str(run), "--resamples", "2"])
    main(build_plan("dataset", corpus, tmp_path / "d.json", "--run", str(run)))
    assert "policy dataset;" in capsys.readouterr().out
    control = ["--run", str(run), "--control", "uniform"]
    main(build_plan("dataset", corpus, tmp_path / "u.json", *control))
    assert len(Plan.load(tmp_path / "u.json").segments) == 1


def test_a_time_map_changes_the_stages_of_a_plan(run, corpus, scores, tmp_path):
    main(["fit", str(run)])
    main(["spectrum", str(run), "--resamples", "2"])
    plans = []
    for flags in ([], ["--time-map", str(run)]):
        out = tmp_path / f"{len(flags)}.json"
        main(build_plan("frontier", corpus, out, "--scores", str(scores), *flags))
        plans.append(Plan.load(out))
    assert plans[0].strata == plans[1].strata
    assert plans[0].stages != plans[1].stages
    assert plans[1].provenance.sources.time_map == str(run)


def test_show_draws_what_a_run_follows(run, corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    main(build_plan("frontier", corpus, path, "--scores", str(scores)))
    save_run_plan(Plan.load(path), [Decision(10, 1000, (1.0, 3.0))], run)
    capsys.readouterr()
    main(["plan", "show", str(run)])
    assert "1 decided while the job trained (*)" in capsys.readouterr().out


POLICIES = {
    "fall": [],
    "target": [],
    "frontier": ["--control", "uniform"],
    "dataset": ["--run", "no-run"],
    "manual": ["--weights", "0:1,1"],
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["", "plan.json/plan.json"])
def test_a_path_in_use_is_refused_before_any_data_are_read(
    corpus, tmp_path, capsys, monkeypatch, policy, place
):
    def refuse(prefix):
        raise AssertionError(f"{prefix} was read")

    monkeypatch.setattr(IndexedTokens, "open", refuse)
    path = tmp_path / "plan.json"
    path.write_text("the plan of a job")
    with pytest.raises(SystemExit) as exit_:
        main(build_plan(policy, corpus, tmp_path / (place or "plan.json"), *POLICIES[policy]))
    line = capsys.readouterr().err
    assert exit_.value.code == 2
    assert line.count("\n") == 1
    assert f"{path}" in line
    assert path.read_text() == "the plan of a job"

"""`plan`: each policy, its controls, and what a run follows."""

import pytest
from verb_world import build_plan

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Decision, Plan
from megatron_tokscale.data.history import save_run_plan

CONTROLS = ("uniform", "easy-first", "frequency")


def test_manual_weights_are_planned(corpus, tmp_path, capsys):
    weights = ["--weights", "0:1,1", "100:9,1"]
    main(build_plan("manual", corpus, tmp_path / "plan.json", *weights))
    assert "90.00%" in capsys.readouterr().out


def test_one_flag_makes_each_control_of_a_plan_by_scores(corpus, scores, tmp_path, capsys):
    path = tmp_path / "plan.json"
    main(build_plan("frontier", corpus, path, "--scores", str(scores), "--quantiles", "3"))
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
        main(build_plan("frontier", corpus, out, *where, "--control", control))
        others[control] = Plan.load(out)
        assert (f"control {control}" in capsys.readouterr().out) == (control != "uniform")
    assert others["uniform"].n_strata == 2
    assert others["frequency"].stages == plan.stages
    assert others["easy-first"].stages != plan.stages
    assert len({each.fingerprint for each in (plan, *others.values())}) == 4


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

"""The whole loop, verb after verb, on a run whose losses are planted."""

import json

import pytest
from verb_world import build_plan

from megatron_tokscale.cli import main


@pytest.mark.slow
def test_the_whole_loop_by_verbs(run, corpus, tmp_path, capsys):
    main(["fit", str(run)])
    assert "falling" in capsys.readouterr().out
    main(["spectrum", str(run), "--resamples", "10"])
    assert "each token's fit" in capsys.readouterr().out
    main(["laws", str(run), "--resamples", "10"])
    capsys.readouterr()
    plan = tmp_path / "plan.json"
    main(build_plan("dataset", corpus, plan, "--run", str(run)))
    built = capsys.readouterr().out
    main(["plan", "show", str(plan)])
    assert capsys.readouterr().out == built
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "analysis/report.html")
    classes = json.loads((run / "analysis/fit.json").read_text())["classes"]
    assert classes["falling"]["share"] > 0.9
    recovered = json.loads((run / "analysis/reconstruction.json").read_text())
    assert recovered["same_tokens"]["full"]["r2"]["value"] > 0.99

"""`megatron-tokscale demo --quick`: the whole loop on real text, with real Megatron jobs."""

import subprocess
import sys

import pytest
from jobs import job_environment

from megatron_tokscale.core.files import read_json
from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron


def run_demo(folder):
    command = [
        sys.executable,
        "-m",
        "megatron_tokscale.cli",
        "demo",
        "--quick",
        "--out",
        folder,
    ]
    return subprocess.run(
        command, env=job_environment(), capture_output=True, text=True, check=False
    )


def test_the_demo_ends_with_a_report_and_trains_nothing_twice(tmp_path):
    out = tmp_path / "demo"
    first = run_demo(out)
    assert first.returncode == 0, first.stderr[-3000:]
    assert f"open {out / 'report.html'}" in first.stdout
    baseline, planned = Run.open(out / "baseline"), Run.open(out / "planned")
    assert len(baseline.records) >= 30
    assert baseline.probe_set.fingerprint == planned.probe_set.fingerprint
    planned_stages = read_json(out / "plan.json")["stages"]
    changes_at = next(s["start"] for s in planned_stages if s["weights"] != [0.5, 0.5])
    before = [record.consumed_samples <= changes_at for record in baseline.records]
    same = baseline.read_losses() == planned.read_losses()
    assert same[:, before].all()
    assert not same[:, -1].all()
    assert baseline.records[-1].training_loss < baseline.records[1].training_loss - 0.5
    plan = read_json(planned.path / "tokscale/plan.json")
    assert plan == read_json(out / "plan.json")

    losses = {path: path.stat().st_mtime_ns for path in out.rglob("step_*.safetensors")}
    again = run_demo(out)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in losses} == losses

    other = subprocess.run(
        [sys.executable, "-m", "megatron_tokscale.cli", "demo", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 2
    assert "holds a demo of another size" in other.stderr

"""The callback in Megatron-Bridge's own training loop, on the CPU, beside Megatron's own loop."""

import json
import shutil

import numpy as np
import pytest
from bridge_runs import probed, run_bridge
from checkpoints import checkpoint_differences
from jobs import Corpus, job_flags, run_forked
from megatrons import bridge_overlay
from numpy.testing import assert_allclose, assert_array_equal
from planned_jobs import plan_of

from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.sample_losses import SampleLosses

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not (bridge_overlay() / "megatron/bridge").is_dir(),
        reason=f"no Megatron-Bridge in {bridge_overlay()}: run `make env-bridge`",
    ),
]


def train_megatron(corpus: Corpus, run, *flags: str) -> Run:
    """Train in Megatron's own loop, with the plugin, on two processes."""
    words = (
        *("--train-iters", "6", "--save", str(run), "--save-interval", "2"),
        *("--ckpt-format", "torch_dist", "--tokscale-probe-set", str(corpus.probe_set)),
        *("--tokscale-probe-schedule", "linear:2+list:1", *flags),
    )
    run_forked(2, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *words))
    return Run.open(run)


def counts(run: Run) -> list[tuple[object, ...]]:
    return [
        (row.step, row.consumed_samples, row.consumed_tokens, row.lr_sum, row.learning_rate)
        for row in run.records
    ]


@pytest.mark.parametrize("is_planned", [False, True], ids=["blend", "plan"])
def test_the_same_weights_give_the_losses_of_megatrons_own_loop(corpus, tmp_path, is_planned):
    """Bridge loads Megatron's checkpoint of step 2 and trains on: the steps after it are the same.

    So are the records of its training samples. The weights of the plan change amid the steps that
    Bridge takes.
    """
    flags: dict[str, str] = {}
    if is_planned:
        plan_of(corpus.prefixes, {0: (0.7, 0.3), 20: (0.1, 0.9)}).save(tmp_path / "plan.json")
        flags["--tokscale-plan"] = str(tmp_path / "plan.json")
    words = [word for pair in flags.items() for word in pair]
    words.append("--tokscale-sample-losses")
    in_megatron = train_megatron(corpus, tmp_path / "megatron", *words)
    shutil.copytree(tmp_path / "megatron", tmp_path / "bridge")
    # Without Megatron's records, those that are read below are Bridge's own.
    shutil.rmtree(RunPaths(tmp_path / "bridge").samples)
    settings = probed(
        corpus,
        tokscale_dir=tmp_path / "bridge",
        tokscale_plan=flags.get("--tokscale-plan"),
        tokscale_sample_losses=True,
    )
    load = {"load": tmp_path / "megatron", "ckpt_step": 2}
    run_bridge(corpus, 2, 6, **load, callback=settings)
    in_bridge = Run.open(tmp_path / "bridge")
    assert "megatron-bridge" in in_bridge.launches[-1].versions
    assert in_bridge.step_K.tolist() == [0, 1, 2, 4, 6]
    assert_array_equal(in_bridge.read_losses(), in_megatron.read_losses())
    assert counts(in_bridge) == counts(in_megatron)
    losses = [row.training_loss for row in in_bridge.records]
    assert losses[-2:] == [row.training_loss for row in in_megatron.records][-2:]
    of_megatron, of_bridge = (
        SampleLosses.of_training(run.paths.samples).read(3, 6) for run in (in_megatron, in_bridge)
    )
    assert of_bridge["sample"].tolist() == list(range(2 * 8, 6 * 8))
    assert_array_equal(of_bridge, of_megatron)


def test_training_is_the_same_to_the_bit_with_and_without_the_callback(corpus, tmp_path):
    """With dropout, the distributed optimizer and both overlaps; FLOPs are counted as without."""
    sharded = {"overlap": True, "save_interval": 3}
    settings = probed(corpus, tokscale_probe_schedule="linear:1")
    run_bridge(corpus, 2, 6, save=tmp_path / "with", **sharded, callback=settings)
    run_bridge(corpus, 2, 6, save=tmp_path / "without", **sharded)
    assert checkpoint_differences(tmp_path / "without", tmp_path / "with") == []
    run = Run.open(tmp_path / "with")
    assert run.step_K.tolist() == [0, 1, 2, 3, 4, 5, 6]
    mean_K = run.read_losses().mean(axis=0)
    assert mean_K[-1] < mean_K[0] - 0.1


def test_a_run_is_resumed_in_another_layout_and_replayed_in_a_third(corpus, tmp_path):
    run_dir = tmp_path / "run"
    saved = {"save": run_dir, "save_interval": 2}
    settings = probed(corpus, tokscale_probe_at_exit=True)
    first = run_bridge(corpus, 2, 6, **saved, tensor_parallel=2, exit_interval=3, callback=settings)
    assert "tokscale probe at step 3" in first
    second = run_bridge(corpus, 2, 6, **saved, load=run_dir, pipeline_parallel=2, callback=settings)
    assert "tokscale probe at step 3" not in second
    run = Run.open(run_dir)
    assert run.step_K.tolist() == [0, 1, 2, 3, 4, 6]
    assert [(launch.step, launch.past) for launch in run.launches] == [
        (0, "the run's first job"),
        (3, "the checkpoint"),
    ]
    assert [row.consumed_tokens for row in run.records] == [8 * 32 * step for step in run.step_K]
    # Warm-up over 16 samples, then a cosine to 3e-4 at 128 samples.
    rate_T = [3e-3 * 8 * t / 16 for t in range(3)]
    rate_T += [3e-4 + 2.7e-3 * (1 + np.cos(np.pi * (8 * t - 16) / 112)) / 2 for t in range(3, 6)]
    sums = [sum(rate_T[:step]) for step in run.step_K]
    assert_allclose([row.lr_sum for row in run.records], sums, rtol=1e-12)

    replay = {
        "tokscale_probe_set": corpus.probe_set,
        "tokscale_replay": run_dir,
        "tokscale_dir": tmp_path / "replay",
    }
    run_bridge(corpus, 2, 6, callback=replay)
    replayed = Run.open(tmp_path / "replay")
    assert replayed.step_K.tolist() == [2, 3, 4, 6]
    of_run = [run.step_K.tolist().index(step) for step in replayed.step_K]
    assert_allclose(replayed.read_losses(), run.read_losses()[:, of_run], rtol=0, atol=1e-5)
    assert counts(replayed) == [counts(run)[place] for place in of_run]


def test_a_bad_probe_set_ends_the_job_in_one_line_before_any_data_is_read(corpus, tmp_path):
    settings = json.dumps(probed(corpus, tokscale_probe_set=tmp_path / "none"), default=str)
    with pytest.raises(AssertionError) as failure:
        run_bridge(corpus, 2, 6, save=tmp_path / "run", callback=json.loads(settings))
    output = str(failure.value)
    assert output.count("megatron-tokscale: cannot read probe set") == 1
    assert "building train, validation, and test datasets" not in output
    assert not (tmp_path / "run/tokscale").exists()

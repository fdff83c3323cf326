"""The callback in Megatron's own loop: what it records is what the plugin's hooks record."""

import json
from dataclasses import replace

import pytest
from bridge_runs import probed
from checkpoints import checkpoint_differences
from jobs import TESTS, Corpus, job_flags, run_forked
from numpy.testing import assert_array_equal
from planned_jobs import plan_of

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.sample_losses import SampleLosses

pytestmark = pytest.mark.megatron

SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def flags_of(corpus: Corpus, run, *extra: str) -> list[str]:
    saved = ("--train-iters", "6", "--save", str(run), "--save-interval", "3")
    return job_flags(corpus, *saved, *extra)


def train(corpus: Corpus, run, *extra: str) -> str:
    """Train with the plugin's hooks, or, without its flags, without it."""
    return run_forked(2, "-m", "megatron_tokscale.pretrain", *flags_of(corpus, run, *extra))


def train_with_callback(corpus: Corpus, run, *extra: str, **settings) -> str:
    settings = probed(corpus, **settings)
    words = (str(TESTS / "callback_job.py"), json.dumps(settings, default=str))
    return run_forked(2, *words, *flags_of(corpus, run, *extra))


def half_of(path) -> ProbeSet:
    """Every second sequence of a probe set."""
    whole = ProbeSet.load(path)
    arrays = {name: array[::2] for name, array in vars(whole).items() if name.endswith("_BS")}
    return replace(whole, **arrays)


def rows(run: Run) -> list[tuple[object, ...]]:
    return [
        (
            *(row.step, row.consumed_samples, row.consumed_tokens),
            *(row.lr_sum, row.learning_rate, repr(row.training_loss)),
        )
        for row in run.records
    ]


@pytest.mark.parametrize("is_planned", [False, True], ids=["blend", "plan"])
def test_the_callback_and_the_hooks_record_the_same(corpus, tmp_path, is_planned):
    """In a run of two jobs: the second resumes from the first one's checkpoint at step 3."""
    sets = [str(corpus.probe_set), str(tmp_path / "half.safetensors")]
    half_of(corpus.probe_set).save(tmp_path / "half.safetensors")
    settings: dict[str, object] = {"tokscale_probe_set": sets, "tokscale_sample_losses": True}
    flags = ["--tokscale-sample-losses"]
    if is_planned:
        path = tmp_path / "plan.json"
        plan_of(corpus.prefixes, {0: (0.7, 0.3), 20: (0.1, 0.9)}).save(path)
        settings |= {"tokscale_plan": path}
        flags += ["--tokscale-plan", str(path)]
    hooks = (
        *("--tokscale-probe-set", *sets),
        *("--tokscale-probe-schedule", "linear:2+list:1", *flags),
    )
    for way in ("hooks", "callback"):
        run = tmp_path / way
        for extra in (("--exit-interval", "3"), ("--load", str(run))):
            if way == "hooks":
                train(corpus, run, *extra, *hooks)
            else:
                train_with_callback(corpus, run, *extra, **settings)
    for name in ("", "probe-sets/half"):
        by_hooks, by_callback = (Run.open(tmp_path / way / name) for way in ("hooks", "callback"))
        assert by_callback.step_K.tolist() == [0, 1, 2, 4, 6]
        assert_array_equal(by_callback.read_losses(), by_hooks.read_losses())
        assert rows(by_callback) == rows(by_hooks)
        assert [launch.past for launch in by_callback.launches] == [
            launch.past for launch in by_hooks.launches
        ]
    in_hooks, in_callback = (
        SampleLosses.of_training(RunPaths(tmp_path / way).samples).read(1, 6)
        for way in ("hooks", "callback")
    )
    assert in_callback["sample"].tolist() == list(range(6 * 8))
    assert_array_equal(in_callback, in_hooks)
    assert checkpoint_differences(tmp_path / "hooks", tmp_path / "callback") == []


def test_training_is_the_same_to_the_bit_with_and_without_the_callback(corpus, tmp_path):
    train_with_callback(corpus, tmp_path / "with", *SHARDED, tokscale_probe_schedule="linear:1")
    train(corpus, tmp_path / "without", *SHARDED)
    assert checkpoint_differences(tmp_path / "without", tmp_path / "with") == []
    assert len(Run.open(tmp_path / "with").step_K) == 7


def test_a_replay_is_refused_where_the_loop_would_train(corpus, tmp_path):
    with pytest.raises(AssertionError) as failure:
        train_with_callback(corpus, tmp_path / "run", tokscale_replay=str(tmp_path))
    line = "megatron-tokscale: --tokscale-replay is set in a callback of Megatron's own loop"
    assert str(failure.value).count(line) == 1

"""From steps to samples, against Megatron's own calculator of batch sizes."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from megatrons import python_path
from runs import launch

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Batch, Identity, LossRecord, RunPaths
from megatron_tokscale.store.losses import write_losses
from megatron_tokscale.trace.steps import Steps, read_steps

RAMPING = "0.17.1"  # a later Megatron takes the flag and ignores it
RAMP = Batch(
    global_batch_size=16, micro_batch_size=2, rampup_batch_size=[4, 4, 100], train_iters=60
)


def megatron_0_17():
    """The calculator of megatron-core 0.17, which the ramp-up's flag still reached."""
    folder = python_path(RAMPING).partition(":")[0]
    file = f"{folder}/megatron/core/num_microbatches_calculator.py"
    spec = importlib.util.spec_from_file_location("calculator_0_17", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.RampupBatchsizeNumMicroBatchesCalculator(16, 2, 1, False, 1, 4, 4, 100)

    def size(consumed):
        made.update(consumed, consistency_check=False)
        return made.get_current_running_global_batch_size()

    return size


def spans(n_steps, sizes, consumed=0):
    found = []
    for _ in range(n_steps):
        found.append(range(consumed, consumed + sizes(consumed)))
        consumed = found[-1].stop
    return found


def write_run(path, launches, records=()):
    paths = RunPaths(path)
    Identity("a" * 16, "b" * 16, launches=tuple(launches)).save(paths.identity)
    for step, samples in records:
        record = LossRecord(step, samples, None, 0.1, 0.1, 1.0, 0.0, 0.0, "b" * 16, "")
        write_losses(paths.losses_at(step), np.zeros(4), record)
    return Steps.open(path)


def test_steps_of_a_ramp_up_have_the_samples_of_megatrons_calculator(tmp_path):
    steps = write_run(tmp_path, [launch(batch=RAMP)])
    assert [steps.samples(step) for step in range(1, 61)] == spans(60, megatron_0_17())


def test_a_step_between_probes_in_a_ramp_up_is_counted_from_the_probe(tmp_path):
    expected = spans(60, megatron_0_17())
    records = [(step, expected[step - 1].stop) for step in (5, 9, 40)]
    steps = write_run(tmp_path, [launch(batch=RAMP)], records)
    assert [steps.samples(step) for step in range(1, 61)] == expected


def test_each_launch_counts_from_its_own_start_with_its_own_batch_size(tmp_path):
    small, large = (Batch(global_batch_size=n, micro_batch_size=1) for n in (4, 10))
    first, second = launch(batch=small), launch(step=7, batch=large)
    steps = write_run(tmp_path, [first, second], [(0, 0), (7, 28), (8, 38)])
    assert steps.samples(7) == range(24, 28)
    assert steps.samples(8) == range(28, 38)
    assert steps.samples(100) == range(28 + 92 * 10, 28 + 93 * 10)


def test_steps_of_a_branch_that_was_given_up_are_those_of_the_launch_that_followed(tmp_path):
    """The first job went to step 9; the second resumed from step 6 with another batch size."""
    small, large = (Batch(global_batch_size=n, micro_batch_size=1) for n in (4, 8))
    second = launch(step=6, batch=large)
    steps = write_run(tmp_path, [launch(batch=small), second], [(3, 12), (10, 24 + 32)])
    assert [steps.samples(step) for step in (6, 7, 10)] == [
        range(20, 24),
        range(24, 32),
        range(48, 56),
    ]


def test_a_step_whose_launch_does_not_explain_the_counts_is_refused(tmp_path):
    """Samples that a probe counted contradict the settings: nothing is guessed."""
    steps = write_run(tmp_path, [launch()], [(4, 16), (8, 40), (12, 56)])
    assert steps.samples(4) == range(12, 16)
    assert steps.samples(10) == range(44, 48)
    for step in (5, 8):
        with pytest.raises(TokscaleError, match="consumed 24 samples in steps 5 to 8"):
            steps.samples(step)


def test_a_launch_that_starts_elsewhere_than_the_one_before_ends_is_refused(tmp_path):
    later = replace(launch(step=8), consumed_samples=30)
    steps = write_run(tmp_path, [launch(), later])
    with pytest.raises(TokscaleError, match="consumed 30 samples in steps 1 to 8"):
        steps.samples(3)
    assert steps.samples(9) == range(30, 34)


def test_steps_that_the_run_does_not_have_are_refused(tmp_path):
    of_samples = Batch(global_batch_size=4, micro_batch_size=4, train_samples=20)
    for name, one, last, match in (
        ("a", launch(train_iters=5), 5, "ends with step 5"),
        ("b", launch(batch=of_samples), 5, "ends with sample 20"),
    ):
        steps = write_run(tmp_path / name, [one])
        assert steps.samples(last) == range(16, 20)
        with pytest.raises(TokscaleError, match=match):
            steps.samples(last + 1)
        with pytest.raises(TokscaleError, match="expected step 1 or later"):
            steps.samples(0)
    late = write_run(tmp_path / "late", [launch(step=50)])
    with pytest.raises(TokscaleError, match="first launch on record starts at step 50"):
        late.samples(50)
    assert late.samples(51) == range(200, 204)


def test_words_name_steps_and_ranges():
    assert [read_steps("7"), read_steps("3-5")] == [range(7, 8), range(3, 6)]
    for word in ("", "x", "-3", "3-", "1.5", "5-3"):
        with pytest.raises(TokscaleError, match="--step"):
            read_steps(word)


def test_a_run_without_launches_is_refused_with_one_line(tmp_path, capsys):
    with pytest.raises(TokscaleError, match="no record of a launch"):
        Steps.open(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["trace", "--data-cache-path", str(tmp_path), "--step", "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

"""Launches: batch sizes and learning rates as Megatron gives them, and which step is of which."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from runs import constant_rate, launch, plain_probe_set, write_run

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.store import Batch, Identity, LearningRates, Run, RunWriter
from megatron_tokscale.store.launches import launch_of, parting, read_launches

SCHEDULES = {
    "constant": {"lr_decay_style": "constant", "lr_warmup_steps": 0},
    "linear": {"lr_decay_style": "linear", "lr_warmup_steps": 40},
    "cosine": {"lr_decay_style": "cosine", "lr_warmup_steps": 40, "init_lr": 1e-3},
    "fraction": {"lr_decay_style": "cosine", "lr_warmup_steps": 0.0625 * 400},
    "root": {"lr_decay_style": "inverse-square-root", "lr_warmup_steps": 40},
    **{
        style: {
            "lr_decay_style": "WSD",
            "lr_warmup_steps": 16,
            "wsd_decay_steps": 80,
            "lr_wsd_decay_style": style,
        }
        for style in ("linear-wsd", "cosine-wsd", "exponential-wsd", "minus_sqrt-wsd")
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_megatrons_to_the_last_bit(name):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    flags = {"init_lr": 0.0, **SCHEDULES[name]}
    if "lr_wsd_decay_style" in flags:
        flags["lr_wsd_decay_style"] = name.removesuffix("-wsd")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        max_lr=3e-3,
        min_lr=3e-4,
        lr_decay_steps=400,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=400,
        wd_incr_style="constant",
        **flags,
    )
    rates = LearningRates(
        peak=3e-3,
        minimum=3e-4,
        initial=flags["init_lr"],
        decay_style=flags["lr_decay_style"],
        warmup_samples=flags["lr_warmup_steps"],
        decay_samples=400.0,
        wsd_decay_samples=flags.get("wsd_decay_steps"),
        wsd_decay_style=flags.get("lr_wsd_decay_style"),
    )
    expected = []
    for _ in range(60):  # beyond the end
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=8)
    batch = Batch(global_batch_size=8, micro_batch_size=2)
    start = launch(batch=batch, learning_rate=rates)
    np.testing.assert_array_equal(start.rates(60), expected)


def test_batch_sizes_of_a_schedule_are_megatrons():
    calculator = pytest.importorskip("megatron.core.num_microbatches_calculator")
    text = "0:8, 1K:16 4K:24"
    megatron = calculator.StepBatchsizeNumMicroBatchesCalculator(2, 1, False, 0, text, 32)
    batch = Batch(global_batch_size=2, micro_batch_size=2, step_batch_size_schedule=text)
    for consumed in range(0, 200):
        megatron.update(consumed, consistency_check=False)
        assert batch.size(consumed, 32) == megatron.current_running_global_batch_size


def test_a_ramp_up_grows_by_its_increments():
    batch = Batch(global_batch_size=32, micro_batch_size=2, rampup_batch_size=[8, 8, 300])
    # Three increments in 300 samples: 8 up to 99, 16 up to 199, 24 up to 299, 32 from 300 on.
    sizes = [batch.size(consumed, 1) for consumed in (0, 99, 100, 199, 200, 299, 300, 301)]
    assert sizes == [8, 8, 16, 16, 24, 24, 32, 32]
    odd = dataclasses.replace(
        batch, decrease_batch_size_if_needed=True, micro_batch_size=2, data_parallel_size=3
    )
    assert [odd.size(consumed, 1) for consumed in (0, 100, 400)] == [6, 12, 30]


def test_planned_samples_are_those_past_and_those_to_come():
    start = launch(8, batch=Batch(global_batch_size=8, micro_batch_size=2, train_iters=10))
    assert start.planned_samples() == 8 * 4 + 2 * 8
    by_samples = Batch(global_batch_size=8, micro_batch_size=2, train_samples=100)
    assert launch(batch=by_samples).planned_samples() == 100
    assert launch().planned_samples() is None
    text = "0:4 64:16"
    steps = Batch(
        global_batch_size=2, micro_batch_size=2, train_iters=3, step_batch_size_schedule=text
    )
    assert launch(seq_length=32, batch=steps).planned_samples() == 4 + 16 + 16


def test_a_step_is_of_the_last_launch_that_starts_before_it():
    launches = [launch(0), launch(4), launch(8)]
    steps = {0: 0, 1: 0, 4: 0, 5: 4, 8: 4, 9: 8, 100: 8}
    assert {step: launch_of(launches, step).step for step in steps} == steps
    assert launch_of(launches[1:], 2).step == 4


def test_launches_come_back_as_written(tmp_path):
    batch = Batch(global_batch_size=8, micro_batch_size=2, rampup_batch_size=[2, 2, 8])
    launches = (launch(0, schedule=None), launch(4, batch=batch, lr_sum=None, consumed_tokens=None))
    identity = Identity("id", "print", {"num_layers": 2}, {"parameters": 3}, False, launches)
    identity.save(tmp_path / "run.json")
    assert Identity.load(tmp_path / "run.json") == identity


def resumed(path, *later):
    """A run of eight steps, and what a job adds that resumes from it with these launches."""
    run = write_run(path, [0, 4, 8], np.ones((16, 3)))
    writer = RunWriter(path)
    for launches in later:
        step = launches[-1].step
        writer.open(run.probe_set, {}, launches, step)
        writer.close()
    return Run.open(path)


def test_a_job_that_resumes_earlier_drops_the_launches_that_took_no_step_by_then(tmp_path):
    first, second, third = launch(0), launch(8, seed=2), launch(4, seed=3)
    run = resumed(tmp_path, (first, second), (first, third))
    assert [(row.step, row.seed) for row in run.launches] == [(0, 1234), (4, 3)]
    assert run.step_K.tolist() == [0, 4]
    lines = (tmp_path / "tokscale/journal.jsonl").read_text().splitlines()
    assert [row["seed"] for row in json.loads(lines[-1])["abandoned_launches"]] == [2]


def test_a_launch_that_took_no_step_gives_way_to_the_next_from_there(tmp_path):
    run = resumed(tmp_path, (launch(0), launch(8, seed=2)), (launch(0), launch(8, seed=3)))
    assert [row.seed for row in run.launches] == [1234, 3]


def test_the_peak_is_the_highest_of_the_launches_that_took_steps(tmp_path):
    later = launch(4, learning_rate=constant_rate(5e-3))
    unused = launch(8, learning_rate=constant_rate(1.0))
    run = write_run(tmp_path, [0, 4, 8], np.ones((16, 3)))
    info = dataclasses.replace(run.info, launches=(launch(0), later, unused))
    run = dataclasses.replace(run, info=info)
    assert run.peak_learning_rate == 5e-3
    np.testing.assert_allclose(run.x_K("lr-sum")[1:], np.log([4 * 1e-3 / 5e-3, 8 * 1e-3 / 5e-3]))


def test_a_time_that_stands_still_names_the_probes(tmp_path):
    run = write_run(tmp_path, [0, 4, 8], np.ones((16, 3)))
    same = dataclasses.replace(run.records[2], lr_sum=run.records[1].lr_sum)
    run = dataclasses.replace(run, records=(*run.records[:2], same))
    with pytest.raises(TokscaleError, match=r"probe at step 4 \(4\) to that at step 8 \(4\)"):
        run.x_K("lr-sum")


def test_unknown_tokens_stay_unknown_on_disk(tmp_path):
    run = write_run(tmp_path, [0, 4], np.ones((16, 2)))
    record = dataclasses.replace(run.records[1], step=8, consumed_tokens=None)
    RunWriter(tmp_path).write(np.ones(16, np.float32), record)
    assert Run.open(tmp_path).records[2] == record
    with pytest.raises(TokscaleError, match="has no record of its tokens at step 8"):
        Run.open(tmp_path).x_K("tokens")


def test_a_run_without_known_launches_refuses_what_needs_them(tmp_path):
    run = write_run(tmp_path, [0, 4], np.ones((16, 2)))
    dataclasses.replace(run.info, launches=()).save(tmp_path / "tokscale/run.json")
    run = Run.open(tmp_path)
    assert run.x_K()[1] == np.log(4)
    for use in (lambda: run.x_K("lr-sum"), lambda: run.launch_of(1), lambda: learning_rates(run)):
        with pytest.raises((TokscaleError, UndefinedError), match=r"no record of|not known"):
            use()


def spoil(*path, value=None):
    def change(content):
        for name in path[:-1]:
            content = content[name]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("schema_version"), "schema_version is None; expected a whole number"),
        (spoil("schema_version", value="3"), "schema_version is '3'"),
        (spoil("schema_version", value=1), "older schema.*schema version is 1; expected 3"),
        (spoil("schema_version", value=4), "schema version 4.* up to 3"),
        (spoil("run_id"), "run_id is missing"),
        (spoil("model", value=[1]), r"model is \[1\]"),
        (spoil("launches"), "its checksum is wrong"),
        (spoil("launches", value={"a": 1}), "launches is {'a': 1}"),
        (spoil("launches", 0, value=7), r"launches\[0\] is 7; expected an object"),
        (spoil("launches", 0, "step"), r"launches\[0\].step is missing"),
        (spoil("launches", 0, "step", value=-1), "do not ascend"),
        (spoil("launches", 0, "seed", value="x"), "seed is 'x'"),
        (spoil("launches", 0, "batch", value=3), "batch is 3"),
        (spoil("launches", 0, "batch", "micro_batch_size"), "batch.micro_batch_size is missing"),
        (spoil("launches", 0, "learning_rate", "peak", value="1"), "peak is '1'"),
    ],
)
def test_a_malformed_run_json_is_refused_in_one_line(tmp_path, change, message):
    write_run(tmp_path, [0, 4], np.ones((16, 2)))
    path = tmp_path / "tokscale/run.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    for use in (
        lambda: Run.open(tmp_path),
        lambda: RunWriter(tmp_path).check(plain_probe_set(16), {}),
    ):
        with pytest.raises(TokscaleError, match=message) as caught:
            use()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_launches_out_of_order_are_refused():
    with pytest.raises(ValueError, match="do not ascend"):
        read_launches([launch(4).to_json(), launch(0).to_json()])


def test_histories_part_at_the_first_launch_that_only_one_has():
    trunk, branch, later = launch(0, launch_id="t"), launch(8, launch_id="b"), launch(12)
    assert parting([trunk], [trunk], 16) is None
    assert parting([trunk, branch], [trunk], 16) == branch
    assert parting([trunk, branch], [trunk], 8) is None  # it has taken no step by then
    assert parting([trunk], [trunk, branch], 16) == branch
    assert parting([trunk], [trunk, branch], 16, is_whole=False) is None
    assert parting([trunk, later], [trunk], 16) is None  # without the plugin
    assert parting([launch(0, launch_id="x")], [trunk], 16) == launch(0, launch_id="x")


def test_losses_of_another_branch_are_set_aside_on_resume(tmp_path):
    trunk, branch = launch(0, launch_id="t"), launch(4, launch_id="b", seed=2)
    again = launch(8, launch_id="a", seed=3)
    run = write_run(tmp_path, [0, 4, 8], np.ones((16, 3)))
    before = dataclasses.replace(run.info, launches=(trunk, branch))
    before.save(tmp_path / "tokscale/run.json")
    writer = RunWriter(tmp_path)
    assert writer.open(run.probe_set, {}, (trunk, again), 8) == branch
    writer.close()
    after = Run.open(tmp_path)
    assert after.step_K.tolist() == [0, 4]
    assert [row.launch_id for row in after.launches] == ["t", "a"]
    assert after.info.run_id == run.info.run_id


def test_a_directory_of_another_run_is_set_aside_on_resume(tmp_path):
    own, later = launch(0, launch_id="own"), launch(8, launch_id="later")
    run = write_run(tmp_path, [0, 4, 8], np.ones((16, 3)))
    other = dataclasses.replace(run.info, launches=(launch(0, launch_id="other"),))
    other.save(tmp_path / "tokscale/run.json")
    writer = RunWriter(tmp_path)
    with pytest.raises(TokscaleError, match="differs from the checkpoints' from step 0"):
        writer.check_launches((own,), 8)
    writer.open(run.probe_set, {}, (own, later), 8)
    writer.close()
    after = Run.open(tmp_path)
    assert after.step_K.tolist() == []
    assert after.info.run_id != other.run_id
    assert [row.launch_id for row in after.launches] == ["own", "later"]

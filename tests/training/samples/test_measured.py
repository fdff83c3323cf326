"""The numbers of a sample, from the losses that a loss function is given.

Shapes: B samples of a microbatch, S sequence length, Q samples, R context-parallel ranks.
"""

import functools
import threading
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled_device import labelled_cuda
from numpy.testing import assert_allclose, assert_array_equal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.sample_losses import SamplesFile
from megatron_tokscale.training.calls import Call
from megatron_tokscale.training.samples import measured, recorder
from megatron_tokscale.training.samples.measured import StepValues, records_of, values_of_samples
from megatron_tokscale.training.samples.recorder import SampleRecorder


@pytest.fixture
def layout(monkeypatch):
    """Return a function that puts this process at a data-parallel rank of a layout."""

    def at(rank: int, ranks: int) -> None:
        monkeypatch.setattr(measured.mpu, "get_data_parallel_rank", lambda: rank)
        monkeypatch.setattr(measured.mpu, "get_data_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(measured.mpu, "get_context_parallel_rank", lambda: 0)
        monkeypatch.setattr(measured.mpu, "get_context_parallel_world_size", lambda: 1)

    return at


def losses(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).gamma(2, 2, shape).astype(np.float32))


def records(*parts):
    """Return the records of samples from the values of each context-parallel rank."""
    count = len(parts[0])
    return records_of(torch.stack(parts), np.full(count, 3), np.arange(count))


def test_means_and_largest_losses_are_those_of_a_loop_over_the_tokens():
    loss_BS, mask_BS = losses((3, 7)), torch.ones(3, 7)
    mask_BS[0, 2], mask_BS[1], mask_BS[2, loss_BS[2].argmax()] = 0, 0, 0
    found = records(values_of_samples(loss_BS, mask_BS.flatten()))  # a mask may come flat
    for row, (loss_S, mask_S) in enumerate(zip(loss_BS, mask_BS, strict=True)):
        kept = {place: float(loss_S[place]) for place in range(7) if mask_S[place]}
        assert found["n_tokens"][row] == len(kept)
        if kept:
            assert found["mean"][row] == pytest.approx(sum(kept.values()) / len(kept), rel=1e-6)
            assert found["position"][row] == max(kept, key=lambda place: kept[place])
            assert found["largest"][row] == max(kept.values())
        else:
            assert np.isnan(found["mean"][row]) and np.isnan(found["largest"][row])
            assert found["position"][row] == -1


@pytest.mark.parametrize("place", [0, 5])
def test_a_nan_is_the_largest_loss_wherever_it_lies(place):
    loss_BS, mask_BS = losses((2, 6)), torch.ones(2, 6)
    loss_BS[1, place] = torch.nan
    found = records(values_of_samples(loss_BS, mask_BS))
    assert np.isnan(found["mean"][1]) and np.isnan(found["largest"][1])
    assert found["position"][1] == place
    assert np.isfinite(found["mean"][0])


def test_a_nan_outside_the_mask_does_not_count():
    loss_BS, mask_BS = losses((1, 6)), torch.ones(1, 6)
    loss_BS[0, 4], mask_BS[0, 4] = torch.nan, 0
    assert np.isfinite(records(values_of_samples(loss_BS, mask_BS))["mean"]).all()


@pytest.mark.parametrize("nan_at", [None, 0, 1])
def test_the_parts_of_a_sequence_give_what_the_whole_gives(nan_at):
    loss_BS, mask_BS = losses((4, 8)), (losses((4, 8), seed=1) > 1).float()
    if nan_at is not None:
        loss_BS[2, 4 * nan_at + 1], mask_BS[2, 4 * nan_at + 1] = torch.nan, 1
    mask_BS[3, :4] = 0  # a rank without a token of the sample
    left = values_of_samples(loss_BS[:, :4], mask_BS[:, :4])
    right = values_of_samples(loss_BS[:, 4:], mask_BS[:, 4:])
    right[:, 3] += 4  # from places on the rank to positions
    whole, joined = records(values_of_samples(loss_BS, mask_BS)), records(left, right)
    for name in ("largest", "position", "n_tokens"):
        assert_array_equal(joined[name], whole[name])
    assert_allclose(joined["mean"], whole["mean"], rtol=1e-6)


@pytest.mark.parametrize("mask", [None, torch.ones(3), "loss_mask"])
def test_a_forward_step_without_the_batchs_mask_is_refused(mask):
    with pytest.raises(TokscaleError, match="does not bind the batch's loss_mask"):
        values_of_samples(losses((2, 6)), mask)


@pytest.mark.parametrize(("ranks", "size", "n_microbatches"), [(1, 2, 4), (2, 2, 3), (4, 1, 2)])
def test_samples_are_numbered_as_megatrons_sampler_deals_them(layout, ranks, size, n_microbatches):
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    for rank in range(ranks):
        layout(rank, ranks)
        step = StepValues(step=1, start=40)
        for _ in range(n_microbatches):
            step.take(torch.zeros(size, 4), n_microbatches)
        batches = iter(MegatronPretrainingSampler(1000, 40, size, rank, ranks))
        dealt = [next(batches) for _ in range(n_microbatches)]
        assert step.samples_Q().tolist() == [k for batch in dealt for k in batch]


def test_a_step_that_is_run_again_keeps_its_first_values():
    step = StepValues()
    for value in (1.0, 2.0, 7.0, 8.0):  # two microbatches, twice
        step.take(torch.full((1, 4), value), 2)
    assert step.value_QV[:, 0].tolist() == [1.0, 2.0]
    assert step.n_samples == 2


# The recorder, without a job.


class Prober(SimpleNamespace):
    """The part of the prober that a recorder uses."""


@pytest.fixture
def make_recorder(monkeypatch, layout, tmp_path):
    """Return a function that makes a recorder of a job with two microbatches of two samples."""
    layout(0, 1)
    monkeypatch.setattr(recorder, "has_losses", lambda: True)
    monkeypatch.setattr(recorder, "get_num_microbatches", lambda: 2)
    monkeypatch.setattr(recorder, "joined_over_context", lambda value_QV, length: value_QV[None])
    monkeypatch.setattr(recorder, "samples_consumed", lambda args: 0)
    store = SimpleNamespace(run_id=lambda: "a" * 16, samples=tmp_path)
    launch = SimpleNamespace(launch_id="b" * 16, step=0)
    prober = Prober(store=store, is_active=True, launches=(launch,))
    args = Namespace(dataloader_type=None, log_interval=2, seq_length=6)

    def make(*, stops_on_error=False):
        part = SampleRecorder(prober, args, stops_on_error=stops_on_error)
        monkeypatch.setattr(recorder, "together", lambda action, where: action())
        part.on_train_start(state(0))
        return part

    return make


def state(step):
    return SimpleNamespace(step=step, consumed_samples=4 * step)


def run_microbatches(part, count=2):
    """Call the wrapped forward step and its loss function, as Megatron's schedule does."""

    def forward_step(iterator, model):
        return losses((2, 6)), functools.partial(lambda mask, output: "result", torch.ones(2, 6))

    for _ in range(count):
        output, loss_func = part.on_forward(forward_step)(iter(()), None)
        assert loss_func(output) == "result"


def read(folder):
    from megatron_tokscale.store.sample_losses import SampleLosses

    return SampleLosses.of_training(folder).read(0, 100)


def test_passes_without_gradients_are_not_recorded(make_recorder, tmp_path):
    part = make_recorder()
    with torch.no_grad():
        run_microbatches(part)
    run_microbatches(part)
    part.on_step(state(1))
    with torch.no_grad():
        run_microbatches(part)
    part.on_train_end(state(1))
    assert read(tmp_path)["sample"].tolist() == [0, 1, 2, 3]


def test_records_are_written_at_the_log_interval_and_before_a_checkpoint(make_recorder, tmp_path):
    part, found = make_recorder(), []
    for step in (1, 2, 3):
        run_microbatches(part)
        part.on_step(state(step))
        part._check_writer()  # waits for the thread
        found.append(len(read(tmp_path)))
    part.before_checkpoint(state(3))
    assert [*found, len(read(tmp_path))] == [0, 8, 8, 12]


def test_no_step_waits_for_a_disk_and_no_record_is_lost(make_recorder, tmp_path, monkeypatch):
    may_go_on, append = threading.Event(), SamplesFile.append

    def slow(file, records_Q):
        assert may_go_on.wait(60)
        append(file, records_Q)

    monkeypatch.setattr(SamplesFile, "append", slow)
    part = make_recorder()
    for step in range(1, 8):  # comes back, or hangs here
        run_microbatches(part)
        part.on_step(state(step))
    assert not len(read(tmp_path))
    may_go_on.set()
    part.before_checkpoint(state(7))
    assert read(tmp_path)["sample"].tolist() == list(range(7 * 4))


def test_only_the_step_of_a_log_interval_waits_for_the_device(make_recorder, tmp_path):
    part, waits = make_recorder(), []
    with labelled_cuda() as gpu:
        loss_BS, mask_BS = losses((2, 6)).to("cuda"), torch.ones(2, 6, device="cuda")

        def forward_step(iterator, model):
            return loss_BS, functools.partial(lambda mask, output: None, mask_BS)

        for step in range(1, 6):
            gpu.synchronisations.clear()
            for _ in range(2):
                output, loss_func = part.on_forward(forward_step)(iter(()), None)
                loss_func(output)
            part.on_step(state(step))
            waits.append(dict(gpu.synchronisations))
        part.on_train_end(state(5))
    assert waits == [{}, {"device to host": 1}] * 2 + [{}]
    assert read(tmp_path)["sample"].tolist() == list(range(5 * 4))


def test_a_failed_step_is_written_when_the_job_closes(make_recorder, tmp_path):
    part = make_recorder()
    run_microbatches(part)
    part.on_step(state(1))
    run_microbatches(part, count=1)
    part.close()
    records_Q = read(tmp_path)
    assert records_Q["sample"].tolist() == [0, 1, 2, 3, 4, 5]
    assert records_Q["step"].tolist() == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("stops", [False, True])
def test_a_file_that_is_gone_follows_the_flag_for_write_errors(
    make_recorder, tmp_path, stops, capsys
):
    part = make_recorder(stops_on_error=stops)
    next(tmp_path.glob("rank_*")).unlink()
    run_microbatches(part)
    part.on_step(state(2))
    if stops:
        with pytest.raises(TokscaleError, match="losses of training samples cannot be written"):
            part.before_checkpoint(state(2))
        return
    part.before_checkpoint(state(2))
    assert "training continues WITHOUT those of data-parallel rank 0" in capsys.readouterr().err
    run_microbatches(part)
    part.on_step(state(4))
    part.close()


def test_a_forward_step_is_changed_as_an_argument_or_in_a_context():
    def train(forward_step_func, model):
        return forward_step_func

    call = Call(train, ("forward_step_func", "model"), (1, 2), {})
    assert call.with_forward_step("forward_step_func", lambda step: step + 10).result() == 11
    call = Call(train, ("forward_step_func", "model"), (), {"forward_step_func": 1, "model": 2})
    assert call.with_forward_step("forward_step_func", lambda step: step + 10).result() == 11
    context = SimpleNamespace(forward_step_func=1)
    call = Call(lambda context: context.forward_step_func, ("context",), (context,), {})
    assert call.with_forward_step("forward_step_func", lambda step: step + 10).result() == 11

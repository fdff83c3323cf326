"""Values that Megatron logs, or hands from one step to the next, are those of training alone."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.timers import Timers
from megatron.training import training

from megatron_tokscale import pretrain
from megatron_tokscale.training.probe.isolation import statistics


def test_scales_of_auxiliary_losses_are_restored():
    """The schedules write into the scale of the last training microbatch, in place."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        scaler.set_loss_scale(torch.tensor(0.25))
    assert len(statistics.loss_scalers()) >= 2
    with statistics.restored_loss_scales():
        for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
            scaler.set_loss_scale(torch.tensor(8.0))
            assert scaler.main_loss_backward_scale == 8
    assert MoEAuxLossAutoScaler.main_loss_backward_scale == 0.25
    assert MTPLossAutoScaler.main_loss_backward_scale == 0.25


@pytest.fixture
def stragglers(monkeypatch):
    """Megatron's straggler detector while it measures; without a GPU it has no events."""
    detector = training.stimer
    event = lambda **kwargs: SimpleNamespace(record=lambda: None)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "Event", event)
    for name in ("start_gemm_tm", "start_gemm_ev", "stop_gemm_tm", "stop_gemm_ev"):
        monkeypatch.setattr(detector, name, [])
    for name in ("start_data_tm", "start_data_ev", "stop_data_tm", "stop_data_ev"):
        monkeypatch.setattr(detector, name, [])
    monkeypatch.setattr(detector, "start", detector.start_method)
    monkeypatch.setattr(detector, "stop", detector.stop_method)
    monkeypatch.setattr(detector, "bdata", False)
    return detector


def forward_step():
    """Measure as the forward step of Megatron's pretrain_gpt.py does."""
    with training.stimer(bdata=True):
        pass
    with training.stimer:
        pass


def test_the_straggler_detector_measures_training_alone(stragglers):
    forward_step()
    with statistics.no_straggler_times():
        forward_step()
    assert (len(stragglers.start_data_tm), len(stragglers.start_gemm_tm)) == (1, 1)
    forward_step()
    assert (len(stragglers.start_data_tm), len(stragglers.start_gemm_tm)) == (2, 2)
    assert all(stragglers.stop_gemm_tm)


def test_the_packages_own_forward_step_leaves_the_straggler_detector_on(stragglers, monkeypatch):
    monkeypatch.setattr(
        pretrain, "get_batch", lambda *_: dict.fromkeys([*pretrain._FIELDS, "attention_mask"])
    )
    monkeypatch.setattr("megatron.training.get_timers", lambda: Timers(0, "max"))
    model = torch.nn.Module()
    model.vp_stage = None
    model.forward = lambda *_, **__: torch.ones(1)
    pretrain.forward_step(iter(()), model)
    assert (len(stragglers.start_data_tm), len(stragglers.start_gemm_tm)) == (1, 1)


def test_timers_of_the_forward_step_count_training_alone(monkeypatch):
    timers = Timers(2, "max")
    monkeypatch.setattr(statistics, "get_timers", lambda: timers)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(name):
        timers(name, log_level=2).start()
        timers(name).stop()

    run("batch-generator")
    before = timers("batch-generator").elapsed(reset=False)
    timers("running", log_level=0).start()
    with statistics.restored_timers():
        run("batch-generator")
        run("new")
    assert timers("batch-generator").elapsed(reset=False) == before
    assert timers("new").elapsed(reset=False) == 0
    timers("running").stop()
    assert timers("running").elapsed() > 0


def test_attention_logits_are_those_of_training():
    """Transformer Engine's attention keeps its largest logits until the step's end, in any mode."""
    attention = torch.nn.Module()
    fresh = torch.nn.Module()
    attention.current_max_attn_logits = logits = torch.tensor([1.0, 2.0])
    fresh.current_max_attn_logits = None
    model = [torch.nn.ModuleList([attention, fresh, torch.nn.Linear(1, 1)])]
    with statistics.restored_attention_logits(model):
        attention.current_max_attn_logits = torch.max(logits, torch.tensor([9.0, 0.0]))
        fresh.current_max_attn_logits = torch.tensor([9.0])
    assert attention.current_max_attn_logits.tolist() == [1, 2]
    assert fresh.current_max_attn_logits is None


@pytest.mark.parametrize("lengths", [None, [0, 3, 8]])
def test_lengths_of_packed_sequences_are_those_of_training(monkeypatch, lengths):
    """Megatron computes the FLOPs of a packed step from them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", None)
    monkeypatch.setattr(training, "_seqlen_stats_active", False)
    if lengths:
        training.update_seqlen_stats_from_cu_seqlens(torch.tensor(lengths))
    with statistics.restored_sequence_lengths():
        training.update_seqlen_stats_from_cu_seqlens(torch.tensor([0, 100]))
    expected = (8, 3**2 + 5**2) if lengths else (None, None)
    assert training.consume_seqlen_stats_in_iteration() == expected

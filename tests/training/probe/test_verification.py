"""`--tokscale-verify-isolation` names each state that a probe has changed."""

from types import SimpleNamespace

import pytest
import torch
from labelled_device import labelled_cuda
from megatron.core import tensor_parallel
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training import training
from quantised import QuantisedModule, QuantisedTensor

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training.probe.isolation import verification, verified


class Chunk(torch.nn.Module):
    """A chunk as Megatron's DDP wraps it, with one of each state that a step reads."""

    def __init__(self):
        super().__init__()
        self.module = torch.nn.BatchNorm1d(3)
        self.quantised = QuantisedModule()
        self.attention = torch.nn.Module()
        self.attention.current_max_attn_logits = torch.ones(2)
        self.output = torch.nn.Module()
        self.output.embedding_activation_buffer = []
        flags = {"is_last_microbatch": True, "param_gather_dispatched": True}
        self.bucket_groups = [SimpleNamespace(**flags)]
        self.expert_parallel_bucket_groups = [SimpleNamespace(**flags)]


@pytest.fixture
def world(monkeypatch):
    """A chunk and its optimizer after a step."""
    monkeypatch.setattr(verification, "first_of_all_ranks", lambda message: message)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    tracker = SimpleNamespace(get_states=lambda: {"expert": generator})
    generator = torch.Generator()
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(MTPLossLoggingHelper, "tracker", {"values": torch.ones(2)})
    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", torch.ones(2))
    chunk = Chunk()
    inner = torch.optim.AdamW(chunk.parameters())
    chunk.module(torch.rand(4, 3)).sum().backward()
    inner.step()
    for parameter in chunk.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.main_param = parameter.detach().clone()
    scaler = SimpleNamespace(scale=torch.ones(1))
    scaler.state_dict = lambda: {"scale": scaler.scale}
    optimizer = SimpleNamespace(optimizer=inner, grad_scaler=scaler)
    parts = SimpleNamespace(chained_optimizers=[optimizer, SimpleNamespace(optimizer=None)])
    return SimpleNamespace(
        chunk=chunk, norm=chunk.module, inner=inner, scaler=scaler, parts=parts, draws=generator
    )


def replace_logits(world):
    world.chunk.attention.current_max_attn_logits = torch.full((2,), 9.0)


SPOILS = {
    # The optimizer holds the parameters too.
    "parameters, optimizer state": lambda w: w.norm.weight.data[1].add_(1e-6),
    "buffers": lambda w: w.norm.running_mean.add_(1),
    "gradients": lambda w: w.norm.bias.main_grad.add_(1),
    "module modes": lambda w: w.norm.eval(),
    "optimizer state": lambda w: w.inner.state[w.norm.bias]["exp_avg"].mul_(2),
    "main parameters": lambda w: w.norm.weight.main_param.add_(1),
    "torch's CPU generator, torch's CUDA generator": lambda w: torch.rand(1),
    "Megatron's generator tracker": lambda w: torch.rand(1, generator=w.draws),
    "fp8 scaling": lambda w: w.chunk.quantised(100.0),
    "attention logits": replace_logits,
    "deferred embedding gradients": lambda w: w.chunk.output.embedding_activation_buffer.append(
        torch.ones(1)
    ),
    "auxiliary losses in Megatron's log": lambda w: MTPLossLoggingHelper.tracker["values"].add_(1),
    "sequence lengths in Megatron's log": lambda w: training._seqlen_stats_in_iteration.add_(1),
}


@pytest.mark.parametrize("names", SPOILS)
def test_verification_names_what_was_changed(world, names):
    with verified([world.chunk], world.parts, 7, is_on=True):
        pass
    with (
        pytest.raises(TokscaleError, match=f"^the probe at step 7 changed {names}; expected"),
        verified([world.chunk], world.parts, 7, is_on=True),
    ):
        SPOILS[names](world)
    with verified([world.chunk], world.parts, 7, is_on=False):
        SPOILS[names](world)


@pytest.mark.parametrize("flag", ["is_last_microbatch", "param_gather_dispatched"])
@pytest.mark.parametrize("groups", ["bucket_groups", "expert_parallel_bucket_groups"])
def test_verification_sees_the_flags_of_gradient_buckets(world, groups, flag):
    (group,) = getattr(world.chunk, groups)
    with (
        pytest.raises(TokscaleError, match=r"changed gradient buckets; expected"),
        verified([world.chunk], world.parts, 7, is_on=True),
    ):
        setattr(group, flag, False)


def test_verification_sees_the_loss_scale(world):
    with (
        pytest.raises(TokscaleError, match=r"changed optimizer state; expected"),
        verified([world.chunk], world.parts, 7, is_on=True),
    ):
        world.scaler.scale.mul_(2)


def test_verification_sees_a_quantised_parameter(world):
    weight = QuantisedTensor({"rowwise_data": torch.ones(2), "columnwise_data": torch.ones(2)})
    world.chunk.weight = torch.nn.Parameter(weight, requires_grad=False)
    with (
        pytest.raises(TokscaleError, match=r"changed parameters; expected"),
        verified([world.chunk], world.parts, 7, is_on=True),
    ):
        world.chunk.weight.inner["columnwise_data"][0] = 2


def test_cached_weights_that_a_step_makes_anew_are_no_change(world):
    world.chunk.quantised._fp8_workspaces = {"weight": torch.ones(2)}
    with verified([world.chunk], world.parts, 7, is_on=True):
        world.chunk.quantised._fp8_workspaces["weight"] += 1


def test_state_on_a_device_is_hashed(world):
    with labelled_cuda() as gpu:
        world.norm.running_mean = torch.ones(3, device="cuda")
        with verified([world.chunk], world.parts, 7, is_on=True):
            pass
        with (
            pytest.raises(TokscaleError, match=r"changed buffers; expected"),
            verified([world.chunk], world.parts, 7, is_on=True),
        ):
            world.norm.running_mean.add_(1)
    assert set(gpu.synchronisations) == {"device to host"}

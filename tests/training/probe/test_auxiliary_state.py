"""State that only some trainings have: the scales of auxiliary losses, fp8's amax histories."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training.probe import isolation


def test_scales_of_auxiliary_losses_are_put_back():
    """The schedules write into the scale of the last training microbatch, in place."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        scaler.set_loss_scale(torch.tensor(0.25))
    digests = [
        isolation._digest([s.main_loss_backward_scale]) for s in isolation._loaded_loss_scalers()
    ]
    assert len(digests) >= 2
    with isolation._loss_scales():
        for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
            scaler.set_loss_scale(torch.tensor(8.0))
            assert scaler.main_loss_backward_scale == 8
    assert MoEAuxLossAutoScaler.main_loss_backward_scale == 0.25
    assert MTPLossAutoScaler.main_loss_backward_scale == 0.25


class QuantisedLinear(torch.nn.Linear):
    """Delayed scaling as Transformer Engine does it: any forward pass writes its amax down."""

    def __init__(self, config):
        super().__init__(4, 4)
        self.config = config
        state = SimpleNamespace(amax_history=torch.full((3, 1), 0.5), scale=torch.ones(1))
        self.fp8_meta = {"scaling_fwd": state, "recipe": "delayed"}

    def forward(self, x):
        self.fp8_meta["scaling_fwd"].amax_history[0] = x.abs().max()
        return super().forward(x)


@pytest.fixture
def transformer_engine(monkeypatch):
    """What the probe calls of Transformer Engine, which needs a GPU: saving and restoring."""
    graph = ModuleType("transformer_engine.pytorch.graph")

    def quantised(chunks):
        return [m for chunk in chunks for m in chunk.modules() if isinstance(m, QuantisedLinear)]

    def save(chunks, recipe):
        assert recipe == "delayed"
        return [m.fp8_meta["scaling_fwd"].amax_history.clone() for m in quantised(chunks)]

    def restore(chunks, saved):
        for module, history in zip(quantised(chunks), saved, strict=True):
            module.fp8_meta["scaling_fwd"].amax_history.copy_(history)

    graph.save_fp8_tensors, graph.restore_fp8_tensors = save, restore
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, graph.__name__, graph)
    import megatron.core.fp8_utils

    monkeypatch.setattr(megatron.core.fp8_utils, "get_fp8_recipe", lambda config: config.fp8_recipe)


def chunks_of(recipe):
    config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
    model = torch.nn.Sequential(QuantisedLinear(config), QuantisedLinear(config))
    model.config = config
    return [model]


def test_amax_histories_are_put_back_in_place(transformer_engine):
    chunks = chunks_of("delayed")
    histories = [module.fp8_meta["scaling_fwd"].amax_history for module in chunks[0]]
    digest = isolation._digest(isolation._fp8_tensors(chunks))
    with isolation._fp8_scaling(chunks):
        chunks[0](torch.full((2, 4), 100.0))
        assert histories[0][0] == 100
        assert isolation._digest(isolation._fp8_tensors(chunks)) != digest
    assert isolation._digest(isolation._fp8_tensors(chunks)) == digest
    # In place: what Transformer Engine reduces over the ranks are references to these tensors.
    for module, history in zip(chunks[0], histories, strict=True):
        assert module.fp8_meta["scaling_fwd"].amax_history is history


def test_recipes_without_a_history_need_no_transformer_engine():
    with isolation._fp8_scaling(chunks_of("tensorwise")):
        pass


def test_verification_names_what_was_changed(monkeypatch):
    monkeypatch.setattr(isolation, "first_of_all_ranks", lambda message: message)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    chunk = torch.nn.Module()
    chunk.module = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(chunk.parameters())
    chunk.module(torch.rand(4, 3)).sum().backward()
    optimizer.step()

    def spoil_weight():
        chunk.module.weight.data[1] += 1e-7

    def spoil_moment():
        optimizer.state[chunk.module.bias]["exp_avg"].mul_(2)

    spoils = {
        "parameters, optimizer state": spoil_weight,  # the optimizer holds the parameters too
        "optimizer state": spoil_moment,
        "buffers": lambda: chunk.module(torch.full((4, 3), 9.0)),
        "module modes": lambda: chunk.module.eval(),
        "torch's CPU generator, torch's CUDA generator": lambda: torch.rand(1),
    }
    with isolation.verified([chunk], optimizer, 7, is_on=True):
        pass
    for names, spoil in spoils.items():
        with (
            pytest.raises(TokscaleError, match=f"^the probe at step 7 changed {names}$"),
            isolation.verified([chunk], optimizer, 7, is_on=True),
        ):
            spoil()
    with isolation.verified([chunk], optimizer, 7, is_on=False):
        spoil_weight()

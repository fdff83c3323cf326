"""Quantised state: delayed scaling is restored in place, and quantised tensors are hashed whole."""

import pytest
import torch
from quantised import (
    CustomState,
    DelayedState,
    Hybrid,
    OldQuantisedTensor,
    QuantisedModule,
    QuantisedOperation,
    QuantisedTensor,
)

from megatron_tokscale.training.probe.isolation.quantised import (
    fp8_scaling,
    plain_tensors,
    restored_fp8_scaling,
)
from megatron_tokscale.training.probe.isolation.verification import _digest


def history(module):
    metas = getattr(module, "fp8_meta", None) or module._fp8_metas["forward"]
    return metas["scaling_fwd"].amax_history


MODULES = {
    "a layer": QuantisedModule,
    "a custom recipe": lambda: QuantisedModule(CustomState),
    "a fused operation": QuantisedOperation,
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_amax_histories_are_restored_in_place(make):
    modules = [make(), make()]
    for module in modules:
        module(0.5)
    before, histories = _digest(fp8_scaling(modules)), [history(module) for module in modules]
    with restored_fp8_scaling(modules):
        for module in modules:
            module(100.0)
        assert _digest(fp8_scaling(modules)) != before
    for module, known in zip(modules, histories, strict=True):
        assert history(module) is known  # Transformer Engine holds references to it
        assert known.tolist() == [[0.5, 0.5], [0, 0], [0, 0]]
    assert _digest(fp8_scaling(modules)) == before


def test_state_that_a_probe_makes_gets_the_values_of_new_state():
    module = QuantisedModule(is_ready=False)
    with restored_fp8_scaling([module]):
        module(100.0)
        module.fp8_meta["scaling_fwd"].scale.fill_(7)
    new = DelayedState()
    for state in (module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]):
        assert torch.equal(state.amax_history, new.amax_history)
        assert torch.equal(state.scale, new.scale)


@pytest.mark.parametrize("length", [2, 5])
def test_a_history_that_gets_another_length_is_cut_or_padded(length):
    module = QuantisedModule()
    state = module.fp8_meta["scaling_fwd"]
    state.amax_history[:] = torch.tensor([[1.0], [2.0], [3.0]])
    with restored_fp8_scaling([module]):
        state.amax_history = torch.full((length, 2), 100.0)
    assert state.amax_history[:, 0].tolist() == [1, 2, 3, 0, 0][:length]


def mxfp8():
    return {
        "rowwise_data": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "rowwise_scale_inv": torch.ones(2),
        "columnwise_data": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "columnwise_scale_inv": torch.ones(3),
    }


@pytest.mark.parametrize("kind", [QuantisedTensor, OldQuantisedTensor])
@pytest.mark.parametrize("part", mxfp8())
def test_every_part_of_a_block_scaled_tensor_is_hashed(kind, part):
    tensor = kind(mxfp8())
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    known = _digest([parameter])
    assert _digest([torch.nn.Parameter(kind(mxfp8()), requires_grad=False)]) == known
    parameter.inner[part].view(-1)[1] += 1
    assert _digest([parameter]) != known
    assert set(parameter.inner) == set(mxfp8())  # hashing has taken nothing away


def test_the_transposed_copy_of_a_tensor_with_one_scale_is_not_hashed():
    """A forward pass drops the copy or makes it again; the data and the scale stay."""
    data = {"data": torch.arange(6).view(2, 3), "fp8_scale_inv": torch.ones(1)}
    known = _digest([QuantisedTensor(data)])
    assert _digest([QuantisedTensor({**data, "data_transpose": data["data"].T})]) == known
    assert _digest([QuantisedTensor({**data, "fp8_scale_inv": torch.zeros(1)})]) != known
    alone = QuantisedTensor({"data_transpose": data["data"]})
    assert len(plain_tensors(alone)) == 1


def test_both_storages_of_a_hybrid_tensor_are_hashed():
    hybrid = Hybrid(QuantisedTensor(mxfp8()), QuantisedTensor(mxfp8()))
    assert len(plain_tensors(hybrid)) == 8

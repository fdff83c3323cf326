"""Transformer Engine's quantised state: the scaling of delayed recipes, and quantised tensors.

Transformer Engine is not imported: its objects are recognised by their attributes, which have kept
their names from 1.13 to 2.20.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch

_INITIAL: Final = {"amax_history": 0.0, "scale": 1.0, "scale_inv": 1.0}
"""The tensors of a delayed recipe's state, and the value with which each starts."""


class _Place(NamedTuple):
    """Place of a tensor: the module's number, its quantisers' direction and state, and its name."""

    module: int
    direction: str
    state: str
    name: str


@contextmanager
def restored_fp8_scaling(model: Sequence[Any]) -> Iterator[None]:
    """Restore the amax histories and scales of delayed scaling, the one recipe that has a state.

    Quantising in a forward pass writes them whatever the mode. They are restored in place, since
    Transformer Engine reduces them over the ranks by reference. State that the block has made gets
    its initial values.
    """
    saved = {place: tensor.clone() for place, tensor in fp8_scaling(model).items()}
    try:
        yield
    finally:
        for place, tensor in fp8_scaling(model).items():
            _restore(tensor, saved.get(place), _INITIAL[place.name])


def _restore(tensor: torch.Tensor, saved: torch.Tensor | None, initial: float) -> None:
    """Fill `tensor` with the saved values; a history that got another length is cut or padded."""
    n_saved = 0 if saved is None else min(len(saved), len(tensor))
    tensor[n_saved:] = initial
    if saved is not None:
        tensor[:n_saved] = saved[:n_saved]


def fp8_scaling(model: Sequence[Any]) -> dict[_Place, torch.Tensor]:
    """Return the tensors of delayed scaling: of modules, of fused operations, of custom recipes."""
    modules = [module for chunk in model for module in chunk.modules()]
    return {
        _Place(number, direction, key, name): getattr(state, name)
        for number, module in enumerate(modules)
        for direction, meta in _metas(module).items()
        for key, state in meta.items()
        if key in ("scaling_fwd", "scaling_bwd")
        for name in _INITIAL
        if isinstance(getattr(state, name, None), torch.Tensor)
    }


def _metas(module: Any) -> dict[str, Mapping[str, Any]]:
    """Return a module's descriptions of its quantisers; an operation has one per direction."""
    found = {
        "both": getattr(module, "fp8_meta", None),
        **(getattr(module, "_fp8_metas", None) or {}),
    }
    return {direction: meta for direction, meta in found.items() if meta}


def plain_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors that hold the data and scales of a quantised tensor, or the plain tensor.

    The transposed copy in a tensor with one scale is left out: forward passes drop it and make it
    again from the data. A block-scaled tensor's columnwise data are no such copy, since they have
    scales of their own.
    """
    if not hasattr(value, "get_metadata"):
        return [value] if isinstance(value, torch.Tensor) else []
    parts = dict(value.get_metadata())
    if parts.get("data") is not None:
        parts.pop("data_transpose", None)
    return [tensor for part in parts.values() for tensor in plain_tensors(part)]

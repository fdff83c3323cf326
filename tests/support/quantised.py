"""Stand-ins for what a probe reads of Transformer Engine, which needs a GPU.

They have the attributes of Transformer Engine's classes of the same kind, and no arithmetic.
"""

from typing import Any

import torch


class DelayedState:
    """State of delayed scaling for `n` quantisers: amax histories, and scales."""

    def __init__(self, n: int = 2, length: int = 3) -> None:
        self.amax_history = torch.zeros(length, n)
        self.scale = torch.ones(n)

    def quantise(self, value: float) -> None:
        """Note an amax, as any forward pass does."""
        self.amax_history[0] = value


class CustomState:
    """State of a custom recipe with delayed quantisers, whose tensors it passes on."""

    def __init__(self) -> None:
        self._ds_state = DelayedState()

    amax_history = property(lambda self: self._ds_state.amax_history)
    scale = property(lambda self: self._ds_state.scale)

    def quantise(self, value: float) -> None:
        self._ds_state.quantise(value)


class QuantisedModule(torch.nn.Module):
    """A layer whose `fp8_meta` is filled by its first forward pass, if not before."""

    def __init__(self, make_state: Any = DelayedState, *, is_ready: bool = True) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": True, "num_gemms": 1}
        self._make_state = make_state
        if is_ready:
            self._fill()

    def _fill(self) -> None:
        self.fp8_meta |= {"scaling_fwd": self._make_state(), "scaling_bwd": self._make_state()}

    def forward(self, value: float) -> None:
        if "scaling_fwd" not in self.fp8_meta:
            self._fill()
        self.fp8_meta["scaling_fwd"].quantise(value)


class QuantisedOperation(torch.nn.Module):
    """An operation of the fuser, which has one description for each direction."""

    def __init__(self) -> None:
        super().__init__()
        forward = {"scaling_fwd": DelayedState(), "fp8_group": None}
        self._fp8_metas: dict[str, Any] = {"forward": forward, "backward": None}

    def forward(self, value: float) -> None:
        self._fp8_metas["forward"]["scaling_fwd"].quantise(value)


class QuantisedTensor(torch.Tensor):
    """A wrapper without data of its own; most operations see the dequantised values.

    `keeps_type` says what moving it to the CPU gives: a tensor of this type from 2.16 on, the
    dequantised values before.
    """

    keeps_type = True

    @staticmethod
    def __new__(cls, inner: dict[str, torch.Tensor]) -> "QuantisedTensor":
        shape = next(iter(inner.values())).shape
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        tensor.inner = inner
        return tensor

    def get_metadata(self) -> dict[str, Any]:
        return {**self.inner, "quantizer": None, "fake_dtype": torch.float32}

    def prepare_for_saving(self) -> tuple[list[torch.Tensor], "QuantisedTensor"]:
        """Give the tensors away, as Transformer Engine does from 2.3 on."""
        given, self.inner = list(self.inner.values()), {}
        return given, self

    def dequantize(self) -> torch.Tensor:
        return next(iter(self.inner.values())).float()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "detach" or (name == "_to_copy" and cls.keeps_type):
            return cls(args[0].inner)
        if name == "view":
            raise NotImplementedError("a quantised tensor has no views")
        plain = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class OldQuantisedTensor(QuantisedTensor):
    keeps_type = False


class Hybrid:
    """A storage of two storages, one for each direction of a matrix product."""

    def __init__(self, rowwise: Any, columnwise: Any) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def get_metadata(self) -> dict[str, Any]:
        return {"rowwise_storage": self.rowwise, "columnwise_storage": self.columnwise}

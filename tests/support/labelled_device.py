"""Tensors that say `cuda:0` and hold their values on the CPU: device rules without a GPU.

    with labelled_cuda() as gpu:
        loss = torch.ones(3, device="cuda")
        torch.cat([loss, torch.zeros(3)])  # RuntimeError, as on a GPU
        loss.sum().item()
    assert gpu.synchronisations == {"item": 1}

A tensor that is created on, or moved to, a CUDA device inside the block is a `LabelledTensor`. Each
operation on it runs on the CPU and gives true values. It obeys these rules of CUDA:

- all tensors of an operation are on one device, except CPU tensors of no dimension in element-wise
  operations, and CPU indices of a CUDA tensor;
- a collective takes contiguous tensors only, as NCCL does;
- what makes the host wait for the device is counted, by kind, in `LabelledDevice.synchronisations`.

Where torch lets a GPU round to TF32 (`torch.backends.cuda.matmul`), matrix products of float32 have
their factors rounded to it.

The order of streams, kernels' own arithmetic, NCCL, and the allocator have no counterpart here.
Gradients are not followed. The rules hold in the thread that has entered the block.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten

_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_VALUES = {  # a value of no dimension may be on the CPU, although these are not element-wise
    *_INDEXING,
    *(_aten.fill_.Tensor, _aten.fill.Tensor),
    *(_aten.masked_fill.Tensor, _aten.masked_fill_.Tensor),
}
_WAITS = {
    _aten._local_scalar_dense.default: "item",
    _aten.equal.default: "equal",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "nonzero",
    _aten.repeat_interleave.Tensor: "nonzero",
    _aten._unique2.default: "nonzero",
    _aten.bincount.default: "nonzero",
}
"""Operations whose result, or the size of it, the host reads from the device."""
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default}


class LabelledTensor(torch.Tensor):
    """A tensor that says `cuda:0`; `held` has its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "LabelledTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=_CUDA,
        )
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"LabelledTensor({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} acts on a LabelledTensor outside of `labelled_cuda`")


class LabelledDevice:
    """Counts of what has happened on the device.

    Attributes:
        synchronisations: the times that the host has waited for the device, by kind: "item",
            "equal", "nonzero" (also for an index that is a mask), "device to host", "host to
            device" and "synchronize".
        operations: number of operations on the device, views among them.
        largest: bytes of the largest tensor.
        peak: most bytes of tensors alive at a time, without what a kernel needs beside its result.
    """

    def __init__(self) -> None:
        self.synchronisations: Counter[str] = Counter()
        self.operations = 0
        self.largest = 0
        self.peak = 0
        self._live = 0
        self._users: Counter[int] = Counter()  # tensors of each memory, by its address
        self._pinned: dict[int, torch.Tensor] = {}  # held, lest other memory has its address

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the values, after a check of its devices."""
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        labelled = [each for each in tensors if isinstance(each, LabelledTensor)]
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if not labelled and target != "cuda":
            return self._on_host(func, args, kwargs)
        self.operations += 1
        if labelled and func not in _COPIES:
            _check_devices(func, args, tensors)
        if func.namespace == "c10d" and not all(each.is_contiguous() for each in labelled):
            raise ValueError(f"{func}: tensors must be contiguous")
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes the shape of a LabelledTensor in place")
        self._count(func, args, kwargs, target)
        held_args, held_kwargs = _map(_held, args), {k: _map(_held, v) for k, v in kwargs.items()}
        if target is not None:
            held_kwargs["device"] = torch.device("cpu")
        if func in _PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
            held_args = _map(_as_tf32, held_args)
        result = func(*held_args, **held_kwargs)
        if func is _aten.copy_.default:
            return args[0]
        if func is _aten._to_copy.default and any(result is each.held for each in labelled):
            result = result.clone()
        return result if target == "cpu" else self._labelled(result, labelled)

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation without the device; pinned memory is ordinary memory with a mark."""
        if func is _aten.is_pinned.default:
            return args[0].data_ptr() in self._pinned
        if func is _aten._pin_memory.default:
            pinned = args[0].clone()
            self._pinned[pinned.data_ptr()] = pinned
            return pinned
        return func(*args, **kwargs)

    def _labelled(self, result: Any, labelled: list[LabelledTensor]) -> Any:
        """Label the tensors of a result; a tensor that was changed in place keeps its label."""
        known = {id(each.held): each for each in labelled}

        def label(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in known:
                return known[id(tensor)]
            labelled_tensor = LabelledTensor(tensor)
            self._follow(labelled_tensor)
            return labelled_tensor

        return _map(label, result)

    def _follow(self, tensor: LabelledTensor) -> None:
        """Count the memory of a tensor until it and all other tensors of that memory are gone."""
        memory = tensor.held.untyped_storage()
        address, size = memory.data_ptr(), memory.nbytes()
        if not self._users[address]:
            self._live += size
            self.peak, self.largest = max(self.peak, self._live), max(self.largest, size)
        self._users[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            self._live -= size

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: str | None
    ) -> None:
        if func in _WAITS:
            self.synchronisations[_WAITS[func]] += 1
        elif func in _INDEXING:
            self._count_indices(args)
        elif func in _COPIES:
            source = args[1] if func is _aten.copy_.default else args[0]
            goal = args[0].device.type if func is _aten.copy_.default else target
            self._count_copy(source, goal, self._is_asynchronous(func, args, kwargs, source))

    def _count_indices(self, args: tuple[Any, ...]) -> None:
        indices = [each for each in args[1] if each is not None]
        if any(each.device.type == "cpu" for each in indices):
            self.synchronisations["host to device"] += 1
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            self.synchronisations["nonzero"] += 1

    def _count_copy(self, source: torch.Tensor, goal: str | None, is_asynchronous: bool) -> None:
        origin = source.device.type
        if origin != (goal or origin) and not is_asynchronous:
            kind = "device to host" if origin == "cuda" else "host to device"
            self.synchronisations[kind] += 1

    def _is_asynchronous(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: torch.Tensor
    ) -> bool:
        """Return whether a copy asks not to wait, and its memory on the host is pinned."""
        is_in_place = func is _aten.copy_.default
        place = args[2:3] if is_in_place else ()
        asks = kwargs.get("non_blocking", place[0] if place else False)
        on_host = source if source.device.type == "cpu" else args[0] if is_in_place else None
        return bool(asks) and on_host is not None and on_host.data_ptr() in self._pinned


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _map(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_map(function, each) for each in value])
    return value


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, LabelledTensor) else tensor


def _as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 to TF32: 10 of the mantissa's 23 bits, to nearest."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Refuse an operation on CUDA and CPU tensors that CUDA refuses.

    Raises:
        RuntimeError: the tensors are on two devices.
    """
    on_cpu = [each for each in tensors if not isinstance(each, LabelledTensor)]
    if func in _INDEXING and isinstance(args[0], LabelledTensor):
        indices = [id(each) for each in args[1] if each is not None]
        on_cpu = [each for each in on_cpu if id(each) not in indices]
    if func in _VALUES or torch.Tag.pointwise in func.tags:
        written = tensors[:1] if func._schema.is_mutable else []
        on_cpu = [each for each in on_cpu if each.dim() > 0 or any(each is w for w in written)]
    if on_cpu:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu "
            f"(of shape {tuple(on_cpu[0].shape)})"
        )


class _Mode(TorchDispatchMode):
    def __init__(self, device: LabelledDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._device.run(func, args, kwargs or {})


@contextmanager
def labelled_cuda() -> Iterator[LabelledDevice]:
    """Give the block a labelled CUDA device; restore everything after it."""
    device = LabelledDevice()

    def synchronize(*args: Any) -> None:
        device.synchronisations["synchronize"] += 1

    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),  # of an H100
        "synchronize": synchronize,
    }
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: the guard says device 0, for good
    lifts_cpu_tensors_only = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies, as on CUDA
    try:
        with (
            mock.patch.multiple(torch.cuda, **answers),
            mock.patch.object(torch, "inference_mode", torch.no_grad),  # it knows no subclasses
            _Mode(device),
        ):
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts_cpu_tensors_only)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Let matrix products round to TF32 in the block, as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before

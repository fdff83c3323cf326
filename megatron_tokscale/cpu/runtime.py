"""Let Megatron's code, written for CUDA, run on CPU tensors and gloo.

Megatron touches `torch.cuda` unconditionally (streams, memory statistics, generators, device
strings). `enable` answers those calls for a machine that has no GPU: placement on "cuda" means the
CPU, streams and events do nothing, the CUDA generator is the CPU generator. It changes torch for
the whole process, so it happens only on request and never where there is a GPU.
"""

import atexit
import contextlib
import functools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from megatron_tokscale.core.errors import TokscaleError

FLAG: Final = "--tokscale-cpu"
ENVIRONMENT: Final = "MEGATRON_TOKSCALE_CPU"

# Flags that keep Megatron off its CUDA-only paths; added where the user has not given them.
_REQUIRED_FLAGS: Final[dict[str, tuple[str, ...]]] = {
    "--distributed-backend": ("gloo",),
    "--transformer-impl": ("local",),
    "--use-cpu-initialization": (),
    "--no-persist-layer-norm": (),
    "--no-gradient-accumulation-fusion": (),
    "--no-masked-softmax-fusion": (),
    "--no-bias-gelu-fusion": (),
    "--no-bias-swiglu-fusion": (),
    "--no-bias-dropout-fusion": (),
    "--no-rope-fusion": (),
}

_enabled = False


def is_requested(argv: Sequence[str]) -> bool:
    """Return whether the command line or the environment asks for the CPU runtime."""
    return FLAG in argv or os.environ.get(ENVIRONMENT, "") not in ("", "0")


def is_enabled() -> bool:
    """Return whether this process runs Megatron on the CPU."""
    return _enabled


def required_flags(argv: Sequence[str]) -> list[str]:
    """Return the Megatron flags that a CPU run needs and `argv` does not have."""
    given = {word.split("=")[0] for word in argv}
    missing = [(flag, values) for flag, values in _REQUIRED_FLAGS.items() if flag not in given]
    return [word for flag, values in missing for word in (flag, *values)]


def gpu_refusal(n_devices: int) -> str:
    """Return the refusal of the CPU runtime on a machine with GPUs."""
    return (
        f"{FLAG} is for machines without a GPU, and this one has {n_devices}; drop the flag, or "
        "hide the GPUs with CUDA_VISIBLE_DEVICES=''"
    )


def enable() -> None:
    """Switch this process to the CPU runtime; call it before Megatron is imported.

    Raises:
        TokscaleError: the process has a GPU, or Megatron is imported already.
    """
    global _enabled  # noqa: PLW0603 - one switch per process, by nature
    if _enabled:
        return
    if "megatron.core" in sys.modules:
        raise TokscaleError(
            f"{FLAG} comes too late: Megatron is imported already; import "
            "megatron_tokscale.adaptor before it"
        )
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if torch.cuda.is_available():
        raise TokscaleError(gpu_refusal(torch.cuda.device_count()))
    _enabled = True
    _answer_cuda_queries(torch.cuda)
    _place_tensors_on_cpu()
    _adapt_megatron()
    atexit.register(_leave_process_groups)


def _leave_process_groups() -> None:
    """Join gloo's threads before the interpreter ends, which Megatron does not do.

    A process that ends while they run can abort, although it has done all its work. After an error
    they are left running: a rank must not wait for others then.
    """
    import torch.distributed as dist

    if dist.is_initialized() and getattr(sys, "last_exc", None) is None:
        dist.destroy_process_group()


class _Stream:
    """Stand-in for a CUDA stream: its work is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> "_Event":
        return _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: object) -> None: ...


class _Event:
    """Stand-in for a CUDA event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *args: Any) -> float:
        return 0.0


def _answer_cuda_queries(cuda: ModuleType) -> None:
    """Replace the functions of `torch.cuda` that Megatron calls."""
    import torch

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    def get_generator_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_generator_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def seed_generator(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    # A value or a function for each name of torch.cuda that Megatron uses.
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=8 << 30, multi_processor_count=1
    )
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    answers: dict[str, Any] = {
        "is_available": constant(True),
        "is_initialized": constant(True),
        "is_current_stream_capturing": constant(False),
        "current_device": constant("cpu"),
        "device_count": constant(ranks_here),
        "get_device_properties": constant(properties),
        "get_device_capability": constant((0, 0)),
        "get_device_name": constant("cpu"),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "device": lambda *args: contextlib.nullcontext(),
        "get_rng_state": get_generator_state,
        "set_rng_state": set_generator_state,
        "manual_seed": seed_generator,
        "manual_seed_all": constant(None),
        "default_generators": (torch.default_generator,) * ranks_here,
    }
    for name in ("set_device", "synchronize", "empty_cache", "_lazy_init"):
        answers[name] = constant(None)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "reset_peak_memory_stats",
    ):
        answers[name] = constant(0)
    for name in ("Float", "Double", "Half", "BFloat16", "Byte", "Int", "Long"):
        answers[f"{name}Tensor"] = getattr(torch, f"{name}Tensor")
    # Megatron looks the generators up in two places.
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, answers[name])


def _place_tensors_on_cpu() -> None:
    """Create a CPU tensor wherever Megatron requests a CUDA tensor."""
    import torch
    from torch.utils.data import DataLoader

    def on_cpu(device: Any) -> Any:
        is_device = isinstance(device, str | torch.device)
        return torch.device("cpu") if is_device and str(device).startswith("cuda") else device

    def placed_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            return function(*map(on_cpu, args), **kwargs)

        return call

    # Functions that take a device.
    factories = "empty zeros ones full tensor arange rand randn randint as_tensor linspace"
    likes = "empty_like zeros_like ones_like full_like"
    for name in (factories + " " + likes).split():
        setattr(torch, name, placed_on_cpu(getattr(torch, name)))
    torch.Tensor.to = placed_on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, *args: None  # type: ignore[method-assign]

    # Megatron's gradient buffers and optimizers tell tensors apart by their CUDA type string.
    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = cuda_type  # type: ignore[assignment]

    # Data loaders, without pinned memory.
    initialize_loader = DataLoader.__init__

    @functools.wraps(initialize_loader)
    def initialize_on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        # Starting a loader draws its workers' seed from the CPU generator, which is the one that
        # dropout uses here. With a separate generator a resumed job repeats the uninterrupted one,
        # as it does on a GPU.
        kwargs.setdefault("generator", torch.Generator())
        initialize_loader(self, *args, **{**kwargs, "pin_memory": False})

    DataLoader.__init__ = initialize_on_cpu  # type: ignore[method-assign]
    # torch asks CUDA before every optimizer step whether a graph is being captured.
    torch.optim.Optimizer._accelerator_graph_capture_health_check = (  # type: ignore[method-assign]
        lambda self: None
    )


def _adapt_megatron() -> None:
    """Patch the code in Megatron that needs more than the replaced `torch.cuda`."""
    import megatron.core.tensor_parallel.random as megatron_random
    import torch
    import torch.distributed as dist

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    # MoE: split sizes become a list only for CUDA tensors, and gloo takes nothing else.
    all_to_all_single = dist.all_to_all_single

    def as_list(splits: Any) -> list[int] | None:
        return None if splits is None else [int(split) for split in splits]

    @functools.wraps(all_to_all_single)
    def all_to_all_with_lists(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs
        )

    dist.all_to_all_single = all_to_all_with_lists  # type: ignore[assignment]
    _allow_sequence_parallel_torch_norm()


def _allow_sequence_parallel_torch_norm() -> None:
    """Let torch's own norm serve sequence parallelism, as the fused CUDA norms do.

    It computes the same on a shard of the sequence. Its parameters only have to be marked, so that
    their gradients are summed over the tensor-parallel ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make_norm = WrappedTorchNorm.__new__

    def make_marked_norm(
        cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> Any:
        is_parallel = config.sequence_parallel
        config.sequence_parallel = False
        try:
            norm = make_norm(cls, config, hidden_size, eps, **kwargs)
        finally:
            config.sequence_parallel = is_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = is_parallel
        return norm

    WrappedTorchNorm.__new__ = make_marked_norm

"""The packages on this machine, and the hooks that its Megatron has."""

import importlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any, Final, NamedTuple

_OLD: Final = (
    "its wheels have that from 0.17 on, and pip installs 0.16.1 on Python before 3.12; install "
    "megatron-core 0.17 or later, or put a checkout of Megatron-LM on PYTHONPATH"
)


class Line(NamedTuple):
    """A finding in print; `is_wrong` if it would stop a job."""

    state: str
    text: str
    is_wrong: bool = False


def installed() -> list[Line]:
    """Look up the packages that a job or an analysis uses."""
    numbers = [f"{name} {_version(name)}" for name in ("numpy", "scipy", "safetensors")]
    return [
        Line("Python", platform.python_version()),
        Line("torch", _torch()),
        _megatron(),
        Line("Megatron-Bridge", _version("megatron-bridge")),
        Line("Transformer Engine", _transformer_engine()),
        Line("apex", _apex()),
        Line("others", ", ".join(numbers)),
    ]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    if not torch.cuda.is_available():
        return f"{torch.__version__} built {build}, no GPU here"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return f"{torch.__version__} built {build}, {', '.join(counts)}"


def _megatron() -> Line:
    from megatron_tokscale.training.versions import find_megatron

    found = find_megatron()
    if found is None:
        return Line(
            "megatron-core",
            "not installed: enough for an analysis, not for a job; a checkout is found if its "
            "folder is on PYTHONPATH",
        )
    origin = "wheel" if found.is_wheel else "checkout"
    has_training = importlib.util.find_spec("megatron.training") is not None
    training = "with megatron.training" if has_training else f"without megatron.training: {_OLD}"
    return Line("megatron-core", f"{found.version}, {origin} in {found.folder}, {training}")


def _transformer_engine() -> str:
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed (optional)"
    version = _version("transformer_engine")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library of CUDA code may raise any error without its driver
        return f"{version}, cannot be imported: {_one_line(error)}"
    return version


def _apex() -> str:
    """Describe NVIDIA's apex, which has no version; another project has its name on PyPI."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed (optional)"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return f"another project of that name, not NVIDIA's: {_version('apex')}; not used"
    is_built = importlib.util.find_spec("amp_C") is not None
    return "NVIDIA's, " + ("with its CUDA extensions" if is_built else "without CUDA extensions")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def hooks(is_needed: bool) -> list[Line]:
    """Look up the functions that the plugin wraps; only a job needs them."""
    from megatron_tokscale.training.plugin import HOOKS
    from megatron_tokscale.training.versions import find_megatron

    if find_megatron() is None:
        return [Line("not looked up", "no Megatron", is_wrong=is_needed)]
    lines = [_hook(hook) for hook in HOOKS]
    if not any(line.is_wrong for line in lines):
        from megatron_tokscale.training.upstream import ways

        lines += [Line(name, way) for name, way in ways().items()]
    return lines


def _hook(hook: Any) -> Line:
    """Look up one function, and how its arguments are known."""
    name = f"{hook.module}.{hook.name}: {hook.purpose}"
    try:
        function = getattr(importlib.import_module(hook.module), hook.name, None)
    except Exception as error:  # Megatron's own imports may fail in any way
        return Line("MISSING", f"{name} ({_one_line(error)})", hook.is_required)
    if function is None:
        return Line("MISSING", name, hook.is_required)
    return Line("found", f"{name} ({hook.way(function)})" if hook.arguments else name)

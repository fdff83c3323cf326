"""What is installed, which hooks Megatron has, and what a job's flags would be refused for.

    megatron-tokscale doctor [-- [SCRIPT] FLAG ...]

Nothing is written, no process group is made, and no GPU is needed.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_tokscale import __version__
from megatron_tokscale.core.errors import EXIT_CODE

_PRETRAIN = "megatron_tokscale.pretrain"


class Line(NamedTuple):
    """One thing that was looked at; `is_wrong` if it would stop a job."""

    state: str
    text: str
    is_wrong: bool = False


def examine(words: Sequence[str]) -> None:
    """Print what is found here and, if there are any, in a job's `words`.

    Args:
        words: what stands behind the launcher on the job's command line: a script, if it has one,
            and the flags.

    Raises:
        SystemExit: with code 2, if something is wrong.
    """
    flags, is_own_script = _enter_folder_of_script(words)
    with _quiet():
        hooks = _hooks(bool(flags))
        sections = {"installed": _installed(), "hooks": hooks}
        if flags:
            has_hooks = not any(line.is_wrong for line in hooks)
            unread = Line("not checked", "the flags, while a hook is missing")
            sections["job"] = _job(flags, is_own_script=is_own_script) if has_hooks else [unread]
    print(f"megatron-tokscale {__version__}")
    for title, lines in sections.items():
        print(title)
        for line in lines:
            print(f"  {line.state:<18}  {line.text}")
    n_wrong = sum(line.is_wrong for lines in sections.values() for line in lines)
    print(f"{n_wrong} wrong" if n_wrong else "nothing is wrong")
    if n_wrong:
        raise SystemExit(EXIT_CODE)


def _enter_folder_of_script(words: Sequence[str]) -> tuple[list[str], bool]:
    """Drop `-m MODULE` and the script, whose checkout of Megatron is the one that counts.

    Returns:
        The flags, and True if the job is `megatron_tokscale.pretrain`: that is meant where no
        script is named.
    """
    rest, module = list(words), _PRETRAIN
    if rest[:1] == ["-m"]:
        module, rest = " ".join(rest[1:2]), rest[2:]
    if rest and rest[0].endswith(".py"):
        sys.path.insert(0, str(Path(rest.pop(0)).resolve().parent))
        return rest, False
    if rest and not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd()))  # as Python does for -m
    return rest, module == _PRETRAIN


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what Megatron and torch say when they are imported without a GPU."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _installed() -> list[Line]:
    numbers = [f"{name} {_version(name)}" for name in ("numpy", "scipy", "safetensors")]
    return [
        Line("Python", platform.python_version()),
        Line("torch", _torch()),
        _megatron(),
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
    training = "with megatron.training" if has_training else "without megatron.training"
    return Line("megatron-core", f"{found.version}, {origin} in {found.folder}, {training}")


def _transformer_engine() -> str:
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed (optional)"
    version = _version("transformer_engine")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # whatever a library of CUDA code may raise without its driver
        return f"{version}, cannot be imported: {_one_line(error)}"
    return version


def _apex() -> str:
    """NVIDIA's apex has no version of its own; another project has its name on PyPI."""
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


def _hooks(is_needed: bool) -> list[Line]:
    """Look up what the plugin wraps; without Megatron that matters only to a job."""
    from megatron_tokscale.training.plugin import HOOKS
    from megatron_tokscale.training.versions import find_megatron

    if find_megatron() is None:
        return [Line("not looked up", "no Megatron", is_wrong=is_needed)]
    lines = []
    for hook in HOOKS:
        name = f"{hook.module}.{hook.name}: {hook.purpose}"
        try:
            is_there = hasattr(importlib.import_module(hook.module), hook.name)
        except Exception as error:  # Megatron's own imports may fail in any way
            lines.append(Line("MISSING", f"{name} ({_one_line(error)})", hook.required))
            continue
        lines.append(Line("found", name) if is_there else Line("MISSING", name, hook.required))
    return lines


def _job(flags: Sequence[str], *, is_own_script: bool) -> list[Line]:
    from megatron_tokscale.doctor.preflight import check_flags

    findings = check_flags(flags, is_own_script=is_own_script)
    return [
        *(Line("REFUSED", text, is_wrong=True) for text in findings.refused),
        *(Line("WARNING", text) for text in findings.warned),
        *(Line("ok", text) for text in findings.passed),
        *(Line("not checked", text) for text in findings.unchecked),
    ]

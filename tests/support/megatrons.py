"""The Megatrons that the tests run under: the installed one, and older ones laid over it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock
from jobs import job_environment

ROOT = Path(__file__).parents[2]
OLD = (ROOT / "tests/old-megatron.txt").read_text().split()
INSTALLED = "0.19.2"
VERSIONS = [*OLD, INSTALLED]

_SCAN = """
import ast, inspect, json
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
import megatron.core, megatron.training
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.models.gpt import GPTModel
from megatron.training import training
from megatron.training.arguments import add_megatron_arguments
from megatron_tokscale.training.support import probe_refusals

def last_word(node):
    if isinstance(node, ast.Call) and not node.args and not node.keywords:
        return f"{last_word(node.func)}()"
    return getattr(node, "id", "") or getattr(node, "attr", "")

def names(node):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        if last_word(node.value) in ("args", "get_args()", "global_args"):
            yield node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        yield from (word.value for word in node.args[1:2] if isinstance(word, ast.Constant))
    # Megatron's configurations take the arguments of the names of their fields.
    if isinstance(node, ast.ClassDef) and "Config" in node.name:
        for row in node.body:
            if isinstance(row, ast.AnnAssign):
                yield ast.unparse(row.target)

parser = ArgumentParser(allow_abbrev=False)
add_megatron_arguments(parser)
read = set()
for package in (megatron.core, megatron.training):
    for path in Path(package.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            read.update(names(node))
shared_buffer = Namespace(
    seq_length=32, reuse_grad_buf_for_mxfp8_param_ag=True, overlap_param_gather=True
)
print(json.dumps({
    "flags": {action.dest: action.option_strings for action in parser._actions},
    "choices": {
        flag: [str(choice) for choice in action.choices or ()]
        for action in parser._actions for flag in action.option_strings
    },
    "refusals": probe_refusals(shared_buffer),
    "read": sorted(map(str, read)),
    "dataset": [field.name for field in fields(GPTDatasetConfig) if field.init],
    "model": list(inspect.signature(GPTModel).parameters),
    "pretrain": list(inspect.signature(training.pretrain).parameters),
}))
"""


def python_path(version: str) -> str:
    """A PYTHONPATH that brings this version of Megatron."""
    paths = [os.environ.get("PYTHONPATH", "")]
    if version != INSTALLED:
        overlay = ROOT / f".venv/overlays/megatron-core-{version}"
        assert (overlay / "megatron/core").is_dir(), f"no megatron-core {version}: run `make env`"
        paths.insert(0, str(overlay))
    return os.pathsep.join(filter(None, paths))


def scan(version: str) -> dict[str, Any]:
    """Return the flags of a Megatron with their choices, and the arguments that its packages read.

    `refusals` are those of a probe whose job shares the buffer of gradients with parameters. A
    process that imports Megatron takes seconds, so all processes of a test run share one for each
    version.
    """
    of_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    path = Path(tempfile.gettempdir()) / f"megatron-scan-{of_run}-{version}.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(_scanned(version))
    return dict(json.loads(path.read_text()))


def _scanned(version: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCAN],
        env=job_environment() | {"PYTHONPATH": python_path(version)},
        capture_output=True,
        text=True,
        check=True,
    )
    return str(result.stdout.splitlines()[-1])


def bridge_overlay() -> Path:
    """The folder of Megatron-Bridge, whether it is there or not.

    MEGATRON_BRIDGE_OVERLAY names another one.
    """
    pins = (ROOT / "tests/megatron-bridge.txt").read_text().split()
    version = next(pin for pin in pins if pin.startswith("megatron-bridge==")).split("==")[1]
    default = ROOT / f".venv/overlays/megatron-bridge-{version}"
    return Path(os.environ.get("MEGATRON_BRIDGE_OVERLAY", default))


def bridge_path() -> str:
    """A PYTHONPATH that brings Megatron-Bridge over the installed Megatron."""
    return os.pathsep.join(filter(None, [str(bridge_overlay()), os.environ.get("PYTHONPATH", "")]))

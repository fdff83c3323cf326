"""The Megatrons that the tests run under: the installed one, and older ones laid over it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
OLD = (ROOT / "tests/old-megatron.txt").read_text().split()
INSTALLED = "0.19.2"


def python_path(version: str) -> str:
    """A PYTHONPATH that brings this version of Megatron."""
    paths = [os.environ.get("PYTHONPATH", "")]
    if version != INSTALLED:
        overlay = ROOT / f".venv/overlays/megatron-core-{version}"
        assert (overlay / "megatron/core").is_dir(), f"no megatron-core {version}: run `make env`"
        paths.insert(0, str(overlay))
    return os.pathsep.join(filter(None, paths))


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

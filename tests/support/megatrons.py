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

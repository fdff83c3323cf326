"""Two checkpoints compared to the bit, in either of Megatron's formats."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


def checkpoint_differences(left: Path, right: Path) -> list[str]:
    """Paths at which the checkpoints under two directories differ, but for the arguments."""
    iterations = [path.name for path in sorted(left.glob("iter_*"))]
    assert iterations
    return [
        difference
        for name in iterations
        for difference in _differences(read_checkpoint(left / name), read_checkpoint(right / name))
    ]


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """All tensors and objects of one checkpoint, read without Megatron."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    contents = {
        str(path.relative_to(folder)): torch.load(path, weights_only=False, map_location="cpu")
        for path in folder.glob("**/*.pt")
    }
    if (folder / ".metadata").exists():
        with tempfile.NamedTemporaryFile() as file:
            dcp_to_torch_save(folder, file.name)
            contents["sharded"] = torch.load(file.name, weights_only=False, map_location="cpu")
    return contents


def _differences(left: Any, right: Any, where: str = "") -> list[str]:
    if isinstance(left, dict):
        keys = (set(left) | set(right)) - {"args"}
        return [
            d for key in keys for d in _differences(left.get(key), right.get(key), f"{where}/{key}")
        ]
    if isinstance(left, list | tuple):
        same_length = len(left) == len(right)
        pairs = enumerate(zip(left, right, strict=True)) if same_length else []
        inner = [d for i, (a, b) in pairs for d in _differences(a, b, f"{where}[{i}]")]
        return inner if same_length else [where]
    if isinstance(left, torch.Generator) and isinstance(right, torch.Generator):
        left, right = left.get_state(), right.get_state()
    if torch.is_tensor(left):
        return [] if torch.is_tensor(right) and torch.equal(left, right) else [where]
    if isinstance(left, np.ndarray):
        return [] if np.array_equal(left, right) else [where]
    return [] if type(left) is type(right) and repr(left) == repr(right) else [where]

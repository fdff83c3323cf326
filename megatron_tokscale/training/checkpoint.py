"""Where a job goes on, read from the files of its checkpoint without loading it.

A checkpoint of Megatron's has its arguments in a pickle inside a zip file, beside the tensors. Only
the pickle is read, and no class in it is made but a `Namespace`: nothing of it is run.
"""

import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

_TRACKER = "latest_checkpointed_iteration.txt"
_HOLDERS = ("common.pt", "mp_rank_*/model_optim_rng.pt")


class Start(NamedTuple):
    """The step that a job starts at, and the training samples consumed by then."""

    step: int
    consumed: int


def start_of(args: Namespace) -> Start | None:
    """Return where a job with these flags starts; None if this machine cannot tell.

    Args:
        args: Megatron's arguments, validated by it or not.
    """
    if getattr(args, "non_persistent_ckpt_type", None):
        return None
    if args.finetune or not args.load or not (Path(args.load) / _TRACKER).is_file():
        return Start(0, 0)
    try:
        step = int(args.ckpt_step or (Path(args.load) / _TRACKER).read_text())
    except (OSError, ValueError):  # a "release" among them
        return None
    folder = Path(args.load) / f"iter_{step:07d}"
    for holder in _HOLDERS:
        for path in sorted(folder.glob(holder)):
            saved = read_arguments(path)
            if saved is not None:
                return Start(step, int(getattr(saved, "consumed_train_samples", 0)))
    return None


def read_arguments(path: Path) -> Namespace | None:
    """Return the arguments that a file of a checkpoint holds; None if it holds none."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                saved = _Unpickler(file).load()
    except Exception:  # a damaged pickle may raise anything; Megatron will say what is wrong
        return None
    found = saved.get("args") if isinstance(saved, dict) else None
    return found if isinstance(found, Namespace) else None


class _Blank:
    """What stands for everything that is not read."""

    def __new__(cls, *_: Any, **__: Any) -> "_Blank":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what the real one would."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget it."""

    def append(self, value: Any) -> None:
        """Forget it."""

    def extend(self, values: Any) -> None:
        """Forget them."""


_PLAIN = {("argparse", "Namespace"): Namespace, ("collections", "OrderedDict"): OrderedDict}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _PLAIN.get((module, name), _Blank)

    def persistent_load(self, _: Any) -> Any:
        return _Blank()

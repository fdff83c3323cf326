"""The step and the samples from which a job goes on, read from its checkpoint without loading it.

A checkpoint of Megatron's has its arguments in a pickle inside a zip file, which is a file of its
own or, from 0.19 on, a shard of a distributed checkpoint. Only the pickle is read, and no class in
it is made but a `Namespace`: nothing of it is run.
"""

import io
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

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
    saved = read_arguments(Path(args.load) / f"iter_{step:07d}")
    if saved is None:
        return None
    return Start(step, int(getattr(saved, "consumed_train_samples", 0)))


def read_arguments(folder: Path) -> Namespace | None:
    """Return the arguments that a checkpoint holds; None if they cannot be read here."""
    paths = [path for holder in _HOLDERS for path in sorted(folder.glob(holder))]
    try:
        content = _unzipped(paths[0].open("rb")) if paths else _of_shards(folder)
    except Exception:  # a damaged pickle may raise anything; Megatron will say what is wrong
        return None
    found = content.get("args") if isinstance(content, dict) else None
    return found if isinstance(found, Namespace) else None


def _of_shards(folder: Path) -> Any:
    """Read what all ranks have in common out of torch's distributed checkpoint."""
    with (folder / ".metadata").open("rb") as file:
        places = _Unpickler(file).load().storage_data
    place = next(
        place for key, place in places.items() if key.fqn.partition("/")[0] == "common_state"
    )
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        (common,) = _unzipped(io.BytesIO(file.read(place.length)))
    return common


def _unzipped(file: IO[bytes]) -> Any:
    """Read what `torch.save` has written, without its tensors."""
    with file, zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as content:
            return _Unpickler(content).load()


class _Blank:
    """Stand-in for an object of any class: its attributes, and none of its code."""

    def __new__(cls, *_: Any, **__: Any) -> "_Blank":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what the real one would."""

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes."""
        if isinstance(state, dict):
            self.__dict__.update(state)

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

"""The step and the samples at which a job resumes, read from its checkpoint without loading it.

A checkpoint of Megatron's has its arguments in a pickle inside a zip file, which is a separate file
or, from 0.19 on, a shard of a distributed checkpoint. Only the pickle is read, and only its
`Namespace` and `OrderedDict` objects are built: no code of the file runs.
"""

import io
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from megatron_tokscale.corpus.source import is_in_storage

_TRACKER: Final = "latest_checkpointed_iteration.txt"
_FILES_WITH_ARGUMENTS: Final = ("common.pt", "mp_rank_*/model_optim_rng.pt")


class JobStart(NamedTuple):
    """The step at which a job starts, and the training samples consumed by then."""

    step: int
    consumed: int


def start_of(args: Namespace) -> JobStart | None:
    """Return the start of a job with these flags; None if this machine cannot tell.

    Args:
        args: Megatron's arguments, validated by it or not.
    """
    if getattr(args, "non_persistent_ckpt_type", None):
        return None
    is_new = args.finetune or not args.load
    if not is_new and is_in_storage(args.load):
        return None
    if is_new or not (Path(args.load) / _TRACKER).is_file():
        return JobStart(0, 0)
    try:
        step = int(args.ckpt_step or (Path(args.load) / _TRACKER).read_text())
    except (OSError, ValueError):  # such as "release"
        return None
    saved = read_arguments(Path(args.load) / f"iter_{step:07d}")
    if saved is None:
        return None
    return JobStart(step, int(getattr(saved, "consumed_train_samples", 0)))


def read_arguments(folder: Path) -> Namespace | None:
    """Return the arguments that a checkpoint holds; None if they cannot be read here."""
    paths = [path for pattern in _FILES_WITH_ARGUMENTS for path in sorted(folder.glob(pattern))]
    try:
        content = _read_pickle(paths[0].open("rb")) if paths else _read_common_state(folder)
    except Exception:  # a damaged pickle may raise any error; Megatron will report it
        return None
    found = content.get("args") if isinstance(content, dict) else None
    return found if isinstance(found, Namespace) else None


def _read_common_state(folder: Path) -> Any:
    """Read the state that all ranks share from torch's distributed checkpoint."""
    with (folder / ".metadata").open("rb") as file:
        places = _Unpickler(file).load().storage_data
    place = next(
        place for key, place in places.items() if key.fqn.partition("/")[0] == "common_state"
    )
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        (common,) = _read_pickle(io.BytesIO(file.read(place.length)))
    return common


def _read_pickle(file: IO[bytes]) -> Any:
    """Read the pickle in a file of `torch.save`, without its tensors."""
    with file, zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as content:
            return _Unpickler(content).load()


class _Blank:
    """Stand-in for an object of any class, with its attributes and without its code."""

    def __new__(cls, *_: object, **__: object) -> "_Blank":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Accept any arguments."""

    def __setstate__(self, state: object) -> None:
        """Keep the attributes."""
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: object, value: object) -> None:
        """Drop the value."""

    def append(self, value: object) -> None:
        """Drop the value."""

    def extend(self, values: object) -> None:
        """Drop the values."""


_PLAIN = {("argparse", "Namespace"): Namespace, ("collections", "OrderedDict"): OrderedDict}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return _PLAIN.get((module, name), _Blank)

    def persistent_load(self, _: object) -> _Blank:
        return _Blank()

"""The record of a job's data from the descriptions that Megatron keeps in its data cache.

With this record, jobs that never ran with the plugin can be traced. Megatron names the files of a
dataset by the MD5 of its description, and a blend's description holds those of its datasets
(core/datasets/{blended,megatron}_dataset.py).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np

from megatron_tokscale.core.arrays import Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import JSON
from megatron_tokscale.data.array_files import open_array
from megatron_tokscale.data.record import BlendRecord, DataRecord, DatasetRecord

_SUFFIX: Final = "-train-description.txt"
_LISTED: Final = 12  # jobs in a message that lists them
_NAMED: Final = 4  # datasets of a blend in such a message

type _Object = Mapping[str, JSON]


@dataclass(frozen=True)
class Description:
    """A training dataset as Megatron describes it.

    Attributes:
        file: path of the description.
        text: text of the file.
        content: the text, parsed as a JSON object.
    """

    file: Path
    text: str
    content: _Object

    @property
    def stem(self) -> str:
        """Beginning of the names of its files: KEY-CLASS-train."""
        return self.file.name.removesuffix("-description.txt")

    @property
    def datasets(self) -> list[_Object]:
        """Descriptions of a blend's datasets; empty for a single dataset."""
        rows = self.content.get("datasets", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TokscaleError(
                f"the datasets of {self.file} are no list of descriptions; remove it and start the "
                "job, which makes the same"
            )
        return cast("list[_Object]", rows)

    def __str__(self) -> str:
        """Return one line that distinguishes this description from others."""
        rows = self.datasets or [self.content]
        named = ", ".join(_named(row) for row in rows[:_NAMED])
        if len(rows) > _NAMED:
            named += f", and {len(rows) - _NAMED} more"
        blend = f"blend of {self.content.get('size')} samples: " if self.datasets else ""
        seed, length = (rows[0].get(what) for what in ("random_seed", "sequence_length"))
        return f"{self.stem[:8]}, sequence length {length}, seed {seed}: {blend}{named}"


def find_record(cache_dir: Path, match: Sequence[str] = (), extra: int = 1) -> DataRecord:
    """Return the record of the training data of a job, from its data cache.

    Args:
        cache_dir: the job's --data-cache-path; without one Megatron keeps the indices of a single
            dataset in PREFIX/cache/GPTDataset_indices, and none of a blend.
        match: words that the job's description, or its file's name, must hold, to choose one.
        extra: tokens that a sample reads beyond its sequence length; the cache does not hold them.

    Raises:
        TokscaleError: no job matches, or several do, which are listed.
    """
    if not cache_dir.is_dir():
        raise TokscaleError(f"{cache_dir} is no directory; give the job's --data-cache-path")
    found = _outside_blends(list(_descriptions(cache_dir)))
    if not found:
        raise TokscaleError(
            f"{cache_dir} holds no description of training data (*{_SUFFIX}); give the job's "
            "--data-cache-path"
        )
    chosen = [
        one for one in found if all(word in one.text or word in one.file.name for word in match)
    ]
    if not chosen:
        raise TokscaleError(
            f"none of the {len(found)} jobs in {cache_dir} holds {' and '.join(map(repr, match))}; "
            f"there are: {_listed(found)}"
        )
    if len(chosen) > 1:
        raise TokscaleError(
            f"{cache_dir} holds the data of {len(chosen)} jobs; choose one by words that only its "
            f"description or key holds, with --match: {_listed(chosen)}"
        )
    return _record(chosen[0], cache_dir, extra)


def map_cached(file: Path | str) -> Integers:
    """Map an array of whole numbers, of whatever size, in a data cache.

    Raises:
        TokscaleError: the file is missing or damaged.
    """
    array = open_array(
        file,
        str(file),
        ": the job's data cache was moved or removed; restore it, or start the job again, which "
        "makes the same",
        "remove it and start the job",
    )
    if not np.issubdtype(array.dtype, np.integer):
        raise TokscaleError(
            f"{file} is damaged: it holds {array.dtype}; expected whole numbers; remove it and "
            "start the job"
        )
    return cast(Integers, array)


def _descriptions(cache_dir: Path) -> Iterator[Description]:
    for file in sorted(cache_dir.glob(f"*{_SUFFIX}")):
        try:
            text = file.read_text(encoding="utf-8")
            content = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise TokscaleError(f"cannot read {file} ({error}); remove it") from error
        if not isinstance(content, dict):
            raise TokscaleError(f"{file} describes no dataset; expected an object; remove it")
        yield Description(file, text, content)


def _outside_blends(found: list[Description]) -> list[Description]:
    """Return the descriptions that are not part of a blend."""
    parts = {_stem(dataset) for one in found for dataset in one.datasets}
    return [one for one in found if one.stem not in parts]


def _record(one: Description, cache_dir: Path, extra: int) -> DataRecord:
    """Return the record of a described dataset or blend.

    Raises:
        TokscaleError: one of its files is missing or damaged, or it does not describe GPT datasets.
    """
    try:
        if "datasets" not in one.content:
            return DataRecord((_dataset(one.content, one.stem, cache_dir, extra),))
        datasets = tuple(
            _dataset(content, _stem(content), cache_dir, extra) for content in one.datasets
        )
    except KeyError as error:
        raise TokscaleError(
            f"{one.file} has no {error}; expected the description of a GPT dataset; choose another "
            "with --match"
        ) from error
    blend = BlendRecord.from_cache(cache_dir, one.stem, 0)
    assert blend.dataset_index is not None
    size = len(map_cached(blend.dataset_index))
    return DataRecord(datasets, BlendRecord.from_cache(cache_dir, one.stem, size))


def _dataset(content: _Object, stem: str, cache_dir: Path, extra: int) -> DatasetRecord:
    size = len(map_cached(cache_dir / f"{stem}-shuffle_index.npy"))
    return DatasetRecord.from_cache(cache_dir, str(content["dataset_path"]), stem, extra, size)


def _stem(content: _Object) -> str:
    """Return the beginning of the names of the files of a dataset with this description."""
    text = json.dumps(content, indent=4)
    key = hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()
    return f"{key}-{content.get('class')}-{content.get('index_split')}"


def _named(content: _Object) -> str:
    name = Path(str(content.get("dataset_path"))).name
    samples = content.get("num_samples")
    return f"{name} ({'one epoch' if samples is None else f'{samples} samples'})"


def _listed(found: Sequence[Description]) -> str:
    shown = "; ".join(str(one) for one in found[:_LISTED])
    return shown if len(found) <= _LISTED else f"{shown}; and {len(found) - _LISTED} more"

"""What a job read, from the descriptions that Megatron keeps in its data cache.

So jobs can be traced that never ran with the plugin. Megatron names the files of a dataset by the
MD5 of its description, and a blend's description holds those of its datasets
(core/datasets/{blended,megatron}_dataset.py).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.array_files import open_array
from megatron_tokscale.data.record import BlendRecord, DataRecord, DatasetRecord

_SUFFIX: Final = "-train-description.txt"
_LISTED, _NAMED = 12, 4


@dataclass(frozen=True)
class Description:
    """A training dataset as Megatron describes it.

    Attributes:
        file: where.
        text: what is in it.
        content: the same, read.
    """

    file: Path
    text: str
    content: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """What the names of its files begin with: KEY-CLASS-train."""
        return self.file.name.removesuffix("-description.txt")

    @property
    def datasets(self) -> list[Mapping[str, Any]]:
        """The descriptions of a blend's datasets; none of a dataset that is alone."""
        return list(self.content.get("datasets", []))

    def __str__(self) -> str:
        """One line that tells it from the others."""
        rows = self.datasets or [self.content]
        named = ", ".join(_named(row) for row in rows[:_NAMED])
        if len(rows) > _NAMED:
            named += f", and {len(rows) - _NAMED} more"
        blend = f"blend of {self.content.get('size')} samples: " if self.datasets else ""
        seed, length = (rows[0].get(what) for what in ("random_seed", "sequence_length"))
        return f"{self.stem[:8]}, sequence length {length}, seed {seed}: {blend}{named}"


def find_record(cache_dir: Path, match: Sequence[str] = (), extra: int = 1) -> DataRecord:
    """The training data of the job whose cache this is.

    Args:
        cache_dir: the job's --data-cache-path; without one Megatron keeps what it knows of a single
            dataset in PREFIX/cache/GPTDataset_indices, and nothing of a blend.
        match: words that the job's description, or its file's name, must hold, to choose one.
        extra: tokens that a sample reads behind its stretch; the cache does not tell.

    Raises:
        TokscaleError: there is none, or there are several, which are listed.
    """
    if not cache_dir.is_dir():
        raise TokscaleError(f"{cache_dir} is no directory; give the job's --data-cache-path")
    found = _whole(list(_descriptions(cache_dir)))
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


def map_cached(file: Path | str) -> NDArray[Any]:
    """Map an array of a data cache.

    Raises:
        TokscaleError: the file is missing or damaged.
    """
    return open_array(
        file,
        str(file),
        ": the job's data cache was moved or removed; restore it, or start the job again, which "
        "makes the same",
        "remove it and start the job",
    )


def _descriptions(cache_dir: Path) -> Iterator[Description]:
    for file in sorted(cache_dir.glob(f"*{_SUFFIX}")):
        try:
            text = file.read_text(encoding="utf-8")
            content = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise TokscaleError(f"cannot read {file} ({error}); remove it") from error
        if not isinstance(content, dict):
            raise TokscaleError(f"{file} describes no dataset; remove it")
        yield Description(file, text, content)


def _whole(found: list[Description]) -> list[Description]:
    """Those that are not part of a blend."""
    parts = {_stem(dataset) for one in found for dataset in one.datasets}
    return [one for one in found if one.stem not in parts]


def _record(one: Description, cache_dir: Path, extra: int) -> DataRecord:
    try:
        if "datasets" not in one.content:
            return DataRecord((_dataset(one.content, one.stem, cache_dir, extra),))
        datasets = tuple(
            _dataset(content, _stem(content), cache_dir, extra) for content in one.datasets
        )
    except KeyError as error:
        raise TokscaleError(
            f"{one.file} does not give {error}; trace reads GPT datasets"
        ) from error
    blend = BlendRecord.from_cache(cache_dir, one.stem, 0)
    assert blend.dataset_index is not None
    size = len(map_cached(blend.dataset_index))
    return DataRecord(datasets, BlendRecord.from_cache(cache_dir, one.stem, size))


def _dataset(content: Mapping[str, Any], stem: str, cache_dir: Path, extra: int) -> DatasetRecord:
    size = len(map_cached(cache_dir / f"{stem}-shuffle_index.npy"))
    return DatasetRecord.from_cache(cache_dir, content["dataset_path"], stem, extra, size)


def _stem(content: Mapping[str, Any]) -> str:
    """How Megatron names the files of a dataset that it describes so."""
    text = json.dumps(content, indent=4)
    key = hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()
    return f"{key}-{content.get('class')}-{content.get('index_split')}"


def _named(content: Mapping[str, Any]) -> str:
    name = Path(str(content.get("dataset_path"))).name
    samples = content.get("num_samples")
    return f"{name} ({'one epoch' if samples is None else f'{samples} samples'})"


def _listed(found: Sequence[Description]) -> str:
    shown = "; ".join(str(one) for one in found[:_LISTED])
    return shown if len(found) <= _LISTED else f"{shown}; and {len(found) - _LISTED} more"

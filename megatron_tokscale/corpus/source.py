"""The data of a training job, read from its flags as Megatron reads them.

The rules are those of megatron-core 0.17 to main: `get_blend_from_list`,
`get_blend_and_blend_per_split`, `parse_and_normalize_split` and the builder's division of
documents. A blend or a split with which Megatron fails, or which its user cannot have meant, is
refused.
"""

import math
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Final, Self

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.corpus.names import base_name, numbered, whole_prefix

PARTS: Final = ("train", "valid", "test")
DEFAULT_SPLIT: Final = "969, 30, 1"
"""The split that Megatron's validation of arguments sets if --data-path comes without --split."""

type DataPath = Sequence[str] | Mapping[str, Sequence[str]]
"""Megatron's --data-path words; with per-split arguments, the words of each part that has data."""

_UNREAD: Final = {
    "mock_data": "it has no files",
    "object_storage_cache_path": "only local files are read",
    "per_dataset_sequences_path": "the .idx files themselves are read; leave it out",
}


@dataclass(frozen=True)
class DataSource:
    """The data of a job: its datasets, their weights, and the division into parts.

    Attributes:
        words: --data-path words of all parts, or the words of each part (per-split arguments).
        split: Megatron's --split; None with per-split arguments, where a part is the whole of its
            own datasets.

    Raises:
        TokscaleError: on construction, if the words or the split cannot be read, or exclude each
            other.
    """

    words: DataPath
    split: str | None

    def __post_init__(self) -> None:
        is_per_split = isinstance(self.words, Mapping)
        if is_per_split == (self.split is not None):
            raise TokscaleError(
                "--data-path needs the job's --split; per-split data have none, as each part is "
                "the whole of its own datasets"
            )
        if self.split is not None:
            split_bounds(self.split)
        given = [part for part in PARTS if self._words(part)]
        if not given:
            raise TokscaleError("the job has no data; give --data-path or --train-data-path")
        for part in given if is_per_split else given[:1]:
            self.blend(part)

    @staticmethod
    def is_given(args: Namespace) -> bool:
        """Return whether a command line names data at all."""
        return any(getattr(args, name, None) is not None for name in _flags())

    @classmethod
    def from_flags(cls, args: Namespace) -> Self:
        """Read the data flags of a verb or of a job, validated by Megatron or not.

        Raises:
            TokscaleError: the flags give no data, give data in two ways, or in one that is not
                supported.
        """
        for name, reason in _UNREAD.items():
            if getattr(args, name, None):
                raise TokscaleError(f"--{name.replace('_', '-')} is not supported: {reason}")
        words: Sequence[str] | None = getattr(args, "data_path", None)
        file: str | Path | None = getattr(args, "data_args_path", None)
        split_file: str | Path | None = getattr(args, "per_split_data_args_path", None)
        of_parts = {part: getattr(args, f"{part}_data_path", None) for part in PARTS}
        by_part = {part: words for part, words in of_parts.items() if words is not None}
        if sum(way is not None for way in (words, file, split_file)) + bool(by_part) != 1:
            raise TokscaleError(
                "give the job's data in one way: --data-path, --data-args-path, --train-data-path "
                "with --valid-data-path and --test-data-path, or --per-split-data-args-path"
            )
        split: str | None = getattr(args, "split", None)
        if words is not None:
            return cls(words, DEFAULT_SPLIT if split is None else split)
        if file is not None:
            if split is None:
                raise TokscaleError(
                    "--data-args-path comes without --split, which Megatron requires with it; give "
                    "the job's --split"
                )
            return cls(read_data_args(Path(file)), split)
        if split_file is not None:
            by_part = read_per_split_data_args(Path(split_file))
        for part, part_words in by_part.items():
            parse_data_path(part_words, f"--{part}-data-path")
        return cls(by_part, split)

    def _words(self, part: str) -> Sequence[str] | None:
        return self.words.get(part) if isinstance(self.words, Mapping) else self.words

    def flag(self, part: str) -> str:
        """Return the flag that gives the datasets of a part."""
        return f"--{part}-data-path" if isinstance(self.words, Mapping) else "--data-path"

    def place(self, part: str) -> str:
        """Return the part in words, with the flag that defines it."""
        of = f"--split {self.split}" if self.split is not None else self.flag(part)
        return f"the {part} part of {of}"

    def blend(self, part: str) -> tuple[list[str], list[float] | None]:
        """Return the prefixes of a part and their weights, as `parse_data_path` does.

        Raises:
            TokscaleError: the part has no datasets, or its words cannot be read.
        """
        words, flag = self._words(part), self.flag(part)
        if not words:
            raise TokscaleError(f"the job has no data for its {part} part; give {flag}")
        return parse_data_path(words, flag)

    def names(self, part: str) -> dict[str, str]:
        """Map the whole prefix of each dataset of a part to its name, namesakes numbered.

        Raises:
            TokscaleError: the part has no datasets, or its words cannot be read.
        """
        prefixes = list(dict.fromkeys(map(whole_prefix, self.blend(part)[0])))
        return dict(
            zip(prefixes, numbered([base_name(prefix) for prefix in prefixes]), strict=True)
        )

    def portions(self, part: str) -> list[Portion]:
        """Open the datasets of one part of the job's data.

        A prefix that comes twice in a blend is one dataset with the sum of the weights. Namesakes
        are numbered in the order of the blend. Without weights, each dataset has the weight of its
        size.

        Args:
            part: train, valid or test.

        Raises:
            TokscaleError: a file is missing or damaged, or the part has no datasets.
        """
        prefixes, weights = self.blend(part)
        opened: dict[str, Portion] = {}
        for n, prefix in enumerate(prefixes):
            portion = opened.get(whole_prefix(prefix)) or self._open(prefix, part)
            weight = portion.n_tokens if weights is None else weights[n]
            opened[whole_prefix(prefix)] = replace(portion, weight=portion.weight + weight)
        total = 1.0 if weights else sum(portion.weight for portion in opened.values()) or 1.0
        return [
            replace(portion, unique_name=name, weight=portion.weight / total)
            for name, portion in zip(self.names(part).values(), opened.values(), strict=True)
        ]

    def _open(self, prefix: str, part: str) -> Portion:
        tokens = IndexedTokens.open(prefix)
        if self.split is None:
            return Portion(tokens, range(tokens.n_sequences), 0.0)
        return Portion(tokens, split_range(self.split, part, tokens.n_sequences), 0.0)


def _flags() -> list[str]:
    by_part = [f"{part}_data_path" for part in PARTS]
    return ["data_path", "data_args_path", "per_split_data_args_path", *by_part]


def read_data_args(path: Path) -> list[str]:
    """Return the --data-path words in the file of Megatron's --data-args-path.

    Raises:
        TokscaleError: the file cannot be read, or is empty.
    """
    _refuse_storage(path, "--data-args-path")
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise TokscaleError(f"--data-args-path: cannot read {path}: {error}") from error
    if not words:
        raise TokscaleError(f"--data-args-path: {path} is empty; it holds --data-path words")
    return words


def read_per_split_data_args(path: Path) -> dict[str, list[str]]:
    """Return the --data-path words of each part in Megatron's --per-split-data-args-path.

    The file is a JSON object with "train", "valid" and "test", each a list of words or one string
    of them, or null for a part without data.

    Raises:
        TokscaleError: the file cannot be read, or is not of this form.
    """
    flag = "--per-split-data-args-path"
    _refuse_storage(path, flag)
    content = read_json(path)
    words: dict[str, list[str]] = {}
    for part in PARTS:
        value = content.get(part, 0)
        items = value.split() if isinstance(value, str) else value
        if items is None:
            continue
        if not isinstance(items, list) or not all(map(_is_word, items)):
            raise TokscaleError(
                f'{flag}: {path} must give a list of words, a string of them or null as "{part}"'
            )
        words[part] = [str(item) for item in items]
    return words


def is_in_storage(path: Path | str) -> bool:
    """Return True for a path in object storage."""
    return str(path).startswith(("s3:/", "msc:/"))  # Path makes one slash of two


def _refuse_storage(path: Path, flag: str) -> None:
    if is_in_storage(path):
        raise TokscaleError(f"{flag}: {path} is in object storage; only local files are read")


def _is_word(item: object) -> bool:
    return isinstance(item, str | int | float) and not isinstance(item, bool)


def parse_data_path(
    words: Sequence[str], flag: str = "--data-path"
) -> tuple[list[str], list[float] | None]:
    """Parse Megatron's --data-path: `PREFIX ...` or `WEIGHT PREFIX WEIGHT PREFIX ...`.

    Returns:
        Prefixes, and their weights, summing to 1. No weights (None) mean to Megatron that every
        dataset is read once per epoch, that is, in proportion to its size.

    Raises:
        TokscaleError: a weight is missing, negative or not finite, there are no words, or a prefix
            does not name a local file.
    """
    if not words:
        raise TokscaleError(f"{flag} has no words; give prefixes, or weights and prefixes in turn")
    number_of = [_number(word) for word in words]
    if len(words) % 2 == 0 and any(number is not None for number in number_of[::2]):
        prefixes = [word.strip() for word in words[1::2]]
        weights = _weights(number_of[::2], words, flag)
    else:
        prefixes, weights = [word.strip() for word in words], None
        numbers = [
            word for word, number in zip(words, number_of, strict=True) if number is not None
        ]
        if numbers and len(words) > 1:
            raise TokscaleError(
                f"{flag} has {len(words)} words, of which Megatron takes {numbers[0]!r} for a "
                "prefix, not for a weight; expected a weight before every prefix, or before none; "
                "write ./NAME for a file of such a name"
            )
    for prefix in prefixes:
        if not prefix:
            raise TokscaleError(f"{flag} has an empty prefix; give the path without .bin/.idx")
        if is_in_storage(prefix):
            raise TokscaleError(
                f"{flag}: {prefix} is in object storage (--object-storage-cache-path); only local "
                "files are read; give a local copy"
            )
    return prefixes, weights


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _weights(numbers: Sequence[float | None], words: Sequence[str], flag: str) -> list[float]:
    weights = []
    for number, word, prefix in zip(numbers, words[::2], words[1::2], strict=True):
        if number is None:
            raise TokscaleError(
                f"{flag} has {word!r} where a weight is expected; give a weight before every "
                "prefix, or before none"
            )
        if not 0 <= number < math.inf:
            raise TokscaleError(
                f"{flag}: weight {word} of {prefix} is not a number from 0 on; weights must be "
                "positive numbers"
            )
        weights.append(number)
    if not 0 < sum(weights) < math.inf:
        raise TokscaleError(
            f"{flag}: the weights sum to {sum(weights)}; weights must be positive numbers"
        )
    return normalised(weights)


def normalised(values: Sequence[float]) -> list[float]:
    """Return the values over their sum, equal to Megatron's `normalize` to the last bit."""
    array = np.array(values, dtype=np.float64)
    shares: list[float] = (array / np.sum(array)).tolist()
    return shares


def split_bounds(split: str) -> list[float]:
    """Return the bounds of the parts under Megatron's --split, ascending from 0 to 1.

    Megatron takes every run of digits and points for a number, whatever is between them.

    Raises:
        TokscaleError: the split cannot be read, or Megatron would read other numbers than it shows
            (a sign, an exponent, a word).
    """
    advice = f"--split {split}: give up to three numbers like 969,30,1"
    if re.search(r"[^\W\d]|(?<![.\d])[-−][.\d]", split):
        raise TokscaleError(f"{advice}, without letters and signs, of which Megatron takes none")
    try:
        shares = [float(share) for share in re.findall(r"[.0-9]+", split)]
    except ValueError as error:
        raise TokscaleError(advice) from error
    shares += [0.0] * (len(PARTS) - len(shares))
    if len(shares) != len(PARTS) or not 0 < math.fsum(shares) < math.inf:
        raise TokscaleError(advice)
    return list(accumulate(normalised(shares), initial=0.0))


def split_range(split: str, part: str, n_sequences: int) -> range:
    """Return the sequences of the `part` (train, valid or test) under Megatron's --split.

    Raises:
        TokscaleError: the split cannot be read.
    """
    bounds, index = split_bounds(split), PARTS.index(part)
    return range(*(round(bound * float(n_sequences)) for bound in bounds[index : index + 2]))

"""Arrays of a file with one value per token, as columns of whole numbers.

Shapes: N tokens, n tokens of a piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import AnyArray, Integers16, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.words import counted
from megatron_tokscale.store.exchange.files import ArrayFile
from megatron_tokscale.store.tokens import TokenColumns

_MOST_DATASETS: Final = 1000
"""Most datasets that an array may name; our choice: more are groups of another kind, and every
dataset has a curve of its own in the results."""
_LARGEST: Final = 2**31 - 1
UNKNOWN_DATASET: Final = "all"
"""Name of the one dataset of losses that name none."""


@dataclass(frozen=True, kw_only=True)
class TokenArrays:
    """Names of the arrays that say something of the tokens; None for an array that is not there.

    Attributes:
        datasets: dataset of each token.
        documents: document of each token.
        samples: sample of each token.
        positions: position of each token in its document or sample.
        contexts: number of tokens that each token is predicted from.
        labels: id of each token.
    """

    datasets: str | None = None
    documents: str | None = None
    samples: str | None = None
    positions: str | None = None
    contexts: str | None = None
    labels: str | None = None

    @property
    def named(self) -> list[str]:
        """The names that are given."""
        return [name for name in vars(self).values() if name is not None]


def read_columns(
    file: ArrayFile, names: TokenArrays, n_tokens: int, vocab_size: int | None
) -> tuple[TokenColumns, tuple[str, ...]]:
    """Return the columns of the tokens, and the names of the datasets.

    Datasets, documents and samples may be numbers or words; equal ones are one dataset, document or
    sample. Documents and samples that are not whole numbers from 0 are numbered in the order in
    which they come.

    Raises:
        TokscaleError: an array is not there, has another length, missing values, or values of
            another kind; a label is no id of a vocabulary of `vocab_size` tokens.
    """
    for name in names.named:
        _check_length(file, name, n_tokens)
    dataset_N, datasets = _datasets(file, names.datasets, n_tokens)
    columns = TokenColumns(
        dataset_N=dataset_N,
        document_N=_groups(file, names.documents),
        sample_N=_groups(file, names.samples),
        position_N=_counts(file, names.positions),
        context_N=_counts(file, names.contexts, least=1),
        label_N=_labels(file, names.labels, vocab_size),
    )
    return columns, datasets


def _check_length(file: ArrayFile, name: str, n_tokens: int) -> None:
    if name not in file.arrays:
        raise TokscaleError(
            f"{file.path} has no array '{name}'; expected one of {', '.join(sorted(file.arrays))}"
        )
    shape = file.arrays[name].shape
    if shape != (n_tokens,):
        raise TokscaleError(
            f"array '{name}' of {file.path} has shape {shape}; expected ({n_tokens},), one value "
            "per token; name another array"
        )


def _pieces(file: ArrayFile, name: str) -> Iterator[AnyArray]:
    """Yield the pieces of an array with one value per token.

    Raises:
        TokscaleError: values are missing.
    """
    for _, piece in file.pieces(name):
        if _missing(piece):
            count = sum(_missing(each) for _, each in file.pieces(name))
            raise TokscaleError(
                f"array '{name}' of {file.path} has {counted(count, 'missing value')}; expected a "
                "value for every token; leave out the tokens without one, or give them an id"
            )
        yield piece


def _missing(piece: AnyArray) -> int:
    """Return the number of missing values: NaN, NaT, and null of a parquet file."""
    match piece.dtype.kind:
        case "f" | "c":
            return int(np.isnan(piece).sum())
        case "m" | "M":
            return int(np.isnat(piece).sum())
        case "O":
            return sum(value is None for value in piece.tolist())
    return 0


def _datasets(
    file: ArrayFile, name: str | None, n_tokens: int
) -> tuple[Integers16, tuple[str, ...]]:
    """Return the dataset of each token, and the datasets' names in ascending order."""
    if name is None:
        return np.zeros(n_tokens, np.int16), (UNKNOWN_DATASET,)
    code_N, values = _numbered(file, name, _MOST_DATASETS)
    names = [str(value) for value in values]
    order = sorted(range(len(names)), key=lambda i: (_as_number(names[i]), names[i]))
    place = np.empty(len(order), np.int16)
    place[order] = np.arange(len(order))
    return place[code_N], tuple(names[i] for i in order)


def _as_number(name: str) -> float:
    """Return the number that a name is, so that 2 comes before 10; infinity for a word."""
    return float(name) if name.isdecimal() else float("inf")


def _groups(file: ArrayFile, name: str | None) -> Integers32 | None:
    """Return the number of each token's document or sample."""
    if name is None:
        return None
    if file.arrays[name].dtype.kind in "iu":
        pieces = [np.zeros(0, np.int32)]
        for piece in _pieces(file, name):
            value_n = piece.astype(np.int64)
            if value_n.min() < 0 or value_n.max() > _LARGEST:
                break
            pieces.append(value_n.astype(np.int32))
        else:
            return np.concatenate(pieces)
    return _numbered(file, name, _LARGEST)[0]


def _numbered(file: ArrayFile, name: str, most: int) -> tuple[Integers32, list[object]]:
    """Return the number of each value among the distinct values, in the order in which they come.

    Raises:
        TokscaleError: there are more than `most` distinct values, or values are missing.
    """
    numbers: dict[object, int] = {}
    pieces = [np.zeros(0, np.int32)]
    for piece in _pieces(file, name):
        found, first, code_n = np.unique(_plain(piece), return_index=True, return_inverse=True)
        values = found.tolist()
        for i in np.argsort(first).tolist():
            numbers.setdefault(values[i], len(numbers))
        table = [numbers[value] for value in values]
        if len(numbers) > most:
            raise TokscaleError(
                f"array '{name}' of {file.path} has more than {most:,} distinct values; expected "
                "at most as many; name another array"
            )
        pieces.append(np.array(table, np.int32)[code_n])
    return np.concatenate(pieces), list(numbers)


def _plain(piece: AnyArray) -> AnyArray:
    """Return words of any type as strings."""
    if piece.dtype.kind == "S":
        return np.char.decode(piece.astype(np.bytes_), "utf-8", "replace")
    return piece.astype(str) if piece.dtype.kind == "O" else piece


def _counts(file: ArrayFile, name: str | None, least: int = 0) -> Integers32 | None:
    """Return whole numbers from `least`, one per token.

    Raises:
        TokscaleError: the array has other values, or values are missing.
    """
    if name is None:
        return None
    is_number = file.arrays[name].dtype.kind in "iuf"
    pieces = [np.zeros(0, np.int32)]
    for piece in _pieces(file, name):
        value_n = piece.astype(np.float64) if is_number else np.full(len(piece), np.nan)
        is_count_n = (value_n >= least) & (value_n <= _LARGEST) & (value_n == value_n.round())
        if not is_count_n.all():
            raise TokscaleError(
                f"array '{name}' of {file.path} has values that are not whole numbers from "
                f"{least}; expected such numbers; name another array"
            )
        pieces.append(value_n.astype(np.int32))
    return np.concatenate(pieces)


def _labels(file: ArrayFile, name: str | None, vocab_size: int | None) -> Integers32 | None:
    """Return the id of each token."""
    label_N = _counts(file, name)
    if label_N is not None and vocab_size is not None and label_N.max(initial=0) >= vocab_size:
        raise TokscaleError(
            f"array '{name}' of {file.path} has the label {label_N.max()}; expected ids below the "
            f"vocabulary's size of {vocab_size}; name another array, or give --vocab-size"
        )
    return label_N

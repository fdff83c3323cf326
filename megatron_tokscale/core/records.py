"""Frozen dataclasses as plain JSON values, and back: one mechanism for every JSON file.

| annotation | JSON |
|---|---|
| `None`, `bool`, `int`, `str` | the same |
| `float` | a number; null for NaN and infinity, which are read as NaN |
| `Literal[...]`, an `Enum` | one of its values |
| `tuple[T, ...]`, `tuple[T, U]`, `list[T]` | a list |
| `dict[str, T]`, `Mapping[str, T]` | an object |
| a dataclass | an object with its fields; a field with a default may be missing |
| `JSON` | any plain value, as it is |
| a union | the member whose form the value has; of dataclasses the one that has its fields |

A library (cattrs, msgspec, pydantic) does the same and more. This module needs no package on a
machine that only fits, and keeps NaN, the mark of an undefined number, apart from a missing one.
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAliasType, Union, cast, get_args, get_origin

import numpy as np

from megatron_tokscale.core.errors import TokscaleError

type JSON = bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None
"""A plain value, as `json.dumps` takes it and `json.loads` returns it."""

_SHOWN_CHARACTERS = 60  # length at which a message of one line cuts a wrong value
_NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
}
"""JSON's names of the plain types."""


def to_json(value: object) -> JSON:
    """Return dataclasses, containers, numpy numbers and arrays as plain JSON values.

    Raises:
        TypeError: JSON has no form for the value.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return _container_to_json(value)


def from_json[T](kind: type[T], content: JSON, where: str = "") -> T:
    """Return the value of type `kind` that `to_json` turned into `content`.

    Args:
        kind: a dataclass, or another annotation of the table above.
        content: plain JSON values.
        where: name of the value in messages, e.g. "spectrum".

    Raises:
        ValueError: naming the first field that is missing, unknown or not of its type.
    """
    return cast("T", _read(kind, content, where))


def read_as[T](kind: type[T], content: JSON, path: Path, remedy: str) -> T:
    """Return `from_json(kind, content)` of a file's content.

    Raises:
        TokscaleError: the content is not a `kind`; the message names `path` and `remedy`.
    """
    try:
        return from_json(kind, content)
    except ValueError as error:
        raise TokscaleError(f"{path} is damaged: {error}; {remedy}") from error


def _container_to_json(value: object) -> JSON:
    if dataclasses.is_dataclass(value):
        return {each.name: to_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [to_json(each) for each in value]
    raise TypeError(f"a result is of type {type(value).__name__}; JSON has no form for it")


def _read(kind: object, content: JSON, where: str) -> object:
    """Read the value at `where` as one of the annotation `kind`."""
    if kind is JSON:
        return content
    if isinstance(kind, TypeAliasType):
        return _read(kind.__value__, content, where)
    read = _reader(kind)
    return read(kind, content, where)


def _reader(kind: object) -> "_Reader":
    """Return the function that reads values of the annotation `kind`."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union
    if origin in (tuple, list):
        return _read_sequence
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _read_mapping
    if dataclasses.is_dataclass(kind):
        return _read_dataclass
    return _read_plain


type _Reader = typing.Callable[[object, JSON, str], object]


def _read_plain(kind: object, content: JSON, where: str) -> object:
    if get_origin(kind) is Literal:
        return _checked(content in get_args(kind), content, where, f"one of {get_args(kind)}")
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = [each.value for each in kind]
        return kind(_checked(content in values, content, where, f"one of {values}"))
    if kind is float:
        is_number = type(content) in (int, float, type(None))
        _checked(is_number, content, where, f"{_NAMES[float]} or null")
        return math.nan if content is None else float(cast("float", content))
    kind = type(None) if kind is None else kind
    if kind not in _NAMES:
        raise TypeError(f"{where or 'a field'} is annotated {kind}; JSON has no form for it")
    return _checked(type(content) is kind, content, where, _NAMES[kind])


def _read_mapping(kind: object, content: JSON, where: str) -> dict[str, object]:
    _checked(isinstance(content, Mapping), content, where, "an object")
    of = get_args(kind)[1]
    rows = cast("Mapping[str, JSON]", content).items()
    return {name: _read(of, each, _within(where, name)) for name, each in rows}


def _read_sequence(kind: object, content: JSON, where: str) -> object:
    is_list = isinstance(content, Sequence) and not isinstance(content, str)
    _checked(is_list, content, where, "a list")
    values = cast("Sequence[JSON]", content)
    members = get_args(kind)
    if get_origin(kind) is list or members[1:] == (Ellipsis,):
        members = (members[0],) * len(values)
    _checked(len(values) == len(members), content, where, f"a list of {len(members)}")
    rows = enumerate(zip(members, values, strict=True))
    read = [_read(member, each, f"{where}[{i}]") for i, (member, each) in rows]
    return read if get_origin(kind) is list else tuple(read)


def _read_dataclass(kind: object, content: JSON, where: str) -> object:
    _checked(isinstance(content, Mapping), content, where, "an object")
    values = cast("Mapping[str, JSON]", content)
    required, known = _fields(kind)
    for name in sorted(values.keys() - known):
        raise ValueError(f"{_within(where, name)} is unknown; expected only {sorted(known)}")
    for name in sorted(required - values.keys()):
        raise ValueError(f"{_within(where, name)} is missing")
    annotations = typing.get_type_hints(kind)
    read = {
        name: _read(annotations[name], each, _within(where, name)) for name, each in values.items()
    }
    return cast("type", kind)(**read)


def _read_union(kind: object, content: JSON, where: str) -> object:
    dataclass, *others = [each for each in get_args(kind) if each is not type(None)]
    if isinstance(content, Mapping) and dataclasses.is_dataclass(dataclass) and not others:
        return _read(dataclass, content, where)  # `T | None`: the message names the fault within T
    members = [each for each in get_args(kind) if _has_form_of(each, content)]
    if len(members) != 1:
        _checked(False, content, where, " or ".join(map(_name, get_args(kind))))
    return _read(members[0], content, where)


def _name(member: object) -> str:
    """Return the name of a union's member in messages."""
    return _NAMES[member] if member in _NAMES else str(getattr(member, "__name__", member))


def _has_form_of(member: object, content: JSON) -> bool:
    """Return whether the content may be the union's `member`; null is never a float there."""
    if dataclasses.is_dataclass(member):
        required, known = _fields(member)
        return isinstance(content, Mapping) and required <= content.keys() <= known
    if content is None:
        return member in (None, type(None))
    try:
        _read(member, content, "")
    except ValueError:
        return False
    return True


def _fields(kind: object) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of a dataclass's fields without a default, and of all its fields."""
    fields = dataclasses.fields(cast("type", kind))
    required = (
        each.name
        for each in fields
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    )
    return frozenset(required), frozenset(each.name for each in fields)


def _within(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _checked(is_right: bool, content: JSON, where: str, expected: str) -> JSON:
    if not is_right:
        text = repr(content)
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
        raise ValueError(f"{where or 'the value'} is {shown}; expected {expected}")
    return content

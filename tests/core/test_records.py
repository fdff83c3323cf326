"""Records are read from JSON as they were written, or a message names the wrong field."""

import enum
import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import JSON, from_json, read_as, to_json


class Kind(enum.Enum):
    FALLING = "falling"
    FLAT = "flat"


@dataclass(frozen=True)
class Reason:
    undefined: str


@dataclass(frozen=True)
class Number:
    value: float
    low: float = math.nan


@dataclass(frozen=True)
class Result:
    name: str
    steps: tuple[int, ...]
    edges: tuple[float, float]
    kind: Kind
    axis: Literal["D", "M"]
    by_name: dict[str, Number | Reason]
    law: Number | None
    is_whole: bool = True


RESULT = Result(
    "run", (0, 1, 2), (0.5, 1.0), Kind.FLAT, "M", {"a": Number(1.5), "b": Reason("too few")}, None
)


def through_json(value):
    return json.loads(json.dumps(to_json(value), allow_nan=False))


def test_a_result_is_read_as_it_was_written():
    read = from_json(Result, through_json(RESULT))
    assert math.isnan(read.by_name["a"].low)
    assert read.by_name["a"].value == 1.5
    assert read.by_name["b"] == Reason("too few")
    assert (read.steps, read.edges, read.kind, read.law) == ((0, 1, 2), (0.5, 1.0), Kind.FLAT, None)


def test_numbers_and_arrays_of_numpy_are_plain_values():
    values = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "x_K": np.array([1.0, np.nan]),
    }
    assert to_json(values) == {"n": 3, "x": 0.5, "x_K": [1.0, None]}
    assert to_json(np.True_) is True


def test_a_whole_number_in_a_float_field_is_read_as_a_float():
    read = from_json(Number, {"value": 2})
    assert type(read.value) is float


def test_nan_and_infinity_are_written_as_null_and_read_as_nan():
    assert to_json(Number(math.inf)) == {"value": None, "low": None}
    assert math.isnan(from_json(Number, {"value": None}).value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", [0, "1"], r"steps\[1\] is '1'; expected a whole number"),
        ("steps", [True], r"steps\[0\] is True; expected a whole number"),
        ("steps", "012", "steps is '012'; expected a list"),
        ("edges", [1.0], r"edges is \[1.0\]; expected a list of 2"),
        ("kind", "rising", "kind is 'rising'; expected one of"),
        ("axis", "T", "axis is 'T'; expected one of"),
        ("by_name", [], r"by_name is \[\]; expected an object"),
        ("by_name", {"a": {"value": 1, "undefined": "x"}}, "by_name.a is .*; expected Number or"),
        ("by_name", {"a": {}}, "by_name.a is {}; expected Number or Reason"),
        ("law", 3, "law is 3; expected Number or null"),
        ("law", {"value": "x"}, "law.value is 'x'; expected a number or null"),
        ("law", {"value": 1, "extra": 1}, "law.extra is unknown"),
        ("is_whole", 1, "is_whole is 1; expected true or false"),
        ("extra", 1, "extra is unknown"),
    ],
)
def test_a_wrong_value_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        from_json(Result, {**through_json(RESULT), name: value})


def test_a_missing_field_is_named_unless_it_has_a_default():
    content = through_json(RESULT)
    del content["is_whole"]
    assert from_json(Result, content).is_whole
    del content["steps"]
    with pytest.raises(ValueError, match="steps is missing"):
        from_json(Result, content)


def test_a_file_is_named_with_what_to_do(tmp_path):
    with pytest.raises(TokscaleError, match=r"laws.json is damaged: value is missing; run `laws`"):
        read_as(Number, {}, tmp_path / "laws.json", "run `laws` again")


def test_a_plain_value_is_read_as_it_is():
    content = {"n": 1, "rows": [1, 2.5, None, {"is": True}], "name": "x"}
    assert from_json(dict[str, JSON], content) == content

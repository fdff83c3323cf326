"""Results as plain JSON values, and reasons in the place of what is not defined."""

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.errors import TokscaleError


def plain(value: Any) -> Any:
    """Dataclasses, arrays and numbers as JSON has them; null for NaN and infinity."""
    text = json.dumps(value, default=_default)
    return json.loads(text, parse_constant=lambda _: None)


def _default(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist()  # numpy's


def or_reason(compute: Callable[[], Any]) -> dict[str, Any]:
    """The result as JSON, or {"undefined": why}."""
    try:
        return dict(plain(compute()))
    except TokscaleError as error:
        return {"undefined": str(error)}


def interval(value_R: ArrayLike) -> tuple[float, float]:
    """2.5% and 97.5% of the resamples, which are all but the first; NaN if there are none."""
    drawn_R = np.asarray(value_R, dtype=np.float64)[1:]
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if len(drawn_R) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn_R, [0.025, 0.975]).tolist()
    return low, high

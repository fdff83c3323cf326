"""Results as plain JSON values, and reasons in the place of what is not defined."""

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from megatron_tokscale.core.errors import UndefinedError


def plain(value: Any) -> Any:
    """Dataclasses, arrays and numbers as JSON has them; null for NaN and infinity."""
    text = json.dumps(value, default=_default)
    return json.loads(text, parse_constant=lambda _: None)


def _default(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist()  # numpy's


def or_reason(compute: Callable[[], Any]) -> dict[str, Any]:
    """Return the result as JSON, or {"undefined": why}; bad input (a `TokscaleError`) goes on."""
    try:
        return dict(plain(compute()))
    except UndefinedError as error:
        return {"undefined": str(error)}

"""How well a spectrum reconstructs the loss, as a table for a terminal."""

from collections.abc import Mapping
from typing import Any


def describe_spectrum(result: Mapping[str, Any]) -> str:
    """R^2 of the reconstructions and the widths beside their null, from reconstruction.json."""
    lines = [f"  {'-dL/dx rebuilt from':<40}{'R^2':>8}{'other documents':>18}"]
    sources = {
        "full": "every token's own transition",
        "kernel": "drop-weighted spectrum, one kernel",
        "spectrum": "learning times alone",
    }
    for name, meaning in sources.items():
        same = _number(result["same_tokens"][name]["r2"])
        other = _number(result["other_documents"][name]["r2"])
        lines.append(f"  {name + ': ' + meaning:<40}{same:>8}{other:>18}")
    observed, null = result["widths"]["observed"], result["widths"]["mean_curve_null"]
    lines.append(
        "  10-90% width, median: "
        f"{_number(observed['width_decades']['p50'])} decades of time; if every token followed "
        f"the mean curve: {_number(null['width_decades']['p50'])}"
    )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

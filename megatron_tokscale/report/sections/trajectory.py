"""One token's losses and the model of its class as a small SVG, styled by the page.

Shapes: K probe steps, G grid points.
"""

from collections.abc import Callable

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.report.markup import escape
from megatron_tokscale.report.scale import TimeScale

_WIDTH, _HEIGHT = 300, 118
_LEFT, _RIGHT, _TOP, _BOTTOM = 26, 6, 6, 18
_MAX_POINTS = 120


def trajectory(
    scale: TimeScale,
    time_K: Floats,
    loss_K: Floats,
    time_G: Floats,
    model_G: Floats,
    midpoints: list[float],
    alt: str,
) -> str:
    """Draw losses (points), model (line) and transition midpoints; times in the scale's unit.

    The y axis begins at 0 and ends at one nat, or above the token's highest loss.
    """
    keep = np.unique(np.linspace(0, len(time_K) - 1, min(len(time_K), _MAX_POINTS)).astype(int))
    finite = loss_K[np.isfinite(loss_K)]
    top = max(1.05 * float(finite.max()) if len(finite) else 1.0, 1.0)

    def across(time: Floats) -> Floats:
        share = np.log(scale.place(time) / scale.left) / np.log(scale.high / scale.left)
        return np.asarray(_LEFT + share * (_WIDTH - _LEFT - _RIGHT))

    def down(loss: Floats) -> Floats:
        return np.asarray(_TOP + (1 - loss / top) * (_HEIGHT - _TOP - _BOTTOM))

    points = "".join(
        f"M{x:.1f} {y:.1f}h0"
        for x, y in zip(across(time_K[keep]), down(loss_K[keep]), strict=True)
        if np.isfinite(y)
    )
    line = "L".join(
        f"{x:.1f} {y:.1f}"
        for x, y in zip(across(time_G), down(model_G), strict=True)
        if np.isfinite(y)
    )
    floor = _HEIGHT - _BOTTOM
    marks = "".join(f"M{x:.1f} {_TOP}V{floor}" for x in across(np.array(midpoints)))
    return "".join(
        [
            f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
            f'<path class="a" d="M{_LEFT} {_TOP}V{floor}H{_WIDTH - _RIGHT}"/>',
            _y_labels(top, down),
            _x_labels(scale, across),
            f'<path class="c" d="{marks}"/>' if marks else "",
            f'<path class="m" d="M{line}"/>' if line else "",
            f'<path class="p" d="{points}"/>',
            "</svg>",
        ]
    )


def _y_labels(top: float, down: Callable[[Floats], Floats]) -> str:
    """0 and at most three multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(top / 3))
    step = next(m * power for m in (1, 2, 5, 10) if top < 4 * m * power)
    value = np.arange(0.0, top * (1 + 1e-9), step)
    return "".join(
        f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{v:g}</text>'
        for v, y in zip(value, down(value), strict=True)
    )


def _x_labels(scale: TimeScale, across: Callable[[Floats], Floats]) -> str:
    ticks = scale.ticks()
    return "".join(
        f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{label}</text>'
        for x, label in zip(across(np.array(list(ticks))), ticks.values(), strict=True)
    )

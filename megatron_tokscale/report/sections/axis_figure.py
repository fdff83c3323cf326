"""The figure of the slope of the mean loss along D or M.

Shapes: G grid points, R resamples (the first is the data as they are), K runs.
"""

from typing import Any

import numpy as np

from megatron_tokscale.report.figures import band
from megatron_tokscale.report.scale import TimeScale, short
from megatron_tokscale.report.style import MEASURED
from megatron_tokscale.report.svg import draw, time_axis
from megatron_tokscale.results import AxisResult

SIZES = {
    "tokens": "training tokens",
    "parameters": "parameters",
    "non-embedding": "parameters without embeddings",
    "flops": "FLOPs per token",
}


def axis_derivative(anchor: str, axis: AxisResult) -> str:
    """Draw the measured -dL/dx over the size, with the sizes of the runs."""
    arrays, size = axis.arrays, SIZES[axis.result["size"]]
    size_G, size_K = np.exp(arrays["x_G"]), np.exp(arrays["x_K"])
    measured_RG = arrays["measured_RG"]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        if len(measured_RG) > 2:
            band(axes, size_G, np.quantile(measured_RG[1:], [0.025, 0.975], axis=0), MEASURED)
        axes.plot(size_G, measured_RG[0], color=MEASURED, lw=2.4)
        for each in size_K:
            axes.axvline(each, color="#999999", lw=0.8, ls=(0, (1, 2)))
        time_axis(axes, TimeScale(float(size_K[0]), float(size_K[-1]), has_zero=False), size)
        axes.set_xticks(size_K, [short(each) for each in size_K])
        axes.set_xticks([], minor=True)
        axes.set_ylabel("−dL/dx (nats per unit of x)")

    alt = f"Measured derivative of the mean loss over {size}"
    return draw(anchor, alt, 3.4, paint)

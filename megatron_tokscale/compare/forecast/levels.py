"""The level of a mean loss curve at a time, by a local polynomial, as weights of its probes.

A single probe is a little lucky or unlucky. A polynomial in x through the probes of an octave on
either side is less so; at the end of the curve it has the octave before alone.

Shapes: K probe steps.
"""

import math
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit.mean_curve import MeanCurve

ROUNDING: Final = 1e-9
"""In x: a probe at exactly half of a time belongs to the first half."""
_REACH: Final = math.log(2)  # probes on either side of a level (our choice)
_LEAST_PROBES: Final = {2: 6, 1: 3}  # probes for a parabola, for a line (our choice)
_LEAST_CURVE: Final = 8  # probes of which the noise is known, as in `fit.common_shifts`


def level_weights(x_K: Floats, at: float, until: float) -> Floats:
    """Return weights of the probes whose weighted sum is the level of a curve at `at`, (K,).

    Args:
        x_K: natural logarithm of time at the probes.
        at: x of the level.
        until: x of the last probe that may be used.
    """
    used_K = np.isfinite(x_K) & (np.abs(x_K - at) <= _REACH + ROUNDING) & (x_K <= until + ROUNDING)
    if used_K.sum() < _LEAST_PROBES[1]:
        # Probes that are far apart in x: the nearest ones.
        allowed = np.flatnonzero(np.isfinite(x_K) & (x_K <= until + ROUNDING))
        nearest = allowed[np.argsort(np.abs(x_K[allowed] - at), kind="stable")]
        used_K[nearest[: _LEAST_PROBES[1]]] = True
    degree = max(
        (each for each, least in _LEAST_PROBES.items() if used_K.sum() >= least), default=0
    )
    powers = np.vander(x_K[used_K] - at, degree + 1, increasing=True)
    weight_K = np.zeros(len(x_K))
    weight_K[used_K] = np.linalg.pinv(powers)[0]
    return weight_K


def probe_noise(x_K: Floats, mean_K: Floats) -> float:
    """Return the standard deviation of a probe's mean loss about a smooth curve, in nats.

    It is that of `fit.common_shifts`, over the timed probes.

    Raises:
        UndefinedError: there are fewer than eight timed probes.
    """
    timed_K = np.isfinite(x_K)
    if timed_K.sum() < _LEAST_CURVE:
        raise UndefinedError(
            f"{timed_K.sum()} probes are too few for a forecast; expected {_LEAST_CURVE} or more; "
            "probe more often"
        )
    curve = MeanCurve.from_means(x_K[timed_K], mean_K[timed_K])
    return math.sqrt(max(curve.noise_variance, 0.0))

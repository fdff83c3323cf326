"""Noise of unit variance with a correlation between neighbours along the last axis."""

import numpy as np
from scipy.signal import lfilter


def correlated_noise(rng, shape, correlation=0.0):
    """Return stationary autoregressions of order one."""
    white = rng.standard_normal(shape)
    white[..., 1:] *= np.sqrt(1 - correlation**2)
    return lfilter([1.0], [1.0, -correlation], white, axis=-1)

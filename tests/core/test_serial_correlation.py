"""Correlations of residuals, against processes whose correlation is planted."""

import numpy as np
import pytest
from correlated import correlated_noise

from megatron_tokscale.core.serial_correlation import effective_points, serial_correlation


def test_serial_correlation_of_an_ar1_process_is_the_planted_one():
    noise = correlated_noise(np.random.default_rng(2), (400, 60), 0.5)
    assert serial_correlation(noise, 1).mean() == pytest.approx(0.5, abs=0.04)
    assert serial_correlation(np.zeros((1, 60)), 3) == 0
    assert effective_points(60, 0.5) == pytest.approx(20)

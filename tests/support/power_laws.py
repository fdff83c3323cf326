"""Power laws over the sum of the learning rates with correlated noise. K probes."""

import numpy as np
from correlated import correlated_noise

TAU_K = np.geomspace(60, 6000, 30)


def law(tau, scale=12.0, exponent=1 / 3, floor=2.0):
    return floor + scale * tau**-exponent


def noisy(rng, loss, noise=0.005, correlation=0.5):
    return loss * np.exp(noise * correlated_noise(rng, loss.shape, correlation))

"""Power laws over the sum of the learning rates with correlated noise. K probes."""

import numpy as np

TAU_K = np.geomspace(60, 6000, 30)


def correlated_noise(rng, shape, correlation):
    """Stationary AR(1) processes of variance one along the last axis."""
    noise = rng.standard_normal(shape)
    for k in range(1, shape[-1]):
        fresh = np.sqrt(1 - correlation**2) * noise[..., k]
        noise[..., k] = correlation * noise[..., k - 1] + fresh
    return noise


def law(tau, scale=12.0, exponent=1 / 3, floor=2.0):
    return floor + scale * tau**-exponent


def noisy(rng, loss, noise=0.005, correlation=0.5):
    return loss * np.exp(noise * correlated_noise(rng, loss.shape, correlation))

"""Planted trajectories over the ranges that the demo's run shows, with white or correlated noise.

Of its 32,032 tokens at 59 probes: drops 1.6 to 8.7 nats (5 to 95% of the falling tokens), widths
0.06 to 1.07 in ln(step), residual standard deviations 0.30 to 0.80 nats, their lag-one
autocorrelation 0.25 to 0.89 with median 0.63. The generator covers these and clearer tokens.

Shapes: N tokens, K probe steps.
"""

from dataclasses import dataclass

import numpy as np
from correlated import correlated_noise
from runs import log_time, probe_steps
from scipy.special import expit

from megatron_tokscale.fit import TokenClass

DEMO_NOISE, DEMO_AUTOCORRELATION = 0.47, 0.6


@dataclass
class PlantedSigmoids:
    """Losses of one falling sigmoid per token, and the parameters they were made from."""

    x_K: np.ndarray
    loss_NK: np.ndarray
    floor_N: np.ndarray
    drop_N: np.ndarray
    midpoint_N: np.ndarray
    width_N: np.ndarray
    noise_N: np.ndarray

    def cramer_rao_N(self):
        """The least standard error that any unbiased estimate of c can have, noise being white."""
        x_K = np.where(np.isfinite(self.x_K), self.x_K, -1e4)
        u_NK = (self.midpoint_N[:, None] - x_K) / self.width_N[:, None]
        s_NK = expit(u_NK)
        bump_NK = s_NK * (1 - s_NK) * (self.drop_N / self.width_N)[:, None]
        jacobian = np.stack([np.ones_like(s_NK), s_NK, bump_NK, -u_NK * bump_NK], axis=1)
        information = jacobian @ jacobian.swapaxes(1, 2) / self.noise_N[:, None, None] ** 2
        information += 1e-9 * np.eye(4)
        return np.sqrt(np.linalg.inv(information)[:, 2, 2])


def sigmoids(n_tokens, n_probes, seed=0, autocorrelation=0.0):
    """Falling sigmoids with every parameter drawn by itself."""
    rng = np.random.default_rng(seed)
    x_K = log_time(probe_steps(n_probes))
    floor, drop = rng.uniform(0, 3, n_tokens), rng.uniform(0.5, 9, n_tokens)
    midpoint = rng.uniform(2.5, 8.0, n_tokens)
    width = np.exp(rng.uniform(np.log(0.05), np.log(1.1), n_tokens))
    noise = np.exp(rng.uniform(np.log(0.05), np.log(0.8), n_tokens))
    clean = floor[:, None] + drop[:, None] * expit((midpoint[:, None] - x_K) / width[:, None])
    loss = clean + noise[:, None] * correlated_noise(rng, clean.shape, autocorrelation)
    return PlantedSigmoids(x_K, loss.astype(np.float32), floor, drop, midpoint, width, noise)


def of_class(token_class, n_tokens, x_K, seed=0):
    """Noiseless losses of one class on an axis that begins at 0; changes of 1.5 to 6 nats."""
    rng = np.random.default_rng([seed, int(token_class)])
    span = x_K[-1]

    def step(low, high, sign=1):
        midpoint = rng.uniform(low, high, (n_tokens, 1)) * span
        width = np.exp(rng.uniform(np.log(0.1), np.log(0.6), (n_tokens, 1)))
        return sign * rng.uniform(1.5, 6, (n_tokens, 1)) * expit((midpoint - x_K) / width)

    level = rng.uniform(1, 4, (n_tokens, 1))
    if token_class == TokenClass.FLAT_KNOWN:
        return np.broadcast_to(rng.uniform(0, 0.3, (n_tokens, 1)), (n_tokens, len(x_K)))
    if token_class == TokenClass.FLAT_UNLEARNED:
        return np.broadcast_to(rng.uniform(3, 9, (n_tokens, 1)), (n_tokens, len(x_K)))
    if token_class == TokenClass.FALLING:
        return level + step(0.2, 0.8)
    if token_class == TokenClass.RISING:
        return level + step(0.2, 0.8, -1)
    if token_class == TokenClass.TWO_STEP:
        sign = np.where(np.arange(n_tokens) % 2, 1, -1)[:, None]
        return level + step(0.15, 0.4) + sign * step(0.6, 0.85)
    onset = rng.uniform(0.1, 0.5, (n_tokens, 1)) * span
    slope = rng.uniform(1.5, 6, (n_tokens, 1)) / (span - onset)
    return 9 - slope * np.maximum(np.maximum(x_K, 0) - onset, 0)

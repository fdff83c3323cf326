"""Planted runs of several sizes, in which larger models learn the same earlier, or other tokens.

Every token has one sigmoid in ln time. In a run that is smaller by u = ln size - ln largest size
its midpoint comes later by -kappa u; and a share 1 - exp(missing u) of the tokens, drawn once,
never falls. The last probe is at step 640, the noise has a lag-one autocorrelation of 0.6, and
every run has its own jitter of the midpoints, of 0.3.

Shapes: N tokens, K probes, R runs, S values of u.
"""

from dataclasses import dataclass

import numpy as np
from correlated import correlated_noise
from scipy.special import expit

LAST_STEP = 640
JITTER = 0.3
SPAN = 2.9  # e-folds of size from the smallest run to the largest


def steps():
    """Step 0 and eight probes per octave."""
    return np.concatenate([[0], np.unique(np.round(2 ** (np.arange(0, 75) / 8)))])


def clock():
    """x of the steps."""
    with np.errstate(divide="ignore"):
        return np.log(steps())


@dataclass(frozen=True)
class Tokens:
    """Planted tokens: sigmoids of the largest run, and the place in the order of learnability."""

    midpoint_N: np.ndarray
    drop_N: np.ndarray
    width_N: np.ndarray
    floor_N: np.ndarray
    learnable_N: np.ndarray

    @classmethod
    def draw(cls, n_tokens, rng):
        return cls(
            np.log(30) + rng.exponential(2, n_tokens),
            np.exp(rng.normal(np.log(3.5), 0.5, n_tokens)),
            0.4 * np.exp(0.5 * rng.standard_normal(n_tokens)),
            rng.uniform(0.3, 2.5, n_tokens),
            rng.random(n_tokens),
        )

    def losses(self, x_K, u, rng, *, kappa, missing=0.0, noise=0.45):
        """Return loss_NK of one training run of ln size u below the largest."""
        n = len(self.midpoint_N)
        at_N = self.midpoint_N - kappa * u + JITTER * rng.standard_normal(n)
        learned_N = self.learnable_N < np.exp(missing * u)
        fallen_NK = expit((np.maximum(x_K, -1e6) - at_N[:, None]) / self.width_N[:, None])
        clean_NK = self.floor_N[:, None] + self.drop_N[:, None] * (
            1 - fallen_NK * learned_N[:, None]
        )
        return (clean_NK + noise * correlated_noise(rng, clean_NK.shape, 0.6)).astype(np.float32)

    def mean_fallen(self, x, jitters=64):
        """Return the mean fall of the largest run's tokens up to x, in nats, without noise."""
        offsets = JITTER * np.sqrt(2) * np.polynomial.hermite.hermgauss(jitters)[0]
        weights = np.polynomial.hermite.hermgauss(jitters)[1] / np.sqrt(np.pi)
        u_NJ = (x - self.midpoint_N[:, None] - offsets) / self.width_N[:, None]
        return float((self.drop_N * (expit(u_NJ) @ weights)).mean())


def log_sizes(n_sizes, seeds=1):
    """ln size of every run, ascending; each size `seeds` times."""
    return np.repeat(np.linspace(-SPAN, 0, n_sizes), seeds)


def true_share(tokens, kappa, missing, x=None, points=33):
    """Return the share of the gain from the smallest to the largest that is learned earlier.

    The gain is the integral over u of kappa a(u) F'(x + kappa u) + a'(u) F(x + kappa u), where F is
    the mean fall and a(u) = exp(missing u) the share of learnable tokens.
    """
    x = clock()[-1] if x is None else x
    u_S = np.linspace(-SPAN, 0, points)
    fall_S = np.array([tokens.mean_fallen(x + kappa * u) for u in u_S])
    ahead_S = np.array([tokens.mean_fallen(x + kappa * u + 1e-3) for u in u_S])
    learnable_S = np.exp(missing * u_S)
    earlier_S = kappa * learnable_S * (ahead_S - fall_S) / 1e-3
    never_S = missing * learnable_S * fall_S
    earlier, never = np.trapezoid(earlier_S, u_S), np.trapezoid(never_S, u_S)
    return float(earlier / (earlier + never))

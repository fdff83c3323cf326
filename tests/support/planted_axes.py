"""Planted runs of several sizes, in which larger models learn the same earlier, or other tokens.

Every token has one sigmoid in ln time. In a run that is smaller by u = ln size - ln largest size
its midpoint comes later by -kappa u; and a share 1 - exp(missing u) of the tokens, drawn once,
never falls. The last probe is at step 640, the noise has a lag-one autocorrelation of 0.6, and
every run has its own jitter of the midpoints, of 0.3.

Shapes: N tokens, K probes of a run, P probes of all runs, R resamples, S values of u.
"""

from dataclasses import dataclass

import numpy as np
from correlated import correlated_noise
from scipy.special import expit

from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.axis import Top
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.groups import GroupCurves, corrected, predict_groups
from megatron_tokscale.spectrum.axes.measured import Curves, Fitted, measure_shift
from megatron_tokscale.spectrum.groups import deciles

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


@dataclass(frozen=True)
class World:
    """Runs of a planted world.

    Attributes:
        tokens: the tokens.
        points: the probes after step 0 of all runs.
        loss_NP: losses there.
        top_N: losses at step 0, the mean over the runs.
        weight_RN: weight of each token in every resample of 50 documents.
    """

    tokens: Tokens
    points: Points
    loss_NP: np.ndarray
    top_N: np.ndarray
    weight_RN: np.ndarray

    @classmethod
    def draw(
        cls,
        sizes,
        *,
        kappa,
        missing=0.0,
        seeds=1,
        noise=0.45,
        n_tokens=2000,
        documents=50,
        resamples=20,
        seed=0,
    ):
        """Train the runs."""
        rng = np.random.default_rng(seed)
        tokens = Tokens.draw(n_tokens, rng)
        x, u_I = clock(), log_sizes(sizes, seeds)
        loss_NP, top_N = [], np.zeros(n_tokens)
        for u in u_I:
            loss_NK = tokens.losses(x, u, rng, kappa=kappa, missing=missing, noise=noise)
            loss_NP.append(loss_NK[:, 1:])
            top_N += loss_NK[:, 0] / len(u_I)
        document_N = np.arange(n_tokens) * documents // n_tokens
        units = Units.from_documents(np.zeros(n_tokens, np.int16), document_N, seed)
        return cls(
            tokens,
            Points.of_runs([x[1:]] * len(u_I), u_I),
            np.concatenate(loss_NP, axis=1),
            top_N,
            units.weights(resamples, seed)[:, units.unit_N],
        )

    def means(self, group_N, groups):
        """Return weights (R, C), losses (R, C, P) and tops (R, C) of groups."""
        chosen = [group_N == g for g in range(groups)]
        count = np.stack([self.weight_RN[:, g].sum(axis=1) for g in chosen], 1)
        loss = np.stack([self.weight_RN[:, g] @ self.loss_NP[g] for g in chosen], 1)
        top = np.stack([self.weight_RN[:, g] @ self.top_N[g] for g in chosen], 1)
        return count, loss / count[:, :, None], top / count

    def fitted(self):
        """Return the shift models of the mean curves."""
        _, loss, top = self.means(np.zeros(len(self.top_N), int), 1)
        return Fitted.of(Curves(self.points, loss[:, 0], top[:, 0], Top.BEFORE))

    def groups(self, time_N=None):
        """Return the curves of deciles of learning time, by default of the true ones."""
        groups = deciles(self.tokens.midpoint_N if time_N is None else time_N)
        count, loss, top = self.means(groups.group_N, len(groups.names))
        return GroupCurves(groups.names, count / count.sum(axis=1, keepdims=True), loss, top)

    def measured(self, time_N=None):
        """Return the shift model as a result, with the groups by learning time."""
        fitted = self.fitted()
        found = corrected({"time": predict_groups(fitted, self.groups(time_N))})
        return measure_shift(fitted, [f"m{i}" for i in range(self.points.n_runs)], found)

"""The null model without steps: every token follows the mean curve of its group.

Token i of group g is a_i + b_i m_g(x) plus noise of its own, with a level and an amplitude of its
own. Nothing else of the token is kept, so whatever is narrower in the data than here belongs to
single tokens (the construction is our choice).

Three errors of the simple construction are corrected, since each makes the null model's transitions
wider than those of true tokens of this kind:

- Least squares spread the amplitudes: their variance in a group is lowered by that of their errors.
- The mean residual of a group is part of its mean curve, as is the noise that all tokens of a probe
  share. It does not count as the tokens' own noise.
- A sigmoid absorbs slow noise, so its residuals are smaller and less correlated than the noise.
  The noise of the null model is scaled until the residuals of the null model's fits are as large,
  and as correlated, as those of the observed tokens.

Shapes: N tokens, K probe steps, G groups.
"""

from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.fit import SigmoidFits, fit_sigmoids
from megatron_tokscale.spectrum.sums import at_probes, loss_sums

LARGEST_CORRELATION: Final = 0.95
"""Largest lag-one correlation of drawn noise; 1 is a random walk (our choice)."""
_ROUNDS: Final = 2  # fits that scale the noise: a third changes it by about 2% (our choice)
_SCALING_TOKENS: Final = 4_000  # tokens of these fits: the noise's scale is then known to 1%
_FIRST_SCALE, _FIRST_SHIFT = 1.3, 0.1  # near those of 30 probes with a correlation of 0.5
_PARAMETERS: Final = 4  # of a sigmoid
_PHI_RESPONSE: Final = 0.8  # change of the residuals' correlation with that of the noise


def group_curve_losses(
    fits: SigmoidFits, loss_NK: Floats | Floats32, group_N: Integers, seed: int
) -> Floats32:
    """Draw losses of tokens without steps: each follows its group's mean curve.

    Args:
        fits: fits of the observed tokens, which miss no loss.
        loss_NK: their losses in nats.
        group_N: group of each token.
        seed: seed of the noise.

    Returns:
        Losses of as many tokens at the same probes, in the same order.
    """
    rng = np.random.default_rng(seed)
    return GroupCurves.from_losses(fits, loss_NK, group_N).with_scaled_noise(rng).draw(rng)


@dataclass(frozen=True)
class GroupCurves:
    """Curves of the groups, and level, amplitude and noise of each token.

    Attributes:
        x_K: the probes.
        shape_GK: mean loss of each group around its mean over the probes, in nats.
        group_N: group of each token.
        level_N: mean loss of each token.
        amplitude_N: factor of the group's shape.
        sse_N: sum of squares of the residuals of the token's own sigmoid, without the mean residual
            of its group.
        phi_N: lag-one correlation of these residuals, the mean in the group: the estimates of
            single tokens differ by their errors more than by anything else.
        scale: variance of the noise over sse / (K - 4).
        shift: correlation of the noise minus that of the residuals.
    """

    x_K: Floats
    shape_GK: Floats
    group_N: Integers
    level_N: Floats
    amplitude_N: Floats
    sse_N: Floats
    phi_N: Floats
    scale: float = _FIRST_SCALE
    shift: float = _FIRST_SHIFT

    @classmethod
    def from_losses(cls, fits: SigmoidFits, loss_NK: Floats | Floats32, group_N: Integers) -> Self:
        """Return the curves of the groups of tokens that miss no loss; the noise is not scaled."""
        loss_NK = loss_NK.astype(np.float64)
        mean_GK = _means(loss_NK, group_N)
        shape_GK = mean_GK - mean_GK.mean(axis=1, keepdims=True)
        square_G = np.maximum((shape_GK**2).sum(axis=1), 1e-300)
        along_N = (loss_NK * shape_GK[group_N]).sum(axis=1)
        correlation_N = np.nan_to_num(fits.autocorrelation_N).astype(np.float64)
        return cls(
            fits.x_K,
            shape_GK,
            group_N,
            loss_NK.mean(axis=1),
            along_N / square_G[group_N],
            _own_sse(fits, loss_NK, group_N),
            _means(correlation_N[:, None], group_N)[group_N, 0],
        )

    @property
    def correlation_N(self) -> Floats:
        """Lag-one correlation of each token's noise."""
        return np.clip(self.phi_N + self.shift, 0, LARGEST_CORRELATION)

    @property
    def variance_N(self) -> Floats:
        """Variance of each token's noise in nats^2."""
        return self.scale * self.sse_N / max(len(self.x_K) - _PARAMETERS, 1)

    def rows(self, index_N: Integers) -> Self:
        """Return the tokens in `index_N`."""
        names = ("group_N", "level_N", "amplitude_N", "sse_N", "phi_N")
        return replace(self, **{name: getattr(self, name)[index_N] for name in names})

    def with_scaled_noise(self, rng: np.random.Generator) -> Self:
        """Return the model whose fits leave residuals like those of the observed tokens."""
        if not len(self.group_N):
            return self
        chosen = rng.permutation(len(self.group_N))[:_SCALING_TOKENS]
        model, wanted = self, self.rows(chosen)
        group_N = np.unique(wanted.group_N, return_inverse=True)[1]
        for _ in range(_ROUNDS):
            # The shrunk amplitudes are those of all tokens; only the drawing is of some.
            null_NK = model.shrunk().rows(chosen)._with_noise(rng)
            fits = fit_sigmoids(self.x_K, null_NK)
            found_N = _own_sse(fits, null_NK.astype(np.float64), group_N)
            found_phi = np.nan_to_num(fits.autocorrelation_N).mean()
            total = max(float(found_N.sum()), 1e-300)
            scale = model.scale * float(wanted.sse_N.sum()) / total
            shift = model.shift + float(wanted.phi_N.mean() - found_phi) / _PHI_RESPONSE
            model = replace(model, scale=scale, shift=shift)
        return model

    def shrunk(self) -> Self:
        """Return the model whose amplitudes vary in each group as the true ones do.

        The error of an amplitude has the variance of the noise times s'Rs / (s's)^2, with the
        group's shape s and the correlations R of the noise.
        """
        shape_GK, group_N = self.shape_GK, self.group_N
        square_G = np.maximum((shape_GK**2).sum(axis=1), 1e-300)
        phi_N = self.correlation_N
        followed_N = square_G[group_N]
        for lag in range(1, len(self.x_K)):
            product_G = (shape_GK[:, lag:] * shape_GK[:, :-lag]).sum(axis=1)
            followed_N = followed_N + 2 * phi_N**lag * product_G[group_N]
        error_N = self.variance_N * followed_N / square_G[group_N] ** 2
        mean_N = _means(self.amplitude_N[:, None], group_N)[group_N, 0]
        off_N = self.amplitude_N - mean_N
        spread_G2 = _means(np.stack([off_N**2, error_N], axis=1), group_N)
        true_G = np.clip(1 - spread_G2[:, 1] / np.maximum(spread_G2[:, 0], 1e-300), 0, 1)
        return replace(self, amplitude_N=mean_N + off_N * np.sqrt(true_G)[group_N])

    def with_noise_of(self, other: "GroupCurves") -> Self:
        """Return the model with the scale and the correlation of another model's noise."""
        return replace(self, scale=other.scale, shift=other.shift)

    def draw(self, rng: np.random.Generator) -> Floats32:
        """Draw losses of all tokens: each follows its group's mean curve, and has noise."""
        return self.shrunk()._with_noise(rng)

    def _with_noise(self, rng: np.random.Generator) -> Floats32:
        noise_NK = autoregressive(self.correlation_N, len(self.x_K), rng)
        noise_NK *= np.sqrt(self.variance_N)[:, None]
        clean_NK = self.amplitude_N[:, None] * self.shape_GK[self.group_N]
        return np.asarray(self.level_N[:, None] + clean_NK + noise_NK, dtype=np.float32)


def _own_sse(fits: SigmoidFits, loss_NK: Floats, group_N: Integers) -> Floats:
    """Return the sum of squares of each token's residuals, less the mean residual of its group.

    It is enlarged by n / (n - 1) in a group of n tokens, since the token is part of the mean.
    """
    midpoint_N, width_N, drop_N, floor_N = (
        each.astype(np.float64)[:, None]
        for each in (fits.midpoint_N, fits.width_N, fits.drop_N, fits.floor_N)
    )
    left_NK = loss_NK - floor_N - drop_N * expit((midpoint_N - at_probes(fits.x_K)) / width_N)
    left_NK -= _means(left_NK, group_N)[group_N]
    tokens_N = np.bincount(group_N)[group_N]
    return np.asarray((left_NK**2).sum(axis=1) * tokens_N / np.maximum(tokens_N - 1, 1))


def _means(value_NK: Floats, group_N: Integers) -> Floats:
    """Return the mean of each group, (G, K); zeros for an empty group."""
    count_G = np.bincount(group_N)
    total_GK = loss_sums(value_NK, group_N, len(count_G))
    return np.asarray(total_GK / np.maximum(count_G, 1)[:, None])


def autoregressive(phi_N: Floats, n_probes: int, rng: np.random.Generator) -> Floats:
    """Draw Gaussian noise of variance one with correlation phi between neighbouring probes."""
    noise_NK = rng.standard_normal((len(phi_N), n_probes))
    innovation_N = np.sqrt(1 - phi_N**2)
    for k in range(1, n_probes):
        noise_NK[:, k] = phi_N * noise_NK[:, k - 1] + innovation_N * noise_NK[:, k]
    return noise_NK

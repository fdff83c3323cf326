"""Planted twins of a run: R² that its estimators give where the claim is true, and where it is not.

R² of a reconstruction depends on the run's schedule, noise and length as much as on its tokens. So
each R² is shown beside those of two twins of the same tokens, which go through the same fit and
the same estimators:

- with steps: each token follows the model of its class, plus noise of its own;
- without steps: each token follows the mean curve of its group (`evidence.group_curves`).

The noise of the first twin has the variance and the lag-one correlation of the residuals of the
token's class model. (Our choice, as are the groups: frequency deciles in each dataset.)

Shapes: N tokens, K probe steps, D datasets, U units, R resamples (the first is the data as they
are).
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers16, Integers32
from megatron_tokscale.fit import SigmoidFits, TokenClass, fit_sigmoids
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.evidence import Twins
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.spectrum.evidence.group_curves import (
    LARGEST_CORRELATION,
    autoregressive,
    group_curve_losses,
)
from megatron_tokscale.spectrum.evidence.reconstruction import compare
from megatron_tokscale.spectrum.sums import DocumentSums, at_probes

MOST_TOKENS = 100_000  # tokens of a twin: the mean's own noise is then far below the shared noise
_PARAMETERS = {TokenClass.TWO_STEP: 7, TokenClass.GRADUAL: 3}  # of a class model; else 4 or 1


@dataclass(frozen=True)
class TwinTokens:
    """The tokens that twins are made of; tokens that miss a loss are left out.

    Attributes:
        fits: fits of the tokens.
        loss_NK: their losses in nats.
        group_N: group of each token, for the twin without steps.
        unit_N: resampling unit of each token.
        dataset_N: dataset of each token.
    """

    fits: SigmoidFits
    loss_NK: Floats32
    group_N: Integers
    unit_N: Integers32
    dataset_N: Integers16


def make_twins(
    tokens: TwinTokens,
    scored: ScoredRange,
    weight_RU: Floats,
    seed: int,
    shift_DK: Floats | None = None,
) -> Twins:
    """Draw both twins, fit them, and return R² of their reconstructions in the scored range.

    Args:
        tokens: at most `MOST_TOKENS` tokens of the run.
        scored: the range of x that counts.
        weight_RU: weights of the resamples of the documents.
        seed: seed of the noise.
        shift_DK: shifts in nats that all tokens of a dataset share at a probe, as measured in the
            run. The twins' mean losses have them too, and their fits are without them, like those
            of the run. None for no shifts.

    Raises:
        UndefinedError: no token misses no loss, or too few probes are in the range.
    """
    whole_N = tokens.fits.complete_N
    fits, loss_NK = tokens.fits.rows(whole_N), tokens.loss_NK[whole_N]
    group_N = np.unique(tokens.group_N[whole_N], return_inverse=True)[1]
    unit_N = tokens.unit_N[whole_N]
    shift_NK = np.zeros((1, 1)) if shift_DK is None else shift_DK[tokens.dataset_N[whole_N]]

    def r2(twin_NK: Floats32) -> dict[str, Estimate]:
        return _r2_of(fits.x_K, twin_NK, shift_NK, unit_N, scored, weight_RU)

    return Twins(
        tokens=len(fits),
        without_steps=r2(group_curve_losses(fits, loss_NK, group_N, seed)),
        with_steps=r2(stepwise_losses(fits, loss_NK, seed)),
    )


def stepwise_losses(fits: SigmoidFits, loss_NK: Floats | Floats32, seed: int) -> Floats32:
    """Draw losses of tokens with steps: each follows the model of its class, plus its own noise.

    Args:
        fits: fits of the observed tokens, which miss no loss.
        loss_NK: their losses in nats.
        seed: seed of the noise.
    """
    model_NK = fits.predict(at_probes(fits.x_K))
    residual_NK = loss_NK - model_NK
    n_probes = residual_NK.shape[1]
    used_N = np.where(fits.is_class(TokenClass.FALLING, TokenClass.RISING), 4, 1)
    for each, parameters in _PARAMETERS.items():
        used_N[fits.is_class(each)] = parameters
    variance_N = (residual_NK**2).sum(axis=1) / np.maximum(n_probes - used_N, 1)
    phi_N = np.clip(np.nan_to_num(fits.autocorrelation_N), 0, LARGEST_CORRELATION)
    noise_NK = autoregressive(phi_N.astype(np.float64), n_probes, np.random.default_rng(seed))
    return np.asarray(model_NK + np.sqrt(variance_N)[:, None] * noise_NK, dtype=np.float32)


def _r2_of(
    x_K: Floats,
    loss_NK: Floats32,
    shift_NK: Floats,
    unit_N: Integers32,
    scored: ScoredRange,
    weight_RU: Floats,
) -> dict[str, Estimate]:
    """Return R² of every reconstruction of these losses from their own fits, by name."""
    shifted_NK = np.asarray(loss_NK + shift_NK, dtype=np.float32)
    block = (fit_sigmoids(x_K, loss_NK), shifted_NK, unit_N)
    sums = DocumentSums.from_blocks(x_K, [block], weight_RU.shape[1], from_x=scored.from_x)
    drawn = sums.resampled(x_K, weight_RU, from_x=scored.from_x)
    compared = compare(x_K, drawn.curves(), drawn.loss_RK, from_x=scored.from_x, to_x=scored.to_x)
    return {
        name: Estimate.from_resamples(each.r2_R, most=1) for name, each in compared.by_name.items()
    }

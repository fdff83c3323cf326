"""Forward in time: fitted on the first part of a run, do the tokens predict the next factor of two?

The rivals see the same probes: the best power law of the mean loss, from a tenth of that time on,
and a uniform spectrum, under which the loss goes on falling as it did in the last factor of two.

Shapes: N tokens, K probes (of the first part, or H: the last of them and those held out), U units,
R resamples (the first is the data as they are).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.laws.power_law.huber import Curve
from megatron_tokscale.laws.power_law.power_law import FIRST_TIME_SHARE
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.evidence.transfer import Alignment, TransferSums
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import loss_sums, model_sums

_LEAST_FITTED = 8
_LEAST_HELD_OUT = 2
_ROUNDING = 1e-9
_RIVALS = ("power-law", "uniform")


def predict_forward(
    x_K: Floats,
    loss_NK: NDArray[Any],
    units: Units,
    groupings: Mapping[str, Groups],
    weight_RU: Floats,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit all but the last factor of two in time, and hold the prediction against the rest.

    There is no verdict: a token whose fall has not begun is extrapolated flat, so the fits miss
    every fall that begins after the cut. `groups`: how well the falls that set groups of tokens
    apart are predicted, as for a transfer (`TransferSums.skills`), the null being learning times
    permuted over the tokens.

    Args:
        x_K: natural logarithm of time at the probes.
        loss_NK: finite losses in nats.
        units: of these tokens.
        groupings: of these tokens.
        weight_RU: weights of the units.
        seed: of the permutations.

    Raises:
        UndefinedError: fewer than eight finite probes before the cut, or two after it.
    """
    cut = _Cut.before_last_octave(x_K)
    fits = fit_sigmoids(x_K[cut.first_K], loss_NK[:, cut.first_K])
    n_units = len(units)
    tokens_U = np.bincount(units.unit_N, minlength=n_units).astype(np.float64)
    weight_RU = weight_RU[weight_RU @ tokens_U > 0]
    share_RU = weight_RU / (weight_RU @ tokens_U)[:, None]
    mean_RK = share_RU @ loss_sums(loss_NK, units.unit_N, n_units)
    held_K = ~cut.first_K
    whole_N = fits.complete_N
    model_UK = model_sums(fits.rows(whole_N), units.unit_N[whole_N], n_units, x_K[held_K])
    whole_U = np.bincount(units.unit_N[whole_N], minlength=n_units)
    predicted = {"tokens": weight_RU @ model_UK / (weight_RU @ whole_U)[:, None]}
    predicted |= cut.rivals(x_K, mean_RK)
    measured_RK = mean_RK[:, held_K]
    fall_R = mean_RK[:, cut.last] - measured_RK[:, -1]
    error_R = {
        name: np.abs(curve_RK - measured_RK).mean(axis=1) for name, curve_RK in predicted.items()
    }
    best_R = np.minimum(*(error_R[name] for name in _RIVALS))
    transfer = TransferSums(cut.falls(x_K), groupings, units)
    transfer.add(slice(0, len(loss_NK)), fits, loss_NK[:, cut.from_last_K])
    return {
        "from_x": float(x_K[cut.last]),
        "to_x": float(x_K[-1]),
        "probes": int(held_K.sum()),
        **Estimate.from_resamples(fall_R).entry("fall"),
        **{
            name: Estimate.from_resamples(value_R, least=0).entry("error")
            | Estimate.from_resamples(mean_RK[:, cut.last] - predicted[name][:, -1]).entry("fall")
            for name, value_R in error_R.items()
        },
        **Estimate.from_resamples(best_R - error_R["tokens"]).entry("gain_over_best_rival"),
        "groups": transfer.skills(weight_RU, seed),
    }


@dataclass(frozen=True)
class _Cut:
    """Where the first part ends.

    Attributes:
        first_K: mask of the probes of the first part.
        last: index of its last probe.
    """

    first_K: Mask
    last: int

    @staticmethod
    def before_last_octave(x_K: Floats) -> "_Cut":
        first_K = x_K <= x_K[-1] - math.log(2) + _ROUNDING
        fitted, held_out = (first_K & np.isfinite(x_K)).sum(), (~first_K).sum()
        if fitted < _LEAST_FITTED or held_out < _LEAST_HELD_OUT:
            raise UndefinedError(
                f"{fitted} probes before the last factor of two and {held_out} in it are too few "
                f"to predict it, {_LEAST_FITTED} and {_LEAST_HELD_OUT} are needed; probe more often"
            )
        return _Cut(first_K, int(first_K.sum()) - 1)

    @property
    def from_last_K(self) -> Mask:
        """The last probe of the first part and those after it."""
        chosen = ~self.first_K
        chosen[self.last] = True
        return chosen

    def falls(self, x_K: Floats) -> Alignment:
        """Falls since the cut at each probe held out."""
        held_out = int((~self.first_K).sum())
        operator_HX = np.concatenate([np.ones((1, held_out)), -np.eye(held_out)])
        return Alignment(x_K[self.from_last_K], operator_HX)

    def rivals(self, x_K: Floats, mean_RK: Floats) -> dict[str, Floats]:
        """Mean losses at the probes held out by the rivals."""
        held_K = ~self.first_K
        fitted = self.first_K & np.isfinite(x_K)
        recent = fitted & (x_K >= x_K[self.last] - math.log(2) - _ROUNDING)
        slope_R, level_R = np.polyfit(x_K[recent], mean_RK[:, recent].T, 1)
        late = fitted & (x_K >= x_K[self.last] + math.log(FIRST_TIME_SHARE) - _ROUNDING)
        law_RK = np.empty((len(mean_RK), int(held_K.sum())))
        best = None
        for r, loss_K in enumerate(mean_RK[:, late]):
            curve = Curve(x_K[late], np.log(loss_K))
            best = curve.solve() if best is None else curve.solve_near(best)
            law_RK[r] = np.exp(Curve(x_K[held_K], np.zeros(held_K.sum())).predict(best))
        return {"power-law": law_RK, "uniform": level_R[:, None] + slope_R[:, None] * x_K[held_K]}

"""Covariance of tokens' falls per octave of time between two runs: a test for steps without a fit.

y_ij is the fall of token i in octave j of run A, less the mean fall of the token's group; z_ik is
the same in octave k of run B. M_jk = Cov_i(y_ij, z_ik) has no noise of single losses, since that of
two runs is independent.

- Without steps, a token follows its group's curve with an amplitude of its own, which both runs
  share. Then M_jk = Var(amplitude) m_j m_k, which is positive everywhere, and about as large far
  from the diagonal as on it.
- With steps, a token that falls in one octave has nothing left for the others. Then M is negative
  away from the diagonal, whatever the spread of the drops. Close to it M is positive, as far as a
  transition is wide.

A checkpoint may also shift each item by an amount of its own that both runs share, as a change in
how losses of answers depend on their length does. M then has the signs of the checkpoints' shifts,
with steps or without. Falls cannot do this: their covariance does not grow from a distance of one
octave to two. Where it does, beyond the intervals, the test is undefined.

The number that is tested is the mean of M over octaves far apart, divided by its mean diagonal.
Far is three octaves or more; two or more where only four octaves are measured. With w = 0.6 a
transition takes 3.8 octaves from 10% to 90%: octaves at a distance of two still share transitions,
which would hide the steps (our choice, by the planted worlds of benchmarks/results/evidence.md).

Shapes: N tokens, J octaves, K probe steps, G groups, U resampling units, C cells (pairs of a unit
and a group), R resamples (the first is the data as they are).
"""

from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.primary import COVARIANCE
from megatron_tokscale.results.transfer import FallCovariance
from megatron_tokscale.results.verdict import ClaimTest
from megatron_tokscale.spectrum.evidence.falls import OCTAVE, fall_weights, intervals
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import loss_sums

LEAST_OCTAVES: Final = 4
"""Least octaves for a pair two apart with an octave between them on either side (our choice)."""
_FAR: Final = 3  # octaves
_FAR_OF_FEW: Final = 2  # octaves, where no more than four are measured
_SHARED_NOISE: Final = Undefined(
    "the covariance is larger two octaves apart than one octave apart: checkpoints shift each "
    "token by an amount of its own that both runs share, which hides falls"
)


def octaves(from_x: float, to_x: float) -> Floats:
    """Return the edges of equal intervals of about an octave in the range of x.

    Raises:
        UndefinedError: the range has fewer than three and a half octaves.
    """
    edges = intervals(from_x, to_x, OCTAVE)
    if len(edges) <= LEAST_OCTAVES:
        measured = (to_x - from_x) / OCTAVE
        raise UndefinedError(
            f"both runs measure {measured:.1f} octaves of time after the unigram phase; expected "
            f"at least {LEAST_OCTAVES - 0.5}; train longer"
        )
    return edges


class FallSums:
    """Sums over tokens for the covariance of falls, added up block by block.

    Args:
        edges: edges of the octaves.
        source_x_K: x of run A's probes.
        target_x_K: x of run B's probes, on the same clock.
        groups: groups whose mean falls are subtracted.
        units: resampling units of the tokens.
    """

    def __init__(
        self,
        edges: Floats,
        source_x_K: Floats,
        target_x_K: Floats,
        groups: Groups,
        units: Units,
    ):
        self._edges, self._n_groups, self._n_units = edges, len(groups.names), len(units)
        self._operators = [fall_weights(x_K, edges) for x_K in (source_x_K, target_x_K)]
        self._unit_N = units.unit_N
        self._cell_N = units.unit_N.astype(np.int64) * self._n_groups + groups.group_N
        n_octaves = len(edges) - 1
        self._product_UJJ = np.zeros((self._n_units, n_octaves, n_octaves))
        self._square_UJ = np.zeros((2, self._n_units, n_octaves))
        self._fall_CJ = np.zeros((2, self._n_units * self._n_groups, n_octaves))
        self._tokens_C = np.zeros(self._n_units * self._n_groups)

    def add(self, at: slice, source_NK: Floats | Floats32, target_NK: Floats | Floats32) -> None:
        """Add the tokens in the slice by their losses in A and in B; NaN leaves a token out."""
        losses = (source_NK, target_NK)
        whole_N = np.logical_and(*(np.isfinite(loss_NK).all(axis=1) for loss_NK in losses))
        unit_N, cell_N = self._unit_N[at][whole_N], self._cell_N[at][whole_N]
        both = [
            loss_NK[whole_N] @ operator_KJ.astype(loss_NK.dtype)
            for loss_NK, operator_KJ in zip(losses, self._operators, strict=True)
        ]
        self._tokens_C += np.bincount(cell_N, minlength=len(self._tokens_C))
        for run, fall_NJ in enumerate(both):
            self._fall_CJ[run] += loss_sums(fall_NJ, cell_N, len(self._tokens_C))
            self._square_UJ[run] += loss_sums(fall_NJ**2, unit_N, self._n_units)
        for j in range(len(self._edges) - 1):
            product_NJ = both[0][:, j, None] * both[1]
            self._product_UJJ[:, j] += loss_sums(product_NJ, unit_N, self._n_units)

    def result(self, weight_RU: Floats) -> FallCovariance:
        """Return the covariances, their profile over the distance of octaves, and the test.

        Raises:
            UndefinedError: no token has falls in both runs.
        """
        if not self._tokens_C.any():
            raise UndefinedError(
                "no token has finite losses in both runs; restore the losses, or watch more tokens"
            )
        covariance_RJJ, variance_RJ = self._moments(weight_RU)
        n_octaves = len(self._edges) - 1
        distance_JJ = np.abs(np.subtract.outer(np.arange(n_octaves), np.arange(n_octaves)))
        far = _FAR if n_octaves > LEAST_OCTAVES else _FAR_OF_FEW
        diagonal_RJ = np.diagonal(covariance_RJJ, axis1=1, axis2=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            over_diagonal_RJJ = covariance_RJJ / diagonal_RJ.mean(axis=1)[:, None, None]
            share_R = diagonal_RJ.mean(axis=1) / variance_RJ.mean(axis=1)
        profile = tuple(
            Estimate.from_resamples(over_diagonal_RJJ[:, distance_JJ == distance].mean(axis=1))
            for distance in range(n_octaves)
        )
        far_R = over_diagonal_RJJ[:, distance_JJ >= far].mean(axis=1)
        is_noise = profile[1].high < profile[2].low
        return FallCovariance(
            tokens=int(self._tokens_C.sum()),
            groups=self._n_groups,
            edges=tuple(self._edges.tolist()),
            far_octaves=far,
            covariance=tuple(tuple(row) for row in covariance_RJJ[0].tolist()),
            profile=profile,
            reproducible=Estimate.from_resamples(share_R, most=1),
            test=ClaimTest.of(
                COVARIANCE, _SHARED_NOISE if is_noise else Estimate.from_resamples(far_R)
            ),
        )

    def _moments(self, weight_RU: Floats) -> tuple[Floats, Floats]:
        """Return the covariances within groups between the runs, and the variances within a run.

        The first are symmetric: means of M_jk and M_kj. The second are geometric means over the
        runs.
        """
        tokens_RG = weight_RU @ self._tokens_C.reshape(self._n_units, -1)
        tokens_R = tokens_RG.sum(axis=1)
        n_octaves = len(self._edges) - 1
        shape = (self._n_units, self._n_groups * n_octaves)
        mean_RGJ = [
            (weight_RU @ each_CJ.reshape(shape)).reshape(*tokens_RG.shape, n_octaves)
            / np.maximum(tokens_RG, 1e-300)[..., None]
            for each_CJ in self._fall_CJ
        ]
        between_RJJ = np.einsum("rg,rgj,rgk->rjk", tokens_RG, *mean_RGJ, optimize=True)
        product_RJJ = np.tensordot(weight_RU, self._product_UJJ, axes=1)
        covariance_RJJ = (product_RJJ - between_RJJ) / tokens_R[:, None, None]
        variances = [
            (weight_RU @ square_UJ - np.einsum("rg,rgj->rj", tokens_RG, each_RGJ**2))
            / tokens_R[:, None]
            for square_UJ, each_RGJ in zip(self._square_UJ, mean_RGJ, strict=True)
        ]
        variance_RJ = np.sqrt(np.maximum(variances[0] * variances[1], 0))
        return (covariance_RJJ + covariance_RJJ.swapaxes(1, 2)) / 2, variance_RJ

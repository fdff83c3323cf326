"""Skill score: share of the between-group variance of curves that a prediction explains.

The mean curve of all tokens is easy to predict. The claim of learning times is another one: that
these tokens fall now, and others later. So the mean curve of all tokens is subtracted from the
measured and from the predicted curves of the groups, and

    skill = 1 - sum_g share_g |measured_g - predicted_g|^2 / sum_g share_g |measured_g|^2.

A perfect prediction has the skill 1. The prediction of the same curve for all groups has the skill
0; a worse prediction has a negative skill.

Shapes: N tokens, R resamples (the first is the data as they are), U units, G groups, C cells (pairs
of a unit and a group), K probe steps, X values that are compared (grid points, or falls).
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.spectrum.groups import Groups


class GroupSums:
    """Sums of tokens' curves by unit and group. Each kind of curve has a name.

    Attributes:
        names: names of the groups.
        group_N: group of each token.
    """

    def __init__(self, groups: Groups, units: Units):
        self.names, self.group_N = groups.names, groups.group_N
        self._n_units = len(units)
        self._cell_N = units.unit_N.astype(np.int64) * len(groups.names) + groups.group_N
        self._sum_CK: dict[str, Floats] = {}

    @property
    def n_cells(self) -> int:
        """Number of pairs of a unit and a group."""
        return self._n_units * len(self.names)

    def cells(self, at: slice) -> Integers:
        """Return the cells of the tokens in the slice."""
        return self._cell_N[at]

    def add(self, name: str, total_CK: Floats) -> None:
        """Add a block's sums by cell to the sums of `name`.

        The numbers of tokens, (C, 1), have the name "tokens"; every mean is over them.
        """
        self._sum_CK[name] = self._sum_CK[name] + total_CK if name in self._sum_CK else total_CK

    def put(self, name: str, total_CK: Floats) -> None:
        """Set the sums of `name`."""
        self._sum_CK[name] = total_CK

    def has(self, name: str) -> bool:
        """Return whether there are sums of `name`."""
        return name in self._sum_CK

    def cell_sum(self, name: str) -> Floats:
        """Return the sums of `name` by cell."""
        return self._sum_CK[name]

    def deviations(
        self, name: str, weight_RU: Floats, operator_KX: Floats
    ) -> tuple[Floats, Floats]:
        """Return the groups' deviations from the mean curve of all tokens, and the groups' shares.

        Returns:
            deviation_RGX: the deviations, multiplied by `operator_KX`; zero for an empty group.
            share_RG: share of the tokens in each group.
        """
        share_RG, mean_RGK = self.means(name, weight_RU)
        all_RK = (share_RG[..., None] * mean_RGK).sum(axis=1)
        deviation_RGX = (mean_RGK - all_RK[:, None]) @ operator_KX
        deviation_RGX[share_RG == 0] = 0
        return deviation_RGX, share_RG

    def means(self, name: str, weight_RU: Floats) -> tuple[Floats, Floats]:
        """Return share_RG of the tokens in each group, and mean_RGK of its curves.

        The mean of an empty group is zero.
        """
        tokens_RG = weight_RU @ self._sum_CK["tokens"].reshape(self._n_units, -1)
        flat_UX = self._sum_CK[name].reshape(self._n_units, -1)
        sum_RGK = (weight_RU @ flat_UX).reshape(*tokens_RG.shape, -1)
        mean_RGK = sum_RGK / np.maximum(tokens_RG, 1e-300)[..., None]
        return tokens_RG / tokens_RG.sum(axis=1, keepdims=True), mean_RGK

    def skill(self, name: str, measured: str, weight_RU: Floats, operator_KX: Floats) -> Floats:
        """Return skill_R of the curves `name` as a prediction of the curves `measured`."""
        measured_RGX, share_RG = self.deviations(measured, weight_RU, operator_KX)
        predicted_RGX, _ = self.deviations(name, weight_RU, operator_KX)
        return skill(measured_RGX, predicted_RGX, share_RG)


class DocumentGroups(GroupSums):
    """Sums with every resampling unit as a group: a document, or several whole documents.

    A resample draws each unit with its error. The mean curve of all tokens is not resampled.
    """

    def __init__(self, units: Units):
        names = tuple(map(str, range(len(units))))
        super().__init__(Groups(units.unit_N.astype(np.int64), names), units)

    @property
    def n_cells(self) -> int:
        """Number of units."""
        return len(self.names)

    def cells(self, at: slice) -> Integers:
        """Return the units of the tokens in the slice."""
        return self.group_N[at]

    def skill(self, name: str, measured: str, weight_RU: Floats, operator_KX: Floats) -> Floats:
        """Return skill_R of the curves `name` as a prediction of the curves `measured`."""
        tokens_U = self.cell_sum("tokens")[:, 0]
        measured_UX, predicted_UX = (
            self._deviation(each, tokens_U) @ operator_KX for each in (measured, name)
        )
        miss_U = ((measured_UX - predicted_UX) ** 2).sum(axis=1) * tokens_U
        spread_U = (measured_UX**2).sum(axis=1) * tokens_U
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(1 - weight_RU @ miss_U / (weight_RU @ spread_U))

    def _deviation(self, name: str, tokens_U: Floats) -> Floats:
        sum_UK = self.cell_sum(name)
        mean_UK = sum_UK / np.maximum(tokens_U, 1)[:, None]
        return np.asarray(mean_UK - sum_UK.sum(axis=0) / max(tokens_U.sum(), 1))


def skill(measured_RGX: Floats, predicted_RGX: Floats, share_RG: Floats) -> Floats:
    """Return the skill of each resample; NaN where no group differs from another."""
    miss_R = ((measured_RGX - predicted_RGX) ** 2).sum(axis=-1) * share_RG
    spread_R = (measured_RGX**2).sum(axis=-1) * share_RG
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - miss_R.sum(axis=-1) / spread_R.sum(axis=-1))

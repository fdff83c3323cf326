"""The values of a search: the trajectories, the bounds, and the state that a search has reached.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters (theta_PN: M
midpoints, then M log-widths), L = 1 + M linear parameters (floor, then M drops).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from megatron_tokscale.core.arrays import Floats32


@dataclass(frozen=True)
class Trajectories:
    """Scaled losses of tokens, the places of the probes, and the mask of missing losses.

    Attributes:
        y_KN: losses less the token's mean, over the token's standard deviation; 0 where missing.
        x_K: places of the probes, in units of the probed range: 0 at its start, 1 at its end.
        weight_KN: 1 where there is a loss, 0 where it is missing; None if none is missing.
    """

    y_KN: Tensor
    x_K: Tensor
    weight_KN: Tensor | None = None

    def __len__(self) -> int:
        return self.y_KN.shape[1]

    def tokens(self, index: Tensor | slice) -> "Trajectories":
        """Return the trajectories of some of the tokens."""
        weight_KN = None if self.weight_KN is None else _columns(self.weight_KN, index)
        return Trajectories(_columns(self.y_KN, index), self.x_K, weight_KN)

    def as_numpy(self) -> tuple[Floats32, Floats32, Floats32]:
        """Return y_NK, x_K and weight_NK for `kernels`.

        weight_NK has the shape (0, 1) if no loss is missing.
        """
        weight_KN = self.y_KN.new_empty(1, 0) if self.weight_KN is None else self.weight_KN
        return self.y_KN.T.numpy(), self.x_K.numpy(), weight_KN.T.numpy()

    @property
    def on_cpu(self) -> bool:
        """True if the losses are on a CPU, where the compiled loops of `kernels` work on them."""
        return self.y_KN.device.type == "cpu"

    @property
    def count_N(self) -> Tensor:
        """Number of losses of each token."""
        if self.weight_KN is None:
            return self.y_KN.new_full((len(self),), len(self.y_KN))
        return self.weight_KN.sum(dim=0)


def _columns(value_KN: Tensor, index: Tensor | slice) -> Tensor:
    """Return the values of some tokens, in the order in memory that the loops need.

    A token's values are contiguous on a CPU, where a loop works on one token at a time. A probe's
    values are contiguous on a GPU, where an operation works on all tokens.
    """
    if value_KN.device.type == "cpu":
        return value_KN.T[index].contiguous().T
    return value_KN[:, index].contiguous()


@dataclass(frozen=True)
class Box:
    """Bounds of a midpoint and of a log-width.

    Attributes:
        midpoint: bounds in units of the probed range.
        log_width: bounds of ln w, w in units of the probed range.
    """

    midpoint: tuple[float, float]
    log_width: tuple[float, float]

    def limits(self, theta_PN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower and upper bound of every entry of theta, each of shape (P, 1)."""
        n_sigmoids = len(theta_PN) // 2
        bounds = [self.midpoint] * n_sigmoids + [self.log_width] * n_sigmoids
        low_P1, high_P1 = theta_PN.new_tensor(bounds)[..., None].unbind(dim=1)
        return low_P1, high_P1


@dataclass(frozen=True)
class Search:
    """The state of the search of every token: where it is, and what a step needs.

    Attributes:
        theta_PN: midpoints and log-widths.
        anchor_MN: x of the probe next to each midpoint.
        linear_LN: the best floor and drops of the scaled losses for this theta.
        sse_N: sum of squared residuals.
        curvature_PPN: J^T J, where J is the Jacobian of the model by q and ln w, with floor and
            drops projected out.
        descent_PN: J^T r, where r are the residuals. The Gauss-Newton step solves
            curvature @ step = descent.
    """

    theta_PN: Tensor
    anchor_MN: Tensor
    linear_LN: Tensor
    sse_N: Tensor
    curvature_PPN: Tensor
    descent_PN: Tensor

    @property
    def drop_MN(self) -> Tensor:
        """Drop of each sigmoid, in units of the scaled losses."""
        return self.linear_LN[1:]

    def where(self, mask_N: Tensor, other: "Search") -> "Search":
        """Return this state where `mask_N` is true, and `other` elsewhere."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Search(*(torch.where(mask_N, a, b) for a, b in pairs))

    def tokens(self, index: Tensor | slice) -> "Search":
        """Return the state of some of the tokens."""
        return Search(*(getattr(self, f.name)[..., index] for f in fields(self)))

    def put(self, index_N: Tensor, other: "Search") -> None:
        """Replace the tokens at `index_N` by those of `other`, in place."""
        for f in fields(self):
            getattr(self, f.name)[..., index_N] = getattr(other, f.name)

    @classmethod
    def join(cls, parts: Sequence["Search"]) -> Self:
        """Return the tokens of all parts, in order."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts], -1) for f in fields(cls)))

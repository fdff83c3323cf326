"""Whether losses by context of several probes fall on one curve, as Cagnetta et al. predict.

L_n(P) - H_inf = n^-gamma l(P / n^(2 beta)), P tokens of training (papers.md 2.1, Eq. 43). The
authors train a model for each P; the probes of one run stand at P tokens of a single pass, whose
learning rate has not decayed. Shapes: S lengths of context, P probes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tokscale.errors import TokscaleError, UndefinedError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Collapse:
    """How far the curves of different contexts lie apart: root mean squares, in logs.

    Attributes:
        error: with gamma and beta as they are; 0.1 is curves 10% apart.
        gamma_errors: with gamma one standard error lower, and higher.
        beta_errors: the same of beta.
        n_compared: points of a curve held against another curve.
    """

    error: float
    gamma_errors: tuple[float, float]
    beta_errors: tuple[float, float]
    n_compared: int


def collapse(
    context_S: ArrayLike,
    tokens_P: ArrayLike,
    loss_PS: ArrayLike,
    *,
    floor: float,
    gamma: float,
    gamma_se: float,
    beta: float,
    beta_se: float,
) -> Collapse:
    """Hold (L_n(P) - H_inf) n^gamma against P / n^(2 beta), each context against all others.

    Every point of a curve is compared with every other curve at the same P / n^(2 beta), if that
    reaches so far, straight between its points in logs (after Bhattacharjee & Seno 2001).

    Args:
        context_S: lengths of context, the tokens a token is predicted from.
        tokens_P: tokens of training at the probes, ascending from above 0.
        loss_PS: mean losses in nats.
        floor: H_inf in nats.
        gamma: exponent of the losses by context.
        gamma_se: its standard error.
        beta: exponent of the token correlations by lag.
        beta_se: its standard error.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: shapes that do not go together, losses not above the floor, tokens that do
            not ascend, or curves that nowhere lie above one another.
    """
    context, tokens = np.asarray(context_S, np.float64), np.asarray(tokens_P, np.float64)
    loss = np.asarray(loss_PS, np.float64)
    _check(context, tokens, loss, floor)
    curves = _Curves(np.log(context), np.log(tokens), np.log(loss - floor))
    apart_M = curves.apart(gamma, beta)

    def error(gamma: float, beta: float) -> float:
        return float(np.sqrt((curves.apart(gamma, beta) ** 2).mean()))

    return Collapse(
        error=error(gamma, beta),
        gamma_errors=(error(gamma - gamma_se, beta), error(gamma + gamma_se, beta)),
        beta_errors=(error(gamma, beta - beta_se), error(gamma, beta + beta_se)),
        n_compared=len(apart_M),
    )


def _check(context_S: Array, tokens_P: Array, loss_PS: Array, floor: float) -> None:
    if loss_PS.shape != (len(tokens_P), len(context_S)):
        raise TokscaleError(
            f"losses of shape {loss_PS.shape} are not of {len(tokens_P)} probes and "
            f"{len(context_S)} contexts; give one row per probe"
        )
    if not (loss_PS > floor).all():
        raise UndefinedError(
            f"a loss of {np.min(loss_PS):.4g} nats is not above the floor of {floor:.4g}; "
            "take shorter contexts or earlier probes"
        )
    if not (tokens_P[0] > 0 and (np.diff(tokens_P) > 0).all() and (context_S > 0).all()):
        raise TokscaleError("tokens of training must ascend from above 0, contexts be above 0")


@dataclass(frozen=True)
class _Curves:
    """Logarithms of contexts, tokens of training and reducible losses."""

    x_S: Array
    t_P: Array
    y_PS: Array

    def apart(self, gamma: float, beta: float) -> Array:
        """Differences of the curves, shifted by gamma and beta, at all points in common."""
        t_PS = self.t_P[:, None] - 2 * beta * self.x_S
        y_PS = self.y_PS + gamma * self.x_S
        parts = []
        for s in range(len(self.x_S)):
            other_S = np.arange(len(self.x_S)) != s
            t_M, y_M = t_PS[:, other_S].ravel(), y_PS[:, other_S].ravel()
            common_M = (t_M >= t_PS[0, s]) & (t_M <= t_PS[-1, s])
            parts.append(y_M[common_M] - np.interp(t_M[common_M], t_PS[:, s], y_PS[:, s]))
        apart_M = np.concatenate(parts)
        if not len(apart_M):
            raise UndefinedError(
                "no two contexts meet at any P / n^(2 beta); take more probes or nearer contexts"
            )
        return apart_M

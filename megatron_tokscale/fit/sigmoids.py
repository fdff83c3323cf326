"""`fit_sigmoids`: arrays in, fits out.

Shapes: N tokens, K probe steps.
"""

import math
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.fit.axis import Axis
from megatron_tokscale.fit.table import SigmoidFits

if TYPE_CHECKING:
    import torch

_VALUES_PER_BLOCK = 2**18


def fit_sigmoids(
    x_K: ArrayLike,
    loss_NK: "ArrayLike | torch.Tensor",
    *,
    block_tokens: int | None = None,
    device: Any = None,
    known_below: float = math.log(2),
) -> SigmoidFits:
    """Fit l(x) = f + A s((c - x)/w) to every token by least squares, and find its class.

    The model is papers.md 1.4's; step 0 is used (x = -inf, s = 1). A grid of (c, w) with f and A in
    closed form finds the basin, damped Gauss-Newton its bottom; midpoints stay within one probe
    spacing of the probed range, widths between a twentieth of the spacing and the range.
    Scaling or shifting the losses leaves c and w as they are; no token affects another.

    Args:
        x_K: natural logarithm of training time at each probe, ascending; -inf at step 0.
        loss_NK: losses in nats, numpy or torch. A token with a NaN or an infinity is not fitted:
            its status says so and its parameters are NaN.
        block_tokens: tokens worked on at once; by default about 2^18 losses.
        device: where to compute; by default where `loss_NK` is.
        known_below: a flat token with a mean loss below this many nats is flat-known. ln 2, where
            the token is more likely right than wrong, is our choice.

    Raises:
        TokscaleError: fewer than five probes, x not ascending, or shapes that do not match.
    """
    import torch

    from megatron_tokscale.fit.block import fit_block
    from megatron_tokscale.fit.grid import Grid

    axis = Axis.of(x_K)
    loss = torch.as_tensor(loss_NK)
    if loss.ndim != 2 or loss.shape[1] != axis.n_probes:
        raise TokscaleError(
            f"losses of shape {tuple(loss.shape)} do not match {axis.n_probes} probes; "
            "give one row per token and one column per probe"
        )
    device = torch.device(device) if device is not None else loss.device
    grid = Grid.over(axis, device)
    block_tokens = block_tokens or max(_VALUES_PER_BLOCK // axis.n_probes, 1)
    with torch.inference_mode():
        blocks = [
            fit_block(axis, grid, loss[start : start + block_tokens].to(device), known_below)
            for start in range(0, max(len(loss), 1), block_tokens)
        ]
    return SigmoidFits.concatenate(blocks)

"""`fit_sigmoids`: arrays in, fits out.

Shapes: N tokens, K probe steps.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit.axis import Axis
from megatron_tokscale.fit.table import SigmoidFits

if TYPE_CHECKING:
    import torch

_CHUNK_TOKENS = 2**13
_BLOCK_VALUES = 2**23
_CUDA_VALUES = 2**26
_LEAST_TOKENS = 2**12


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

    NaN and infinite losses are left out of their token's fit. With fewer than five left the
    token is not fitted: its status says so and its parameters are NaN.

    Where the losses do not tell the midpoint, the status is UNDETERMINED.

    Args:
        x_K: natural logarithm of training time at each probe, ascending; -inf at step 0.
        loss_NK: losses in nats, numpy or torch, of any float type.
        block_tokens: tokens per block; a CPU's threads take one block each. By default a quarter of
            the tokens, but not more than 2^23 losses.
        device: where to compute; by default where `loss_NK` is.
        known_below: a flat token with a mean loss below this many nats is flat-known. ln 2, where
            the token is more likely right than wrong, is our choice.

    Raises:
        TokscaleError: fewer than five probes, x not ascending, or shapes that do not match.
    """
    import torch

    from megatron_tokscale.fit.block import Settings, fit_block
    from megatron_tokscale.fit.grid import Grid

    axis = Axis.from_x(x_K)
    loss = torch.as_tensor(loss_NK)
    if loss.ndim != 2 or loss.shape[1] != axis.n_probes:
        raise TokscaleError(
            f"losses of shape {tuple(loss.shape)} do not match {axis.n_probes} probes; "
            "give one row per token and one column per probe"
        )
    device = torch.device(device) if device is not None else loss.device
    grid = Grid.over(axis, device)
    on_cpu = device.type == "cpu"
    chunk_tokens = _CHUNK_TOKENS if on_cpu else max(_CUDA_VALUES // axis.n_probes, 1)
    if block_tokens is None:
        most = (_BLOCK_VALUES if on_cpu else _CUDA_VALUES) // axis.n_probes
        block_tokens = max(min(most, max(-(-len(loss) // 4), _LEAST_TOKENS)), 1)
    settings = Settings(known_below, chunk_tokens)

    def fit(block: "torch.Tensor") -> SigmoidFits:
        with torch.inference_mode():
            return fit_block(axis, grid, block.to(device), settings)

    blocks = _blocks(loss, block_tokens)
    if not on_cpu:
        return SigmoidFits.concatenate([fit(block) for block in blocks])
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=_start_thread) as pool:
        return SigmoidFits.concatenate(list(pool.map(fit, blocks)))


def _blocks(loss: "torch.Tensor", tokens: int) -> "Iterator[torch.Tensor]":
    return (loss[start : start + tokens] for start in range(0, max(len(loss), 1), tokens))


def _start_thread() -> None:
    """One core per thread; the far tails of sigmoids are rounded to zero, which is much faster."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

"""The fit of sigmoids to arrays of losses: `fit_sigmoids`.

Shapes: N tokens, K probe steps.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit.probe_axis import ProbeAxis
from megatron_tokscale.fit.table import SigmoidFits

if TYPE_CHECKING:
    import torch

PRECISION = "float32, TF32 off"
"""The arithmetic of every fit, on a CPU and on a GPU (`full_precision`), in words."""
_CHUNK_TOKENS = 2**13
"""Tokens of a chunk on a CPU: enough for matrix products to run at their full speed, few enough for
the tables of two sigmoids (some 100 rows of float32) to stay small."""
_BLOCK_VALUES = 2**23  # most losses of a block on a CPU: 32 MB in float32 for each thread
_LEAST_TOKENS = 2**12  # of a block on a CPU: below it, threads cost more than they save
_CUDA_BLOCK_VALUES = 2**26
"""Most losses of a block on a GPU: 256 MB in float32. The 50,000 kernels or so of a block take as
long for one token as for 10^5, so tokens are divided no further than memory requires."""


def fit_sigmoids(
    x_K: ArrayLike,
    loss_NK: "ArrayLike | torch.Tensor",
    *,
    block_tokens: int | None = None,
    device: "torch.device | str | None" = None,
    known_below: float = math.log(2),
) -> SigmoidFits:
    """Fit l(x) = f + A s((c - x)/w) to every token by least squares, and choose its class.

    The model is in docs/references.md 1.4; step 0 is used (x = -inf, s = 1). A grid of (c, w)
    with f and A in closed form finds the basin, damped Gauss-Newton its bottom. Midpoints stay
    within one probe spacing of the probed range, widths between a twentieth of the spacing and the
    range. Scaling or shifting the losses does not change c and w; no token affects another.

    NaN and infinite losses are left out of their token's fit. A token with fewer than five finite
    losses is not fitted: its status is NON_FINITE and its parameters are NaN. If the losses do not
    determine the midpoint, the status is UNDETERMINED.

    Args:
        x_K: natural logarithm of training time at each probe, ascending; -inf at step 0.
        loss_NK: losses in nats, numpy or torch, of any float type.
        block_tokens: tokens per block; each thread of a CPU takes one block. By default on a CPU a
            quarter of the tokens, but not more than 2^23 losses; on a GPU as many as have 2^26.
        device: torch device to compute on; by default the device of `loss_NK`.
        known_below: a flat token with a mean loss below this many nats is flat-known. The default
            ln 2, below which the token is more likely right than wrong, is our choice.

    Raises:
        TokscaleError: fewer than five probes, x not ascending, or shapes that do not match.
    """
    import torch

    from megatron_tokscale.fit.block import BlockSettings, cuda_chunk_tokens, fit_block
    from megatron_tokscale.fit.grid import Grid

    axis = ProbeAxis.from_x(x_K)
    loss = torch.as_tensor(loss_NK)
    if loss.ndim != 2 or loss.shape[1] != axis.n_probes:
        raise TokscaleError(
            f"losses of shape {tuple(loss.shape)} do not match {axis.n_probes} probes; "
            "give one row per token and one column per probe"
        )
    place = torch.device(device) if device is not None else loss.device
    grid = Grid.over(axis, place)
    on_cpu = place.type == "cpu"
    chunk_tokens = _CHUNK_TOKENS if on_cpu else cuda_chunk_tokens(grid)
    settings = BlockSettings(known_below, chunk_tokens)

    def fit(block: "torch.Tensor") -> SigmoidFits:
        with torch.inference_mode():
            return fit_block(axis, grid, block.to(place), settings)

    blocks = _blocks(loss, block_tokens or _block_tokens(*loss.shape, on_cpu=on_cpu))
    if not on_cpu:
        with full_precision():
            return SigmoidFits.concatenate([fit(block) for block in blocks])
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=_start_thread) as pool:
        return SigmoidFits.concatenate(list(pool.map(fit, blocks)))


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 out of a GPU's matrix products in the block, and restore the setting after it.

    TF32 has 10 bits of mantissa, and classes depend on differences of sums of squares that are
    almost equal. A container may allow TF32 by an environment variable
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), a training script by a line.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    # torch 2.9 has replaced a flag by a word, and refuses to read the flag once the word is set.
    has_word = hasattr(matmul, "fp32_precision")
    name, exact = ("fp32_precision", "ieee") if has_word else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _block_tokens(n_tokens: int, n_probes: int, *, on_cpu: bool) -> int:
    """Return the default number of tokens of a block, see `fit_sigmoids`."""
    if not on_cpu:
        return max(_CUDA_BLOCK_VALUES // n_probes, 1)
    quarter = max(-(-n_tokens // 4), _LEAST_TOKENS)
    return max(min(_BLOCK_VALUES // n_probes, quarter), 1)


def _blocks(loss: "torch.Tensor", tokens: int) -> "Iterator[torch.Tensor]":
    return (loss[start : start + tokens] for start in range(0, max(len(loss), 1), tokens))


def _start_thread() -> None:
    """Set a thread to one core and to round denormal numbers to zero.

    The far tails of sigmoids are denormal, and arithmetic on those is many times slower.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

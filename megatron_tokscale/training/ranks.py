"""Decisions that all ranks take alike."""

import torch

from megatron_tokscale.errors import TokscaleError


def sum_over_ranks(*values: float) -> list[float]:
    """Sum each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def first_of_all_ranks(message: str | None) -> str | None:
    """The first message that any rank has: all can act on it, and the first rank can say it."""
    found: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, message)
    return next((text for text in found if text), None)


def refuse_together(refusal: str | None) -> None:
    """Go on when all ranks are here, if none has anything to refuse.

    Raises:
        TokscaleError: the first refusal, on all ranks.
    """
    if message := first_of_all_ranks(refusal):
        raise TokscaleError(message)

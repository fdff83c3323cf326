"""How large the model is: what the axis M of scaling laws is measured in."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.training.training import num_floating_point_operations

from megatron_tokscale.training.ranks import sum_over_ranks

_EMBEDDINGS = ("word_embeddings.", "position_embeddings.", "output_layer.")


def model_size(model: Sequence[Any], args: Namespace) -> dict[str, int]:
    """Parameters of the whole model, and FLOPs that a token of training costs. All ranks call it.

    Returns:
        parameters: all of them, tied embeddings and experts counted once.
        non_embedding: without token, position and output embeddings (Kaplan et al. 2020).
        flops_per_token: forward and backward, as Megatron's training log counts them.
    """
    total, embedding = 0, 0
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if _counts_here(parameter):
                total += parameter.numel()
                embedding += parameter.numel() * any(part in name for part in _EMBEDDINGS)
    total, embedding = (int(count) for count in sum_over_ranks(total, embedding))
    flops = num_floating_point_operations(args, 1) / args.seq_length
    return {
        "parameters": total,
        "non_embedding": total - embedding,
        "flops_per_token": round(flops),
    }


def _counts_here(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank is the one of all that hold the parameter that counts it."""
    if getattr(parameter, "shared", False):  # the last stage's copy of a tied embedding
        return False
    is_sharded = getattr(parameter, "tensor_model_parallel", False)
    if not getattr(parameter, "allreduce", True):  # an expert's
        first_shard = mpu.get_expert_tensor_parallel_rank() == 0
        return mpu.get_expert_data_parallel_rank() == 0 and (is_sharded or first_shard)
    first_shard = mpu.get_tensor_model_parallel_rank() == 0
    first_replica = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return first_replica and (is_sharded or first_shard)

"""Sizes of the model, for the run's record."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Final

import torch
from megatron.core import mpu
from megatron.training.training import num_floating_point_operations

from megatron_tokscale.training.ranks import sum_over_ranks

_EMBEDDINGS: Final = ("word_embeddings.", "position_embeddings.", "output_layer.")


def model_info(args: Namespace) -> dict[str, int | None]:
    """Return the sizes that stay the same when a run is resumed in another layout."""
    return {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_experts": args.num_experts,
        "seq_length": args.seq_length,
    }


def model_size(model: Sequence[Any], args: Namespace) -> dict[str, int]:
    """Return the parameters of the whole model and the FLOPs of a training token. Collective.

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
    """Return whether this rank counts the parameter: exactly one of its holders does."""
    if getattr(parameter, "shared", False):  # the last stage's copy of a tied embedding
        return False
    is_sharded = getattr(parameter, "tensor_model_parallel", False)
    if not getattr(parameter, "allreduce", True):  # an expert's
        first_shard = mpu.get_expert_tensor_parallel_rank() == 0
        return mpu.get_expert_data_parallel_rank() == 0 and (is_sharded or first_shard)
    first_shard = mpu.get_tensor_model_parallel_rank() == 0
    first_replica = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return first_replica and (is_sharded or first_shard)

"""Pre-train with context parallelism on the CPU: Megatron's own attention has it on GPUs only.

Keys and values are gathered over the context-parallel ranks and put back in the order of the
sequence; each rank attends from the positions that Megatron's zig-zag cut has given it: of 2 * CP
chunks, rank r has the chunks r and 2 * CP - 1 - r.
"""

import copy
from typing import Any

import torch

from megatron_tokscale import cpu, pretrain

cpu.enable()

from megatron.core import mpu  # noqa: E402 - after the CPU runtime
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402


class GatheringAttention(DotProductAttention):
    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)

    def forward(self, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        group = mpu.get_context_parallel_group()
        chunks = torch.arange(query.shape[0] * group.size()).view(2 * group.size(), -1)
        position_Rs = torch.stack([chunks, chunks.flip(0)], 1)[: group.size()].flatten(1)
        order = position_Rs.flatten().argsort()
        key = gather_from_sequence_parallel_region(key, group=group)[order]
        value = gather_from_sequence_parallel_region(value, group=group)[order]
        is_future = torch.arange(len(order)) > position_Rs[group.rank()][:, None]
        return super().forward(query, key, value, is_future[None, None], **kwargs)


def use_gathering_attention() -> None:
    LocalSpecProvider.core_attention = lambda self: GatheringAttention


if __name__ == "__main__":
    use_gathering_attention()
    pretrain.main()

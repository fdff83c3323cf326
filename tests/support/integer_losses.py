"""The probe pass with numbered tokens and a model that gives each token its own number as its loss.

    integer_losses.py OUT '{"tp": 2, "pp": 2, "vpp": 2, ...}'

No training: Megatron's process groups, its schedules and its cut of the batch for context
parallelism, and a pipeline whose every chunk adds 1 to what it is given. The rank that the losses
arrive on writes them to OUT.
"""

import json
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tokscale import cpu
from megatron_tokscale.probe import ProbeSet

SEQ_LENGTH = 24
# (sequences, micro batch): none fills all microbatches of all layouts.
SIZES = ((1, 1), (1, 4), (5, 2), (7, 4), (12, 1), (31, 2))


def numbered_probe_set(n_sequences: int) -> ProbeSet:
    """Token i of the set has the id i; two of three are watched."""
    number_BS = np.arange(n_sequences * SEQ_LENGTH, dtype=np.int32).reshape(-1, SEQ_LENGTH)
    return ProbeSet(
        tokens_BS=number_BS,
        labels_BS=number_BS,
        mask_BS=number_BS % 3 > 0,
        document_BS=number_BS,
        position_BS=number_BS,
        dataset_BS=np.zeros_like(number_BS, np.int16),
        datasets=("numbers",),
        vocab_size=number_BS.size,
    )


class Chunk(torch.nn.Module):
    """A pipeline chunk: adds 1. The first embeds the tokens' numbers, the last returns losses."""

    def __init__(self, config: Any, index: int, n_chunks: int, vp_stage: int | None):
        from megatron.core.enums import ModelType

        super().__init__()
        self.config, self.vp_stage = config, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.is_first, self.is_last = index == 0, index == n_chunks - 1
        self.n_before = index
        self.hidden_sbh = torch.empty(0)

    def set_input_tensor(self, tensor: Any) -> None:
        self.hidden_sbh = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, tokens_bs: Any, labels_bs: Any) -> torch.Tensor:
        from megatron.core import mpu, tensor_parallel

        if self.is_first:
            self.hidden_sbh = tokens_bs.T[..., None].float().contiguous()
            if self.config.sequence_parallel:
                self.hidden_sbh = tensor_parallel.scatter_to_sequence_parallel_region(
                    self.hidden_sbh
                )
        # What a mixture of experts does: a collective per microbatch, which must not go unanswered.
        torch.distributed.all_reduce(torch.ones(1), group=mpu.get_expert_model_parallel_group())
        hidden_sbh = self.hidden_sbh + 1
        if not self.is_last:
            return hidden_sbh
        if self.config.sequence_parallel:
            hidden_sbh = tensor_parallel.gather_from_sequence_parallel_region(hidden_sbh)
        loss_bs = hidden_sbh[..., 0].T.contiguous()
        assert torch.equal(loss_bs - self.n_before - 1, labels_bs.float()), "another microbatch"
        return loss_bs


def forward_step(iterator: Any, chunk: Chunk) -> Any:
    from megatron_tokscale.pretrain import get_batch, loss_func

    batch = get_batch(iterator, chunk.vp_stage)
    if batch["attention_mask"] is not None:
        check_attention_mask(batch)
    return chunk(batch["tokens"], batch["labels"]), partial(loss_func, batch["loss_mask"])


def check_attention_mask(batch: dict[str, Any]) -> None:
    """Compare the mask that has come through Megatron's broadcast and cut, query by query."""
    positions_bs, mask_b1sS = batch["position_ids"], batch["attention_mask"]
    for positions_s, mask_1sS in zip(positions_bs, mask_b1sS, strict=True):
        for position, mask_S in zip(positions_s.tolist(), mask_1sS[0].tolist(), strict=True):
            assert mask_S == [key > position for key in range(SEQ_LENGTH)], "another mask"


def build_chunks(sizes: dict[str, Any]) -> list[Chunk]:
    from megatron.core import mpu
    from megatron.core.transformer import TransformerConfig

    pp_size, vp_size = sizes.get("pp", 1), sizes.get("vpp")
    n_chunks = pp_size * (vp_size or 1)
    config = TransformerConfig(
        num_layers=n_chunks,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=vp_size,
        microbatch_group_size_per_vp_stage=sizes.get("vpp_group"),
        context_parallel_size=sizes.get("cp", 1),
        pipeline_dtype=torch.float32,
    )
    config.sequence_parallel = sizes.get("sp", False)
    rank = mpu.get_pipeline_model_parallel_rank()
    return [
        Chunk(config, rank + stage * pp_size, n_chunks, stage if vp_size else None)
        for stage in range(vp_size or 1)
    ]


def main() -> None:
    cpu.enable()
    from megatron.core import mpu
    from megatron.training import global_vars

    from megatron_tokscale.training.probe import probe_pass

    out, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        virtual_pipeline_model_parallel_size=sizes.get("vpp"),
        context_parallel_size=sizes.get("cp", 1),
        expert_model_parallel_size=sizes.get("ep", 1),
        expert_tensor_parallel_size=sizes.get("etp"),
        order=sizes.get("order", "tp-cp-ep-dp-pp"),
    )
    chunks = build_chunks(sizes)
    found = {}
    for n_sequences, micro_batch_size in SIZES:
        args = Namespace(
            micro_batch_size=micro_batch_size,
            seq_length=SEQ_LENGTH,
            decoder_seq_length=None,
            context_parallel_size=sizes.get("cp", 1),
            create_attention_mask_in_dataloader=True,
            mtp_num_layers=None,
        )
        global_vars.set_args(args)
        with torch.no_grad():
            loss_N = probe_pass.run(numbered_probe_set(n_sequences), forward_step, chunks, args)
        assert (loss_N is not None) == probe_pass.is_writer()
        found[n_sequences, micro_batch_size] = None if loss_N is None else torch.tensor(loss_N)
    if probe_pass.is_writer():
        torch.save(found, out)


if __name__ == "__main__":
    main()

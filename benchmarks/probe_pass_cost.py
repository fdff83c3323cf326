"""Cost of a probe: on the host per microbatch, and on the writer's GPU per token slot.

    PYTHONPATH=tests/support python benchmarks/probe_pass_cost.py [--out FILE]

The peer is the way without the two savings: each microbatch builds its attention mask on the host;
messages, columns and losses stay on the GPU, and a sort puts them in order there. Both ways take
turns in one process. A slot is a token of the padded probe set: every row of every microbatch.

Time: a pass on the CPU with the attention mask on, of a model whose last layer has the whole
vocabulary. On a CPU the mask "on the device" is the CPU's work too. Memory: tensors alive on a
labelled device (tests/support/labelled_device.py), or allocated on a GPU where there is one.

Shapes: B sequences, S sequence length, R ranks, M microbatches, b sequences of a microbatch, s
tokens of a row.
"""

import argparse
import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from random_probe_set import random_probe_set
from table import heading, markdown

from megatron_tokscale.probe import ProbeSet

SEQ_LENGTH, VOCABULARY, MICRO_BATCH = 4096, 128_000, 2
WIDTH = 8  # of the model: next to the vocabulary, its other layers are small
LOGIT_ROWS = 512  # tokens whose logits are there at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8, help="of the timed pass")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each way, in turns")
    parser.add_argument("--slots", type=int, default=10_000_000, help="of the memory")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as other:  # without the CPU runtime
        memory = other.apply(memory_table, (arguments.slots,))
    text = "\n\n".join(
        [
            heading(torch=torch.__version__, numpy=np.__version__)
            + f"; sequences of {SEQ_LENGTH} tokens, micro batch {MICRO_BATCH}, "
            f"vocabulary {VOCABULARY:,}, {torch.get_num_threads()} thread",
            f"Host, {arguments.sequences} sequences, median of {arguments.rounds} passes:",
            time_table(arguments.sequences, arguments.rounds),
            f"The writer's GPU, {arguments.slots:,} slots:",
            memory,
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


# Time.


class MasksOnHost:
    """The peer: microbatches on the host, each with an attention mask of its own."""

    def __init__(self, probe_set: ProbeSet, rows_Mb: Any, has_mask: bool, device: Any) -> None:
        self.probe_set, self.rows_Mb = probe_set, rows_Mb

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        positions_S = torch.arange(self.probe_set.seq_length)
        for rows_b in self.rows_Mb % self.probe_set.n_sequences:
            future_SS = torch.ones(len(positions_S), len(positions_S)).triu(1).bool()
            yield {
                "tokens": torch.from_numpy(self.probe_set.tokens_BS[rows_b]).long(),
                "labels": torch.from_numpy(self.probe_set.labels_BS[rows_b]).long(),
                "loss_mask": (positions_S + 1).float().repeat(len(rows_b), 1),
                "position_ids": positions_S.repeat(len(rows_b), 1),
                "attention_mask": future_SS.repeat(len(rows_b), 1, 1, 1),
            }


class Model(torch.nn.Module):
    """An embedding and the logits of the whole vocabulary; it notes the seconds that it takes."""

    def __init__(self) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.transformer import TransformerConfig

        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
        self.model_type, self.vp_stage = ModelType.encoder_or_decoder, None
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.seconds = 0.0

    def set_input_tensor(self, tensor: Any) -> None: ...

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        started = time.process_time()
        hidden, labels = self.embedding(batch["tokens"]).view(-1, WIDTH), batch["labels"].view(-1)
        losses = [
            torch.nn.functional.cross_entropy(
                rows @ self.embedding.weight.T, labels_of_rows, reduction="none"
            )
            for rows, labels_of_rows in zip(
                hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True
            )
        ]
        loss_bs = torch.cat(losses).view_as(batch["labels"])
        self.seconds += time.process_time() - started
        return loss_bs


def forward_step(iterator: Any, model: Model) -> Any:
    from megatron_tokscale.pretrain import get_batch, loss_func

    batch = get_batch(iterator, model.vp_stage)
    return model(batch), partial(loss_func, batch["loss_mask"])


def time_table(n_sequences: int, rounds: int) -> str:
    """Return the table of CPU seconds per microbatch, of both ways."""
    from megatron_tokscale import cpu

    cpu.enable()
    from megatron.core import mpu
    from megatron.training import global_vars

    from megatron_tokscale.training.probe import probe_pass

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    mpu.initialize_model_parallel()
    args = Namespace(
        micro_batch_size=MICRO_BATCH,
        seq_length=SEQ_LENGTH,
        decoder_seq_length=None,
        context_parallel_size=1,
        create_attention_mask_in_dataloader=True,
        mtp_num_layers=None,
    )
    global_vars.set_args(args)
    probe_set, model = random_probe_set(n_sequences, SEQ_LENGTH, VOCABULARY), Model()
    n_microbatches = -(-n_sequences // MICRO_BATCH)

    def take() -> tuple[float, float, Any]:
        model.seconds, started = 0.0, time.process_time()
        loss_N = probe_pass.run(probe_set, forward_step, [model], args)
        whole = time.process_time() - started
        return model.seconds / n_microbatches, (whole - model.seconds) / n_microbatches, loss_N

    before, after = [], []
    with torch.no_grad():
        for _ in range(rounds):
            with mock.patch.object(probe_pass, "Microbatches", MasksOnHost):
                before.append(take())
            after.append(take())
            if not np.array_equal(before[-1][2], after[-1][2]):
                sys.exit("the two ways give different losses")
    torch.distributed.destroy_process_group()
    rows = []
    for name, which in (("the model", 0), ("all else, on the host", 1)):
        old, new = (float(np.median([each[which] for each in way])) for way in (before, after))
        rows.append([name, f"{1e3 * old:.1f}", f"{1e3 * new:.1f}", f"{old / new:.2f}"])
    return markdown(["CPU time per microbatch, ms", "before", "after", "before / after"], rows)


# Memory.


class SortOnGPU:
    """The peer: messages, index and sorted losses on the GPU."""

    def __init__(self, n_microbatches: int, dp_rank: int) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.dp_rank = dp_rank

    def collect(self, mask: torch.Tensor, output: torch.Tensor) -> None:
        self.parts.append((output.detach().float(), mask.detach().float().view_as(output)))

    def losses(self, gather: Callable[[torch.Tensor], torch.Tensor], n_ranks: int) -> Any:
        loss_Mbs = torch.stack([loss_bs for loss_bs, _ in self.parts])
        coordinate_Mbs = torch.stack([coordinate_bs for _, coordinate_bs in self.parts])
        columns_s = coordinate_Mbs[0, 0] - 1
        is_regular = (coordinate_Mbs == coordinate_Mbs[0, 0]).all()
        columns_s = torch.where(is_regular, columns_s, torch.full_like(columns_s, -1))
        rank = torch.tensor([self.dp_rank], dtype=torch.float32, device=loss_Mbs.device)
        messages = gather(torch.cat([loss_Mbs.flatten(), columns_s, rank]))
        messages_R = torch.stack(list(messages))
        n_microbatches, micro_batch_size, width = loss_Mbs.shape
        n_losses, device = loss_Mbs.numel(), messages_R.device
        loss_R, columns_Rs, dp_rank_R = messages_R.tensor_split((n_losses, n_losses + width), dim=1)
        block_RM = torch.arange(n_microbatches, device=device) * n_ranks + dp_rank_R.long()
        place_b = torch.arange(micro_batch_size, device=device)
        row_RMb = block_RM[..., None] * micro_batch_size + place_b
        index = row_RMb[..., None] * width + columns_Rs.long()[:, None, None, :]
        index, order = index.flatten().sort()
        assert torch.equal(index, torch.arange(index.numel(), device=device))
        return loss_R.flatten()[order].cpu().numpy()


def memory_table(n_slots: int) -> str:
    """Return the table of peak bytes per slot, of both ways, with one and with eight ranks."""
    from labelled_device import labelled_cuda

    rows = []
    for n_ranks in (1, 8):
        if torch.cuda.is_available():
            old, new = (_gpu_peak(way, n_slots, n_ranks) for way in (_before, _after))
        else:
            peaks = []
            for way in (_before, _after):
                with labelled_cuda() as gpu:
                    way(n_slots, n_ranks)
                    peaks.append(gpu.peak)
            old, new = peaks
        n_real = _microbatches(n_slots, n_ranks) * n_ranks * MICRO_BATCH * SEQ_LENGTH
        rows.append(
            [str(n_ranks), f"{old / n_real:.1f}", f"{new / n_real:.1f}", f"{old / new:.1f}"]
        )
    columns = ["ranks with losses", "bytes per slot before", "after", "before / after"]
    return markdown(columns, rows)


def _gpu_peak(way: Callable[[int, int], None], n_slots: int, n_ranks: int) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way(n_slots, n_ranks)
    return torch.cuda.max_memory_allocated() - before


def _microbatches(n_slots: int, n_ranks: int) -> int:
    return -(-n_slots // (n_ranks * MICRO_BATCH * SEQ_LENGTH))


def _fill(collector: Any, n_microbatches: int) -> None:
    mask = torch.arange(1.0, SEQ_LENGTH + 1, device="cuda").repeat(MICRO_BATCH, 1)
    for _ in range(n_microbatches):
        collector.collect(mask.clone(), torch.ones(MICRO_BATCH, SEQ_LENGTH, device="cuda"))


def _of_ranks(message: torch.Tensor, messages: torch.Tensor) -> torch.Tensor:
    """Fill in the messages of all ranks, as a collective does: equal but for the rank's number."""
    messages.copy_(message)
    messages[:, -1] = torch.arange(len(messages), device=message.device)
    return messages


def _before(n_slots: int, n_ranks: int) -> None:
    collector = SortOnGPU(_microbatches(n_slots, n_ranks), 0)
    _fill(collector, _microbatches(n_slots, n_ranks))

    def gather(message: torch.Tensor) -> torch.Tensor:
        return _of_ranks(message, message.new_empty(n_ranks, len(message)))

    collector.losses(gather, n_ranks)


def _after(n_slots: int, n_ranks: int) -> None:
    from megatron_tokscale.training.probe import gathering
    from megatron_tokscale.training.probe.microbatches import deal_rows

    n_microbatches = _microbatches(n_slots, n_ranks)
    collector = gathering.LossCollector(n_microbatches, 0)
    _fill(collector, n_microbatches)
    group: Any = Namespace(size=lambda: n_ranks, rank=lambda: 0)

    def all_gather(messages: torch.Tensor, message: torch.Tensor, group: Any) -> None:
        _of_ranks(message, messages.view(n_ranks, -1))

    with mock.patch.object(torch.distributed, "all_gather_into_tensor", all_gather):
        message_RX = gathering.gather(collector.message(), group)
    assert message_RX is not None
    n_rows = n_microbatches * n_ranks * MICRO_BATCH
    rows_PMb = deal_rows(n_rows, MICRO_BATCH, n_ranks, 1)
    few = Namespace(n_sequences=1, seq_length=SEQ_LENGTH, mask_BS=np.ones((1, SEQ_LENGTH), bool))
    gathering.place_losses(message_RX, rows_PMb, few)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

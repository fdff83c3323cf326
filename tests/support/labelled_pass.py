"""The probe pass on labelled CUDA tensors: real process groups and schedule, a toy model.

    labelled_pass.py FOLDER

Runs each of `CASES`; each rank writes its losses, if it is the writer, and how often the host has
waited for the device. The loss of a token is a sum of whole numbers, exact in float32: the number
of its label, plus the numbers of the tokens that the attention mask lets it see.
"""

import json
import multiprocessing
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from integer_losses import SEQ_LENGTH, numbered_probe_set
from jobs import free_port
from labelled_device import labelled_cuda

CASES = ((1, 1, 5), (2, 1, 7), (2, 2, 5))  # ranks, tensor-parallel size, sequences
MICRO_BATCH = 2
VOCABULARY = 97


def number_of(token: Any) -> Any:
    """A number below 97 that tells tokens apart and is in no order."""
    return token * 31 % VOCABULARY


class Model(torch.nn.Module):
    def __init__(self) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.transformer import TransformerConfig

        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = None

    def set_input_tensor(self, tensor: Any) -> None: ...

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        seen_bSS = (~batch["attention_mask"][:, 0]).float()
        context_bS1 = seen_bSS @ number_of(batch["tokens"]).float()[..., None]
        return context_bS1[..., 0] + number_of(batch["labels"]).float()


def forward_step(iterator: Any, model: Model) -> Any:
    """The step of `megatron_tokscale.pretrain`, with its batch."""
    from megatron_tokscale.pretrain import get_batch, loss_func

    batch = get_batch(iterator, model.vp_stage)
    return model(batch), partial(loss_func, batch["loss_mask"])


def megatrons_forward_step(iterator: Any, model: Model) -> Any:
    """The step of Megatron's own pretrain_gpt.py, with its batch."""
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_tp_rank

    from megatron_tokscale.pretrain import loss_func

    tp_rank, batch = mpu.get_tensor_model_parallel_rank(), {}
    if tp_rank == 0:
        batch = {name: value.cuda(non_blocking=True) for name, value in next(iterator).items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=True,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=tp_rank,
        micro_batch_size=MICRO_BATCH,
        seq_length=SEQ_LENGTH,
        mtp_on_this_rank=False,
    )
    return model(batch), partial(loss_func, batch["loss_mask"])


STEPS = {"plugin": forward_step, "megatron": megatrons_forward_step}


def run_rank(rank: int, case: tuple[int, int, int], port: int, folder: Path) -> None:
    from megatron.core import mpu
    from megatron.training import global_vars

    from megatron_tokscale.training.probe import probe_pass

    ranks, tp_size, n_sequences = case
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp_size)
    args = Namespace(
        micro_batch_size=MICRO_BATCH,
        seq_length=SEQ_LENGTH,
        decoder_seq_length=None,
        context_parallel_size=1,
        create_attention_mask_in_dataloader=True,
        mtp_num_layers=None,
    )
    global_vars.set_args(args)
    for name, step in STEPS.items():
        with labelled_cuda() as gpu, torch.no_grad():
            loss_N = probe_pass.run(numbered_probe_set(n_sequences), step, [Model()], args)
        found = {
            "losses": None if loss_N is None else loss_N.tolist(),
            "synchronisations": gpu.synchronisations,
            "operations": gpu.operations,
        }
        (folder / file_name(case, name, rank)).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def file_name(case: tuple[int, int, int], step: str, rank: int) -> str:
    return f"{step} {case}.{rank}.json"


def main() -> None:
    import megatron.training  # noqa: F401 - before the forks

    import megatron_tokscale.pretrain
    import megatron_tokscale.training.probe.probe_pass  # noqa: F401

    folder, forks = Path(sys.argv[1]), multiprocessing.get_context("fork")
    for case in CASES:
        port, processes = free_port(), []
        for rank in range(case[0]):
            processes.append(forks.Process(target=run_rank, args=(rank, case, port, folder)))
            processes[-1].start()
        for process in processes:
            process.join()
            assert process.exitcode == 0


if __name__ == "__main__":
    main()

"""Part on parallel layouts over NCCL, for two GPUs or more."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from checkpoints import checkpoint_differences

from gpu_check.checks import FAILED, NOT_RUN, Check, check
from gpu_check.site import Job, Site
from gpu_check.training_parts import has_transformer_engine
from megatron_tokscale.store import Run

_LAYOUTS: Final = {
    "DP2": {},
    "TP2": {"--tensor-model-parallel-size": "2", "--sequence-parallel": ""},
    "PP2": {"--pipeline-model-parallel-size": "2"},
    "CP2": {"--context-parallel-size": "2"},
}
_CLOSE: Final = 5e-2
"""Nats between layouts in bfloat16, whose sums differ in order: ten times what tests see with
8 bits on a CPU, for kernels differ too."""


def layouts(site: Site) -> Iterator[Check]:
    """Check losses and isolation in parallel layouts of two ranks, from one process's weights."""
    if not site.on_cpu and site.gpus < 2:
        yield Check("losses and isolation in parallel layouts", NOT_RUN, f"{site.gpus} GPU here")
        return
    found = dict(_LAYOUTS)
    if not has_transformer_engine():
        del found["CP2"]
        yield Check("context parallelism", NOT_RUN, "no Transformer Engine here")
    base = site.training()
    first = base | {"--save": ".", "--save-interval": "10"} | site.probe("list:10")
    alone = site.run("alone", Job(first))
    if alone.code:
        yield Check("one process trains to its end", FAILED, alone.last_line)
        return
    expected_N = Run.open(site.folder / "alone").read_losses()[:, -1]
    load = {"--load": str(site.folder / "alone"), "--finetune": ""}
    save = {"--save": ".", "--save-interval": "4", "--train-iters": "4"}
    for name, flags in found.items():
        plain = base | load | save | flags
        probed = plain | site.probe("list:0,1,3") | {"--tokscale-verify-isolation": ""}
        jobs = site.run_all(
            {f"{name}-plain": Job(plain, ranks=2), f"{name}-probed": Job(probed, ranks=2)}
        )
        failed = [job.last_line for job in jobs.values() if job.code]
        if failed:
            yield Check(f"{name}: both jobs train to their end", FAILED, failed[0])
            continue
        losses_N = Run.open(site.folder / f"{name}-probed").read_losses()[:, 0]
        worst = float(np.abs(losses_N - expected_N).max())
        yield check(
            f"{name}: losses are those of one process",
            holds=worst < _CLOSE,
            detail=f"largest difference {worst:.1e} nats",
        )
        differences = checkpoint_differences(
            site.folder / f"{name}-plain", site.folder / f"{name}-probed"
        )
        yield check(
            f"{name}: a job with probes is the same to the bit",
            holds=not differences,
            detail=", ".join(differences[:3]),
        )

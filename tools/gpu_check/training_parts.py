"""Parts on training, which is the same to the bit with probes and without them."""

import importlib.util
import signal
from collections.abc import Iterator, Mapping
from typing import Final

from checkpoints import checkpoint_differences

from gpu_check.checks import FAILED, MEASURED, NOT_RUN, Check, check
from gpu_check.site import OVERLAPS, Ended, Job, Site
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Run

_SCHEDULE: Final = "list:0,1,3,7"
_STEPS: Final = [0, 1, 3, 7]
_VERIFY: Final = {"--tokscale-verify-isolation": ""}
_NO_CHECKPOINT: Final = "no checkpoint to compare"
_SAVE: Final = {"--save": ".", "--save-interval": "10"}

# A forward step that draws from Megatron's generator tracker in evaluation, as cuDNN's attention
# does, with the probe's restore of the generators or without it.
_DRAWING: Final = """
from contextlib import contextmanager

import torch
from megatron_tokscale import pretrain

def drawing(forward_step):
    def step(iterator, model):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        if not model.training:
            with get_cuda_rng_tracker().fork():
                torch.rand(1, device="cuda")
            torch.rand(1, device="cuda")
        return forward_step(iterator, model)

    return step

@contextmanager
def nothing():
    yield

if __name__ == "__main__":  # a checkpoint's writer is a process that imports this script
    pretrain.prepare()
    pretrain.forward_step = drawing(pretrain.forward_step)
    if {unrestored}:
        from megatron_tokscale.training.probe import isolation

        isolation.restored_generators = nothing
    pretrain.train()
"""

MOE: Final = {
    "--num-experts": "8",
    "--moe-router-topk": "2",
    "--moe-router-load-balancing-type": "aux_loss",
    "--moe-aux-loss-coeff": "0.01",
    "--moe-z-loss-coeff": "0.001",
    "--moe-router-score-function": "sigmoid",
    "--moe-router-enable-expert-bias": "",
    "--moe-input-jitter-eps": "0.01",
}


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def isolation(site: Site) -> Iterator[Check]:
    """Check that training is the same with probes, torch.compile on, and count recompilations."""
    logs = {"TORCH_LOGS": "recompiles"}
    plain = site.training() | _SAVE
    jobs = site.run_all(
        {
            "plain": Job(plain, environment=logs),
            "again": Job(plain),
            "probed": Job(plain | site.probe(_SCHEDULE) | _VERIFY, environment=logs),
        }
    )
    yield from _ended_well(jobs)
    yield _equal(site, "two jobs without probes are the same to the bit", "plain", "again")
    yield _equal(site, "a job with probes is the same to the bit", "plain", "probed")
    yield _probes_taken(site, "probed")
    counts = {name: jobs[name].output.count("Recompiling function") for name in ("plain", "probed")}
    yield Check("recompilations of torch.compile", MEASURED, f"{counts}")


def restore(site: Site) -> Iterator[Check]:
    """Check that random draws of a probe are undone, and that draws left in are detected."""
    scripts = {}
    for name, unrestored in (("restored", False), ("unrestored", True)):
        scripts[name] = site.folder / f"{name}.py"
        site.folder.mkdir(parents=True, exist_ok=True)
        scripts[name].write_text(_DRAWING.format(unrestored=unrestored))
    plain = site.training() | _SAVE
    probed = plain | site.probe(_SCHEDULE)
    jobs = site.run_all(
        {
            "undrawn": Job(plain),
            "drawn": Job(probed, [str(scripts["restored"])]),
            "kept": Job(probed, [str(scripts["unrestored"])]),
            "caught": Job(probed | _VERIFY, [str(scripts["unrestored"])]),
        }
    )
    caught = jobs.pop("caught")
    yield from _ended_well(jobs)
    yield _equal(site, "random draws of a probe's forward pass are undone", "undrawn", "drawn")
    promise = "the comparison of checkpoints detects random draws that are not undone"
    equal = _equal(site, promise, "undrawn", "kept")
    differ = equal.verdict == FAILED and not equal.detail.startswith(_NO_CHECKPOINT)
    yield check(promise, holds=differ, detail=equal.detail)
    yield check(
        "--tokscale-verify-isolation stops the job on random draws that are not undone",
        holds=caught.code != 0 and "changed" in caught.output and "generator" in caught.output,
        detail=caught.last_line,
    )


def transformer_engine(site: Site) -> Iterator[Check]:
    """Check isolation with Transformer Engine: plain, its generator tracker, its CUDA graphs."""
    yield from _with_transformer_engine(
        site,
        {
            "te": {},
            "te-rng": {"--te-rng-tracker": ""},
            "te-graphs": {"--cuda-graph-impl": "transformer_engine"},
        },
    )


def fp8(site: Site) -> Iterator[Check]:
    """Check isolation with fp8: delayed and current scaling, with parameters in fp8 or not."""
    gather = {"--fp8-param-gather": ""}
    recipes = {
        name: {"--fp8-format": "hybrid", "--fp8-recipe": name} for name in ("delayed", "tensorwise")
    }
    yield from _with_transformer_engine(
        site,
        recipes | {f"{name}-params": flags | gather for name, flags in recipes.items()},
    )


def _with_transformer_engine(
    site: Site, variants: Mapping[str, Mapping[str, str]]
) -> Iterator[Check]:
    if not has_transformer_engine():
        yield Check(f"isolation with {', '.join(variants)}", NOT_RUN, "no Transformer Engine here")
        return
    local = {"--transformer-impl", "--no-persist-layer-norm", "--no-rope-fusion"}
    local |= {"--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"}
    base = {flag: value for flag, value in site.training().items() if flag not in local}
    jobs = {}
    for name, flags in variants.items():
        jobs[f"{name}-plain"] = Job(base | _SAVE | flags)
        jobs[f"{name}-probed"] = Job(base | _SAVE | flags | site.probe(_SCHEDULE) | _VERIFY)
    ended = site.run_all(jobs)
    yield from _ended_well(ended)
    for name in variants:
        promise = f"{name}: a job with probes is the same to the bit"
        yield _equal(site, promise, f"{name}-plain", f"{name}-probed")


def moe(site: Site) -> Iterator[Check]:
    """Check isolation of a mixture of experts with bias, auxiliary loss, z-loss and jitter."""
    plain = site.training() | _SAVE | MOE
    probed = plain | site.probe(_SCHEDULE) | _VERIFY
    jobs = site.run_all({"moe-plain": Job(plain), "moe-probed": Job(probed)})
    yield from _ended_well(jobs)
    promise = "mixture of experts: a job with probes is the same to the bit"
    yield _equal(site, promise, "moe-plain", "moe-probed")


def endings(site: Site) -> Iterator[Check]:
    """Check jobs that save asynchronously, get SIGTERM or SIGKILL, and resume."""
    run = {"--save": ".", "--load": ".", "--save-interval": "4", "--async-save": ""}
    run |= {"--exit-signal-handler": "", "--tokscale-probe-at-exit": ""}
    # Without Transformer Engine and apex, Megatron's distributed optimizer cannot be loaded.
    base = {flag: value for flag, value in site.training().items() if flag not in OVERLAPS}
    flags = base | run | site.probe("linear:1")
    whole = site.run("whole", Job(flags))
    yield from _ended_well({"whole": whole})
    mark = "tokscale probe at step 5 "
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        name = signal_.name
        site.run(name, Job(flags, kill_at=mark, kill_by=signal_))
        yield from _ended_well({name: site.run(name, Job(flags))})
        steps = Run.open(site.folder / name).step_K.tolist()
        yield check(
            f"after {name} and a resume each step has its one probe",
            holds=steps == list(range(11)),
            detail=f"steps {steps}",
        )
        yield _equal(site, f"after {name} training is the same as without it", "whole", name)


def _ended_well(jobs: Mapping[str, Ended]) -> Iterator[Check]:
    for name, job in jobs.items():
        if job.code:
            yield Check(f"the job '{name}' trains to its end", FAILED, job.last_line)


def _equal(site: Site, promise: str, left: str, right: str) -> Check:
    try:
        differences = checkpoint_differences(site.folder / left, site.folder / right)
    except (AssertionError, OSError, TypeError) as error:
        return Check(promise, FAILED, f"{_NO_CHECKPOINT} ({error})")
    return check(promise, holds=not differences, detail=", ".join(differences[:3]))


def _probes_taken(site: Site, name: str) -> Check:
    try:
        steps = Run.open(site.folder / name).step_K.tolist()
    except TokscaleError as error:
        return Check("the probes are on disk", FAILED, str(error))
    return check("the probes are on disk", holds=steps == _STEPS, detail=f"steps {steps}")

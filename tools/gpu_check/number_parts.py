"""Parts on numbers and their cost: losses, evaluation, memory, steps without a probe, the fit."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Final

import numpy as np

from gpu_check.checks import FAILED, MEASURED, NOT_RUN, Check, check
from gpu_check.inspect_job import read_record
from gpu_check.site import INSPECT, Job, Site, probe_set_of
from megatron_tokscale.store import Run

_CLOSE: Final = 2e-3
"""Nats by which two means of the same losses in bfloat16 may differ: their sums differ in order."""
_COST: Final = 1.05
"""Limit of a probe's time, in evaluations of the same sequences by Megatron. Our choice: above the
noise of the medians."""
_GROWTH: Final = 64 * 2**20
"""Bytes by which reserved memory may grow over 19 probes: one block of the caching allocator."""


def gathering(site: Site) -> Iterator[Check]:
    """Check that losses reach their places on the writer's host, and the memory on its GPU."""
    import torch

    from megatron_tokscale.training.probe.gathering import LossCollector, gather, place_losses
    from megatron_tokscale.training.probe.microbatches import deal_rows

    size = replace(site.long, micro_batch=2, sequences=9 if site.on_cpu else 256)
    probe_set = probe_set_of(size)
    generator = np.random.default_rng(0)
    expected_BS = generator.random(probe_set.tokens_BS.shape, np.float32)
    column_S = generator.permutation(size.length)  # as context parallelism permutes them
    rows_PMb = deal_rows(size.sequences, size.micro_batch, 1, 1)
    mask_bS = torch.from_numpy(column_S + 1).float().repeat(size.micro_batch, 1).to(site.device)
    before = _allocated(site, starts=True)
    collector = LossCollector(rows_PMb.shape[1], 0)
    for rows_b in rows_PMb[0] % size.sequences:
        loss_bS = torch.from_numpy(expected_BS[rows_b][:, column_S]).to(site.device)
        collector.collect(mask_bS, loss_bS)
    message_RX = gather(collector.message(), _Alone())  # type: ignore[arg-type]
    assert message_RX is not None
    loss_N = place_losses(message_RX, rows_PMb, probe_set)
    per_slot = (_allocated(site) - before) / expected_BS.size
    yield check(
        "losses arrive in their places, to the bit",
        holds=bool(np.array_equal(loss_N, expected_BS[probe_set.mask_BS])),
        detail=f"{expected_BS.size:,} slots",
    )
    found = check(
        "the writer's GPU holds at most 8 bytes a token",
        holds=per_slot <= 8,
        detail=f"{per_slot:.1f}",
    )
    yield _on_gpu(site, found)


class _Alone:
    """Group of one rank, with the one method of it that `gather` calls."""

    def size(self) -> int:
        return 1


def _allocated(site: Site, *, starts: bool = False) -> int:
    """Return the bytes allocated on the device: now, if a measurement starts, or the peak since."""
    import torch

    if site.on_cpu:
        return 0
    if starts:
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    return int(torch.cuda.max_memory_allocated())


def _on_gpu(site: Site, found: Check) -> Check:
    """Return a check of the GPU's own doing; on a CPU it would hold, or fail, for no reason."""
    return replace(found, verdict=NOT_RUN, detail="no GPU here") if site.on_cpu else found


def losses(site: Site) -> Iterator[Check]:
    """Check the losses against plain torch in float32, for the same weights."""
    from checkpoints import read_checkpoint
    from plain_gpt import plain_losses

    size = site.size
    flags = {flag: v for flag, v in site.training().items() if flag != "--bf16"}
    flags |= {"--save": ".", "--save-interval": "10"} | site.probe("list:10")
    job = site.run("float32", Job(flags))
    if job.code:
        yield Check("a job in float32 trains to its end", FAILED, job.last_line)
        return
    run = Run.open(site.folder / "float32")
    probe_set, losses_N = run.probe_set, run.read_losses()[:, -1]
    weights = read_checkpoint(site.folder / "float32" / "iter_0000010")["sharded"]
    expected_BS = plain_losses(
        weights,
        probe_set.tokens_BS,
        probe_set.labels_BS,
        n_layers=size.layers,
        n_heads=size.heads,
        device=site.device,
    )
    worst = float(np.abs(losses_N - expected_BS.numpy()[probe_set.mask_BS]).max())
    yield check(
        "token losses are those of plain torch in float32",
        holds=worst < 1e-4,
        detail=f"largest difference {worst:.1e} nats over {len(losses_N):,} tokens",
    )


def cost(site: Site) -> Iterator[Check]:
    """Check a probe beside `evaluate()` of the same sequences: its mean, its time, its memory."""
    flags = site.training(site.long) | site.probe("list:99", site.long)
    flags |= {"--tokscale-dir": "run", "--train-iters": "4"}
    job = site.run("cost", Job(flags, INSPECT, environment={"GPU_CHECK_INSPECT": "probes"}))
    if job.code:
        yield Check("a job that inspects its probes ends", FAILED, job.last_line)
        return
    record = read_record(job.output)
    run = Run.open(site.folder / "cost" / "run")
    mean = float(run.read_losses()[:, 0].mean())
    yield check(
        "the mean of the losses is that of Megatron's evaluate()",
        holds=abs(mean - record["mean"]) < _CLOSE,
        detail=f"{mean:.5f} and {record['mean']:.5f} nats",
    )
    probe, evaluation = (median(record[name][1:]) for name in ("probe", "evaluate"))
    found = check(
        f"a probe costs at most {_COST} evaluations",
        holds=probe / evaluation <= _COST,
        detail=f"{probe:.3f} s and {evaluation:.3f} s, ratio {probe / evaluation:.3f}",
    )
    yield _on_gpu(site, found)
    peaks = max(record["peak"]) / 2**20, record["training peak"] / 2**20
    found = check(
        "a probe's peak of memory is below training's",
        holds=peaks[0] <= peaks[1],
        detail=f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB",
    )
    yield _on_gpu(site, found)
    growth = record["reserved"][-1] - record["reserved"][0]
    found = check(
        "reserved memory stays the same over 20 probes",
        holds=growth <= _GROWTH,
        detail=f"grows by {growth / 2**20:.0f} MiB",
    )
    yield _on_gpu(site, found)


def steps(site: Site) -> Iterator[Check]:
    """Check that a step with no probe due copies and waits as often as without the plugin."""
    flags = site.training() | {"--train-iters": "36"}
    probed = flags | site.probe("list:999999") | {"--tokscale-dir": "run"}
    environment = {"GPU_CHECK_INSPECT": "steps"}
    records = {}
    for name, words in (("off", flags), ("on", probed)):  # in turns: they are timed
        job = site.run(f"steps-{name}", Job(words, INSPECT, environment=environment))
        if job.code:
            yield Check(f"a job that inspects its steps ends, plugin {name}", FAILED, job.last_line)
            return
        records[name] = read_record(job.output)
    waits = {name: record["waits"] for name, record in records.items()}
    found = check(
        "steps with no probe due copy and wait as often as with the plugin off",
        holds=waits["on"] == waits["off"],
        detail=f"in 30 steps {waits['on']}" if waits["on"] == waits["off"] else f"{waits}",
    )
    yield _on_gpu(site, found)
    ratio = records["on"]["seconds"] / records["off"]["seconds"]
    yield Check(
        "time of steps with no probe due, over steps with the plugin off", MEASURED, f"{ratio:.3f}"
    )


_FIT: Final = """
import json, os, sys, time
import numpy as np, torch
from megatron_tokscale.fit import fit_sigmoids

n_tokens, device = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
x_K = np.log(np.geomspace(1, 1e5, 60))
midpoint_N1 = rng.uniform(2, 10, (n_tokens, 1))
width_N1 = np.exp(rng.uniform(np.log(0.1), np.log(1.0), (n_tokens, 1)))
kind_N1 = rng.integers(0, 4, (n_tokens, 1))
fall_NK = 3 / (1 + np.exp((x_K - midpoint_N1) / width_N1))
ramp_NK = 2 - rng.uniform(0.1, 0.4, (n_tokens, 1)) * x_K
second_NK = 1.5 / (1 + np.exp((x_K - midpoint_N1 - 3) / width_N1))
loss_NK = np.select(
    [kind_N1 == 0, kind_N1 == 1, kind_N1 == 2], [fall_NK, ramp_NK, fall_NK + second_NK], 0.0
)
loss_NK = (4 + loss_NK + rng.normal(0, 0.05, loss_NK.shape)).astype(np.float32)
fits = fit_sigmoids(x_K, loss_NK[:1000], device=device)  # compiles, and loads the kernels
if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
started = time.perf_counter()
fits = fit_sigmoids(x_K, loss_NK, device=device)
seconds = time.perf_counter() - started
peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
np.savez(sys.argv[3], **{name: value for name, value in vars(fits).items() if name.endswith("_N")})
print(json.dumps({"tokens per second": n_tokens / seconds, "peak MiB": peak / 2**20}))
"""


def fit(site: Site) -> Iterator[Check]:
    """Check that a GPU fits as a CPU does, also if the environment turns TF32 on."""
    n_tokens = 400 if site.on_cpu else 200_000
    site.folder.mkdir(parents=True, exist_ok=True)
    script = site.folder / "fit.py"
    script.write_text(_FIT)
    kinds = {"cpu": ("cpu", ""), "gpu": (site.device, ""), "tf32": (site.device, "1")}
    figures = {}
    for name, (device, override) in kinds.items():
        out = site.folder / f"fit-{name}.npz"
        environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override} if override else {}
        if device == "cpu":
            environment["OMP_NUM_THREADS"] = str(min(8, os.cpu_count() or 1))
        words = [str(script), str(n_tokens), device, str(out)]
        job = site.run_script(f"fit-{name}", words, **environment)
        if job.code:
            yield Check(f"the fit ends on the {name}", FAILED, job.last_line)
            return
        figures[name] = json.loads(job.last_line)
    of = {name: dict(np.load(site.folder / f"fit-{name}.npz")) for name in kinds}
    for name, promise in (
        ("gpu", "a GPU gives the classes that a CPU gives"),
        ("tf32", "a GPU gives these classes with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"),
    ):
        n_other = int((of[name]["class_N"] != of["cpu"]["class_N"]).sum())
        # Sums in another order may decide a token that lies on a criterion's edge.
        yield check(
            promise, holds=n_other <= 1e-4 * n_tokens, detail=f"{n_other} of {n_tokens:,} differ"
        )
    for name, figure in figures.items():
        detail = ", ".join(f"{value:,.0f} {what}" for what, value in figure.items())
        yield Check(f"fit on {name}", MEASURED, detail)

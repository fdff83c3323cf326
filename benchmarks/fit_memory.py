"""Peak memory of `megatron-tokscale fit` on a run on disk, with its speed and file sizes.

    python benchmarks/fit_memory.py [--tokens 2000000 --probes 100] [--limit-gb 1.5] [--out FILE]

The run is made by one child process and fitted by another: the peak is the fit's alone, torch
included, by resource.getrusage for children. N tokens, K probes.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from table import heading, markdown

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Identity, LossRecord, RunPaths
from megatron_tokscale.store.losses import write_losses

SEQ_LENGTH = 1000
LAST_STEP = 20_000


def record(step: int, probe_set: ProbeSet) -> LossRecord:
    """Return the record of a probe in a job of one sample per step."""
    return LossRecord(
        step=step,
        consumed_samples=step,
        consumed_tokens=step * probe_set.seq_length,
        learning_rate=1e-3,
        lr_sum=step * 1e-3,
        training_loss=float("nan"),
        wall_time=0.0,
        duration=0.0,
        probe_fingerprint=probe_set.fingerprint,
        versions="benchmark",
    )


def make_run(path: Path, n_tokens: int, n_probes: int, seed: int) -> None:
    """Write planted sigmoids with white noise, probe by probe."""
    rng = np.random.default_rng(seed)
    paths, probe_set = RunPaths(path), make_probe_set(n_tokens)
    probe_set.save(paths.probe_set)
    Identity("benchmark", probe_set.fingerprint).save(paths.identity)
    floor, drop = rng.uniform(0, 3, n_tokens), rng.uniform(0.5, 8, n_tokens)
    midpoint, width = rng.uniform(2.5, 8, n_tokens), np.exp(rng.uniform(-3, 0, n_tokens))
    noise = rng.uniform(0.05, 0.4, n_tokens)
    for step in probe_steps(n_probes):
        learned_N: float | Floats = 0.0
        if step:
            learned_N = np.exp((midpoint - np.log(step)) / width)
            learned_N = 1 / (1 + learned_N)
        loss_N = floor + drop * (1 - learned_N) + noise * rng.standard_normal(n_tokens)
        write_losses(paths.losses_at(step), loss_N.astype(np.float32), record(step, probe_set))


def make_probe_set(n_tokens: int) -> ProbeSet:
    """Return a probe set with one document per sequence; the last may be watched in part."""
    shape = (-(-n_tokens // SEQ_LENGTH), SEQ_LENGTH)
    index_BS = np.arange(shape[0] * SEQ_LENGTH, dtype=np.int32).reshape(shape)
    return ProbeSet(
        tokens_BS=index_BS % 50_000,
        labels_BS=(index_BS + 1) % 50_000,
        mask_BS=index_BS < n_tokens,
        document_BS=index_BS // SEQ_LENGTH,
        position_BS=index_BS % SEQ_LENGTH,
        dataset_BS=np.zeros(shape, np.int16),
        datasets=("planted",),
        vocab_size=50_000,
    )


def probe_steps(n_probes: int) -> list[int]:
    """Return step 0 and n_probes - 1 others, about evenly spaced in ln step."""
    dense = np.unique(np.round(np.geomspace(1, LAST_STEP, 2 * n_probes)))
    chosen = np.linspace(0, len(dense) - 1, n_probes - 1).round().astype(int)
    return [0, *dense[chosen].astype(int).tolist()]


def children_gigabytes() -> float:
    """Return the peak resident memory of the largest child so far, in GB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


def measure(path: Path, arguments: argparse.Namespace) -> tuple[float, list[str]]:
    """Return the fit's peak in GB, and its row of the table."""
    command = [sys.executable, "-m", "megatron_tokscale.cli", "fit", str(path)]
    if arguments.device:
        command += ["--device", arguments.device]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = children_gigabytes()
    paths = RunPaths(path)
    summary = json.loads(paths.fit.read_text())
    sizes = [
        sum(file.stat().st_size for file in files) / 1e9
        for files in (paths.losses.iterdir(), [paths.fits])
    ]
    return peak, [
        f"{summary['n_tokens']:,}",
        f"{summary['n_probes']:,}",
        f"{peak:.2f}",
        f"{summary['tokens_per_second']:,.0f}",
        *(f"{size:.2f}" for size in sizes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--probes", type=int, default=100)
    parser.add_argument("--device", help="as `megatron-tokscale fit` takes it")
    parser.add_argument("--limit-gb", type=float, help="exit 1 if the peak is above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where there is room for the run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "run"
        size = (arguments.tokens, arguments.probes, arguments.seed)
        maker = multiprocessing.get_context("spawn").Process(target=make_run, args=(path, *size))
        maker.start()
        maker.join()
        made_with = children_gigabytes()
        peak, row = measure(path, arguments)
    columns = ["tokens", "probes", "peak GB", "tokens/s", "losses GB", "fits.parquet GB"]
    text = f"{heading(numpy=np.__version__)}, seed {arguments.seed}\n\n{markdown(columns, [row])}"
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if peak <= made_with:
        raise SystemExit("the run took more memory to make than to fit: the peak is not the fit's")
    if arguments.limit_gb is not None and peak > arguments.limit_gb:
        raise SystemExit(f"{peak:.2f} GB is above the limit of {arguments.limit_gb} GB")


if __name__ == "__main__":
    main()

"""A plan's index and its samples against Megatron's blend of the same datasets.

    OMP_NUM_THREADS=1 python benchmarks/plan_index.py [--samples N] [--out FILE]

Build: build_index over many stages against one call of Megatron's compiled
build_blending_indices, which has no stages. Read: PlannedDataset[k] against the two look-ups of
Megatron's BlendedDataset over constituents that keep a shuffled order, as GPTDataset does, and
read nothing. N samples, Z strata (here one per dataset).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
from megatron.core.datasets.helpers_cpp import build_blending_indices
from numpy.typing import NDArray
from table import heading, markdown

from megatron_tokscale.data import DatasetIdentity, Plan, Stage, Stratum, build_index
from megatron_tokscale.data.dataset import PlannedDataset


class Numbers:
    """A dataset whose samples are their numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"number": number}


class ShuffledNumbers(Numbers):
    """The same through a stored shuffle, as in GPTDataset.__getitem__."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self.shuffle = np.random.default_rng(seed).permutation(size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"number": self.shuffle[number]}


class Blended:
    """The look-ups of BlendedDataset.__getitem__ (megatron/core/datasets/blended_dataset.py)."""

    def __init__(
        self,
        datasets: list[ShuffledNumbers],
        dataset_N: NDArray[np.int16],
        sample_N: NDArray[np.int64],
    ) -> None:
        self.datasets, self.dataset_N, self.sample_N = datasets, dataset_N, sample_N

    def __getitem__(self, k: int) -> dict[str, Any]:
        dataset_id = self.dataset_N[k]
        return {"dataset_id": dataset_id, **self.datasets[dataset_id][self.sample_N[k]]}


def make_plan(n_samples: int, n_stages: int, n_datasets: int, seed: int) -> Plan:
    """Weights that drift over evenly spaced stages."""
    rng = np.random.default_rng(seed)
    start, end = rng.dirichlet(np.ones(n_datasets), 2) + 1e-3
    shares = np.linspace(0, 1, n_stages)[:, None]
    weights = start * (1 - shares) + end * shares
    return Plan(
        datasets=tuple(DatasetIdentity(f"d{i}", 1, 1) for i in range(n_datasets)),
        strata=tuple(Stratum(f"d{i}", i) for i in range(n_datasets)),
        stages=tuple(
            Stage(i * n_samples // n_stages, tuple(row.tolist())) for i, row in enumerate(weights)
        ),
        seq_length=8,
        seed=seed,
    )


def best_time(work: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(plan: Plan, n_samples: int, n_reads: int, repeats: int) -> list[list[str]]:
    """Rows of the table: building and reading."""
    dataset_N, sample_N = np.zeros(n_samples, np.int16), np.zeros(n_samples, np.int64)
    weights_Z = np.array(plan.segments[0].weights)

    def megatron_blend() -> None:
        build_blending_indices(dataset_N, sample_N, weights_Z, len(weights_Z), n_samples, False)

    index = build_index(plan, n_samples, build_blending_indices)
    build = best_time(lambda: build_index(plan, n_samples, build_blending_indices), repeats)
    peer_build = best_time(megatron_blend, repeats)

    count_Z = np.bincount(index.stratum_N, minlength=plan.n_strata)
    planned = PlannedDataset(plan, [Numbers(max(int(n), 1)) for n in count_Z], index)
    peer_count_Z = np.bincount(dataset_N, minlength=plan.n_strata)
    peers = [ShuffledNumbers(max(int(n), 1), z) for z, n in enumerate(peer_count_Z)]
    blended = Blended(peers, dataset_N, sample_N)
    order = np.random.default_rng(plan.seed).integers(0, n_samples, n_reads).tolist()
    read = best_time(lambda: [planned[k] for k in order], repeats)
    peer_read = best_time(lambda: [blended[k] for k in order], repeats)
    return [
        ["build the index, ns per sample", *_row(build / n_samples, peer_build / n_samples)],
        ["read a sample's number, ns", *_row(read / n_reads, peer_read / n_reads)],
    ]


def _row(ours: float, peer: float) -> list[str]:
    return [f"{ours * 1e9:,.0f}", f"{peer * 1e9:,.0f}", f"{ours / peer:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--stages", type=int, default=24)
    parser.add_argument("--datasets", type=int, default=64)
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    plan = make_plan(arguments.samples, arguments.stages, arguments.datasets, arguments.seed)
    rows = compare(plan, arguments.samples, arguments.reads, arguments.repeats)
    about = heading(numpy=np.__version__, **{"megatron-core": megatron.core.__version__})
    text = (
        f"{about}, 1 thread, seed {arguments.seed}: {arguments.samples:,} samples, "
        f"{arguments.stages} stages, {arguments.datasets} datasets, "
        f"best of {arguments.repeats}\n\n"
    )
    text += markdown(["", "ours", "Megatron", "ours / Megatron"], rows)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

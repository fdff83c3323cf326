"""A plan's index, strata and samples against Megatron's blend of the same datasets.

    OMP_NUM_THREADS=1 python benchmarks/plan_dataset.py [--samples N] [--out FILE]

Index: `build_index` over 24 stages of D datasets x S strata against one call of Megatron's compiled
`build_blending_indices`, which has no stages; once for the D datasets, and once for as many things
to blend as there are strata. With the datasets' weights kept (only those of strata change), and
with both changing. Its peak memory is that of a process that does nothing else. Strata of samples:
ranking all samples by their scores, from documents; no peer. Strata of documents: dividing all
documents by their scores, and Megatron's own index of each stratum beside its index of each whole
dataset, which strata of samples need; one dataset is measured, and counts for all. Reading:
`PlannedDataset[k]` against Megatron's own BlendedDataset, both over GPTDatasets that read tokens
from disk, the same number of samples in an order of their own, as in training. The table of builds
is in seconds of the processor, so that other work on the machine counts little. Shapes: N samples,
D datasets, Z strata, Q documents.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers_cpp import build_blending_indices
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from table import heading, markdown

from megatron_tokscale.data import Cut, DatasetIdentity, Plan, Stage, Stratum, build_index
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.document_strata import documents_of_strata, index_folder
from megatron_tokscale.data.samples import SampleIndex, SampleScores
from megatron_tokscale.data.scores import DocumentScores
from megatron_tokscale.data.strata import Strata, rank_samples

Rows = list[list[str]]
SEQ_LENGTH = 4096  # of the plan; --seq-length is that of the samples that are read


def make_plan(
    n_datasets: int, n_strata: int, n_samples: int, *, keep: bool, n_stages: int = 24, seed: int = 0
) -> Plan:
    """Return a plan whose weights drift over even stages; datasets' weights too unless `keep`."""
    rng = np.random.default_rng(seed)
    start_D, end_D = rng.dirichlet(np.ones(n_datasets), 2) + 1e-4
    start_Z, end_Z = rng.dirichlet(np.ones(n_strata), (2, n_datasets)).reshape(2, -1) + 1e-4
    stages = []
    for i, share in enumerate(np.linspace(0, 1, n_stages)):
        weight_D = start_D if keep else start_D * (1 - share) + end_D * share
        within_Z = start_Z * (1 - share) + end_Z * share
        stages.append(
            Stage(i * n_samples // n_stages, tuple(weight_D.tolist()), tuple(within_Z.tolist()))
        )
    return Plan(
        datasets=tuple(DatasetIdentity(f"d{d}", 1, 1) for d in range(n_datasets)),
        strata=tuple(
            Stratum(f"d{d}/{i}", d, 1 / n_strata)
            for d in range(n_datasets)
            for i in range(n_strata)
        ),
        stages=tuple(stages),
        seq_length=SEQ_LENGTH,
        seed=seed,
        cuts=(Cut("scores"),) * n_datasets,
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def build(arguments: argparse.Namespace) -> Rows:
    """Time the index and the strata; return their rows."""
    n, d, s = arguments.samples, arguments.datasets, arguments.strata
    build_index(make_plan(2, 2, 100, keep=False), 100)  # compiles
    peers = {}
    for count in (d, d * s):
        dataset_N, sample_N = np.zeros(n, np.int16), np.zeros(n, np.int64)
        weights = np.random.default_rng(0).dirichlet(np.ones(count))
        peers[count] = processor_seconds(
            lambda count=count, arrays=(dataset_N, sample_N, weights): build_blending_indices(
                *arrays, count, n, False
            )
        )
        del dataset_N, sample_N
    rows = [[f"Megatron's blend of {count}", f"{t:.1f}", "", ""] for count, t in peers.items()]
    for keep in (True, False):
        plan = make_plan(d, s, n, keep=keep)
        ours = processor_seconds(lambda plan=plan: build_index(plan, n))
        what = "index, datasets' weights kept" if keep else "index, all weights changing"
        rows.append([what, f"{ours:.1f}", *(f"{ours / t:.2f}" for t in peers.values())])
    rows.append(["strata of samples: score and rank all", f"{rank(d, s, n):.1f}", "", ""])
    return rows + divide(d, s, n)


def scored_documents(n_samples: int, documents_per_sample: float = 4) -> DocumentScores:
    """Return scores drawn at random of the documents of a dataset of `n_samples` samples."""
    rng = np.random.default_rng(0)
    n_documents = int(n_samples * documents_per_sample)
    names = ("learning_time", "spread", "drop", "unlearned", "surprisal", "fall")
    values = {f"{name}_Q": rng.random(n_documents).astype(np.float32) for name in names}
    return DocumentScores(
        **values,
        watched_Q=np.zeros(n_documents, np.int32),
        dataset=DatasetIdentity("d", n_documents, n_samples * SEQ_LENGTH),
        digest="",
    )


def lengths(n_samples: int, documents_per_sample: float = 4) -> NDArray[np.int32]:
    """Return lengths drawn at random of the documents of a dataset of `n_samples` samples."""
    longest = 2 * SEQ_LENGTH / documents_per_sample
    n_documents = int(n_samples * documents_per_sample)
    return np.random.default_rng(1).integers(1, longest, n_documents).astype(np.int32)


def rank(n_datasets: int, n_strata: int, n_samples: int) -> float:
    """Return the seconds to rank the samples of `n_datasets` datasets, `n_samples` in all."""
    rng, seq_length = np.random.default_rng(0), SEQ_LENGTH
    length_Q = lengths(n_samples // n_datasets)
    scores = scored_documents(n_samples // n_datasets)
    order = rng.permutation(len(length_Q)).astype(np.int32)
    start_P = np.cumsum(length_Q[order], dtype=np.int64) - length_Q[order]
    cut_N1 = np.arange(0, int(length_Q.sum()) - 1, seq_length)
    position_N1 = np.searchsorted(start_P, cut_N1, side="right") - 1
    bound_N12 = np.stack([position_N1, cut_N1 - start_P[position_N1]], axis=1)
    shuffle_N = rng.permutation(len(cut_N1) - 1)
    plan = make_plan(1, n_strata, n_samples, keep=True)

    def work() -> None:
        index = SampleIndex(length_Q, order, bound_N12, shuffle_N)
        rank_samples(
            plan, 0, len(index), SampleScores.from_document_scores(scores, index, plan.cuts[0])
        )

    return n_datasets * min(processor_seconds(work) for _ in range(2))


def divide(n_datasets: int, n_strata: int, n_samples: int) -> Rows:
    """Time strata of documents of one dataset; return their rows, for `n_datasets` of them."""
    length_Q = lengths(n_samples // n_datasets)
    scores = scored_documents(n_samples // n_datasets)
    edges = tuple(np.linspace(0, 1, n_strata + 1)[1:-1].tolist())
    cut = Cut("scores", "fall", unit="documents", edges=edges, held_out=256)
    part = (0, len(length_Q))
    plan = replace(
        make_plan(1, n_strata, n_samples, keep=True),
        datasets=(scores.dataset,),
        cuts=(cut,),
        documents=(part,),
    )
    strata: list[NDArray[np.int32]] = []

    def work() -> None:
        strata[:] = documents_of_strata(plan, 0, scores, part, length_Q)
        for documents in strata:
            index_folder(documents)

    what = f"strata of documents: divide all {n_datasets * len(length_Q):,} documents"
    times = {what: processor_seconds(work)}
    low = SimpleNamespace(sequence_lengths=length_Q)
    for what, sets in (
        (f"{n_datasets} datasets", [np.arange(len(length_Q), dtype=np.int32)]),
        (f"{n_datasets * n_strata} strata of documents", strata),
    ):
        with tempfile.TemporaryDirectory() as folder:
            for verb in ("builds", "opens"):
                times[f"Megatron {verb} the indices of {what}"] = processor_seconds(
                    lambda folder=folder, sets=sets: [
                        GPTDataset(
                            low,
                            "d",
                            each,
                            None,
                            Split.train,
                            gpt_config(["d"], f"{folder}/{number}", SEQ_LENGTH),
                        )
                        for number, each in enumerate(sets)
                    ]
                )
    return [[what, f"{n_datasets * each:.1f}", "", ""] for what, each in times.items()]


def gpt_config(paths: list[str], cache: str, seq_length: int) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        blend=(paths, None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=1000, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def peak_memory_gb(arguments: argparse.Namespace) -> float:
    """Return the peak of a process that builds the index with all weights changing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_build_alone, (arguments.datasets, arguments.strata, arguments.samples))


def _build_alone(n_datasets: int, n_strata: int, n_samples: int) -> float:
    build_index(make_plan(n_datasets, n_strata, n_samples, keep=False), n_samples)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read(arguments: argparse.Namespace, folder: Path) -> Rows:
    """Time samples of a real blend in pairs of passes; the ratio is the median over the pairs."""
    n_datasets, n = 8, arguments.reads
    rng = np.random.default_rng(0)
    paths = []
    for d in range(n_datasets):
        path = folder / f"d{d}"
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
        for _ in range(300):
            length = int(rng.integers(10, 20_000))
            builder.add_document(torch.from_numpy(rng.integers(0, 1000, length)), [length])
        builder.finalize(f"{path}.idx")
        paths.append(str(path))
    config = gpt_config(paths, str(folder / "cache"), arguments.seq_length)
    files = [IndexedDataset(path) for path in paths]
    documents = np.arange(300, dtype=np.int32)

    def datasets(n_samples: int | None) -> list[GPTDataset]:
        return [
            GPTDataset(file, path, documents, n_samples, Split.train, config)
            for file, path in zip(files, paths, strict=True)
        ]

    weights = [1 / n_datasets] * n_datasets
    blended = BlendedDataset(datasets(n), weights, n, config)
    plan = make_plan(n_datasets, arguments.strata, n, keep=False)
    parts = datasets(None)
    ranked = [np.random.default_rng(d).permutation(len(part)) for d, part in enumerate(parts)]
    strata = Strata(plan, [len(part) for part in parts], [row.astype(np.int32) for row in ranked])
    planned = PlannedDataset(plan, parts, build_index(plan, n), strata)
    order = rng.permutation(n).tolist()
    times: list[list[float]] = []
    for _ in range(arguments.repeats):
        pair = [[], []]
        for k in range(0, n, 64):  # in turns, as the machine's speed drifts
            for side, dataset in enumerate((planned, blended)):
                pair[side].append(seconds(lambda d=dataset, k=k: [d[i] for i in order[k : k + 64]]))
        times.append([sum(pair[0]), sum(pair[1])])
    ours, peer = np.median(np.array(times), axis=0) / n * 1e6
    ratio = np.median([a / b for a, b in times])
    return [
        [
            f"a sample of {arguments.seq_length} tokens, us",
            f"{ours:.1f}",
            f"{peer:.1f}",
            f"{ratio:.3f}",
        ]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=73_000_000)
    parser.add_argument("--datasets", type=int, default=64)
    parser.add_argument("--strata", type=int, default=16, help="of each dataset")
    parser.add_argument("--reads", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = heading(numpy=np.__version__, **{"megatron-core": version("megatron-core")})
    names = [arguments.datasets, arguments.datasets * arguments.strata]
    built = markdown(
        ["", "processor seconds", *(f"over Megatron's blend of {count}" for count in names)],
        build(arguments),
    )
    memory = peak_memory_gb(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples = markdown(
            ["read", "planned", "Megatron's BlendedDataset", "ratio"],
            read(arguments, Path(folder)),
        )
    text = (
        f"{about}, 1 thread, seed 0: {arguments.samples:,} samples, {arguments.datasets} datasets "
        f"x {arguments.strata} strata, 24 stages\n\n{built}\n\n"
        "Scores, documents and Megatron's indices: one dataset is measured, its time multiplied.\n"
        f"Reading: {arguments.repeats} pairs of passes over {arguments.reads:,} samples.\n\n"
        f"Peak memory of a process that builds the index: {memory:.2f} GB\n\n{samples}\n"
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()

"""Plans for the tests' jobs, and the stream that they must give, put together without a job.

Shapes: Q documents of a dataset, N samples.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from gpt_datasets import sample_index
from jobs import SEQ_LENGTH, TRAINING, Corpus
from recorded_job import Sample

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.source import split_range
from megatron_tokscale.data import (
    Cut,
    DocumentScores,
    Plan,
    Stage,
    Stratum,
    build_index,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.document_strata import held_out_documents
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.scores import data_digest, identity_of
from megatron_tokscale.data.strata import Strata, rank_samples

BATCH = int(TRAINING["--global-batch-size"])
JOB_SEED = 1234


def make_scores(prefix: str, seed: int) -> DocumentScores:
    """Scores drawn at random; some documents have nothing to learn."""
    tokens = IndexedTokens.open(prefix)
    rng = np.random.default_rng(seed)
    n = tokens.n_sequences
    drop_Q = np.where(rng.random(n) < 0.1, 0, rng.random(n)).astype(np.float32)
    time_Q, spread_Q, unlearned_Q, surprisal_Q = rng.random((4, n)).astype(np.float32)
    return DocumentScores(
        learning_time_Q=np.where(drop_Q > 0, 10 + time_Q, np.nan).astype(np.float32),
        spread_Q=np.where(drop_Q > 0, spread_Q, np.nan).astype(np.float32),
        drop_Q=drop_Q,
        unlearned_Q=unlearned_Q,
        surprisal_Q=surprisal_Q,
        watched_Q=np.ones(n, np.int32),
        dataset=identity_of(tokens),
        digest=data_digest(tokens),
    )


def plan_of(
    prefixes: tuple[str, ...],
    weights: dict[int, tuple[float, ...]],
    **changes,
) -> Plan:
    """Datasets as strata."""
    files = [IndexedTokens.open(prefix) for prefix in prefixes]
    fields = {
        "datasets": tuple(identity_of(file) for file in files),
        "strata": tuple(Stratum(file.name, number) for number, file in enumerate(files)),
        "stages": tuple(Stage(start, weights) for start, weights in weights.items()),
        "seq_length": SEQ_LENGTH,
        "seed": 5,
    }
    return Plan(**fields | changes)


def stratified_plan(corpus: Corpus, scores: list[DocumentScores], **changes) -> Plan:
    """Three strata of each dataset, one so small that it is repeated; stages amid a batch."""
    shares = {"left": (0.6, 0.38, 0.02), "right": (0.5, 0.4, 0.1)}
    fields = {
        "strata": tuple(
            Stratum(f"{name}/{i}", d, share)
            for d, (name, row) in enumerate(shares.items())
            for i, share in enumerate(row)
        ),
        "stages": (
            Stage(0, (0.5, 0.5), (0.4, 0.2, 0.4, 0.1, 0.8, 0.1)),
            Stage(37, (0.7, 0.3), (0.2, 0.2, 0.6, 0.3, 0.3, 0.4)),
            Stage(76, (0.3, 0.7)),
        ),
        "cuts": (
            Cut(scores[0].fingerprint),
            Cut(scores[1].fingerprint, unlearned=True),
        ),
    }
    return plan_of(corpus.prefixes, {0: (1, 1)}, **fields | changes)


def with_falls(scores: DocumentScores, seed: int) -> DocumentScores:
    """The scores, and falls drawn at random."""
    falls = np.random.default_rng(seed).normal(size=scores.n_documents)
    return replace(scores, fall_Q=falls.astype(np.float32))


def document_plan(corpus: Corpus, scores: list[DocumentScores], **changes) -> Plan:
    """Three strata of documents of left, and strata of samples of right; stages amid a batch."""
    parts = [split_range(TRAINING["--split"], "train", each.n_documents) for each in scores]
    cut = Cut(scores[0].fingerprint, "fall", unit="documents", edges=(-0.5, 1.0), held_out=5)
    fields = {
        "cuts": (cut, Cut(scores[1].fingerprint, unlearned=True)),
        "documents": tuple((part.start, part.stop) for part in parts),
    }
    return stratified_plan(corpus, scores, **fields | changes)


def _documents(plan: Plan, z: int, scores: DocumentScores) -> list[int]:
    """The documents of a stratum, found one by one."""
    stratum = plan.strata[z]
    cut, part = plan.cuts[stratum.dataset], plan.documents[stratum.dataset]
    lengths = IndexedTokens.open(plan.datasets[stratum.dataset].path).lengths
    place = z - plan.strata_of(stratum.dataset).start
    held = held_out_documents(plan, stratum.dataset, scores, part, lengths)[place].tolist()
    return [
        document
        for document in range(*part)
        if sum(float(scores.fall_Q[document]) >= edge for edge in cut.edges) == place
        and document not in held
    ]


def train_dataset(
    prefix: str,
    cache: Path,
    split: str | None = TRAINING["--split"],
    chosen: list[int] | None = None,
):
    """The training part of a dataset as one epoch, as Megatron lays it out in the tests' jobs.

    Of `chosen` documents, if given.
    """
    from gpt_datasets import gpt_config
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    config = gpt_config(cache, SEQ_LENGTH, seed=JOB_SEED)
    low = GPTDataset.build_low_level_dataset(prefix, config)
    documents = range(len(low)) if split is None else split_range(split, "train", len(low))
    indices = np.array(documents if chosen is None else chosen, dtype=np.int32)
    return GPTDataset(low, prefix, indices, None, Split.train, config)


def dataset_of(
    plan: Plan,
    prefixes: tuple[str, ...],
    n_samples: int,
    cache: Path,
    scores: list[DocumentScores] | None = None,
    split: str | None = TRAINING["--split"],
) -> PlannedDataset:
    """The dataset that follows a plan, put together by hand."""
    datasets, ranked = [], []
    for packing in plan.packings:
        d, z = packing.dataset, packing.strata.start
        if packing.is_stratum:
            chosen = _documents(plan, z, scores[d])
            datasets.append(train_dataset(prefixes[d], cache / str(z), split, chosen))
        else:
            datasets.append(train_dataset(prefixes[d], cache, split))
        if packing.is_stratum or plan.cuts[d] is None or scores is None:
            ranked.append(None)
        else:
            of = SampleScores.from_document_scores(scores[d], sample_index(datasets[-1]))
            ranked.append(rank_samples(plan, d, len(datasets[-1]), of))
    strata = Strata(plan, [len(dataset) for dataset in datasets], ranked)
    return PlannedDataset(plan, datasets, build_index(plan, n_samples), strata)


def tokens_of(dataset, k: int) -> Sample:
    sample = dataset[k]
    return (*sample["tokens"].tolist(), int(sample["labels"][-1]))


def stream_of(dataset, first: int = 0, stop: int | None = None) -> dict[int, Sample]:
    """Samples `first` to `stop` of a dataset."""
    stop = len(dataset) if stop is None else stop
    return {k: tokens_of(dataset, k) for k in range(first, stop)}

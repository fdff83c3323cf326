"""A plan of all kinds of strata over Megatron's own datasets; a token tells where it is from.

The documents of `web` are divided by planted falls, `code` is whole, samples of `books` are cut.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from gpt_datasets import gpt_config, gpt_dataset, pieces_of, read_tokens, write_unique_tokens

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Cut, DocumentScores, Plan, Stage, Stratum
from megatron_tokscale.data.prepare import PlanPart, prepare
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.scores import data_digest, identity_of
from megatron_tokscale.training.data.megatron_datasets import sample_index
from megatron_tokscale.training.data.packings import open_packings, packed_documents

SEQ_LENGTH = 8
LONG = 17  # the document of web that is longer than many sequences
HELD_OUT = 3
EDGES = (0.0, 1.0)


def _lengths(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 12, n).tolist()


LENGTHS = {"web": _lengths(0, 60), "code": _lengths(1, 20), "books": _lengths(2, 25)}
LENGTHS["web"][LONG] = 100
FIRST = {"web": 0, "code": 2000, "books": 3000}
PARTS = {"web": (4, 55), "code": (0, 20), "books": (2, 22)}
FALLS = np.random.default_rng(3).choice([-0.5, 0.0, 0.5, 1.0, 2.0], 60).astype(np.float32)

STAGES = (
    Stage(0, (3, 1, 1), (0.2, 0.5, 0.3, 1, 0.5, 0.5)),
    Stage(70, (1, 1, 1), (0.1, 0.1, 0.8, 1, 0.9, 0.1)),
    Stage(111, (2, 0, 1), (1, 2, 0, 1, 1, 1)),
)


def write_data(folder: Path) -> dict[str, str]:
    """Write the datasets; return their prefixes."""
    return {
        name: write_unique_tokens(folder / name, row, FIRST[name]) for name, row in LENGTHS.items()
    }


def scores_of(prefix: str, falls) -> DocumentScores:
    """Scores of the documents of a dataset: the falls given, and increasing surprisal."""
    tokens = IndexedTokens.open(prefix)
    n = tokens.n_sequences
    return DocumentScores(
        surprisal_Q=np.linspace(1, 2, n, dtype=np.float32),
        watched_Q=np.zeros(n, np.int32),
        dataset=identity_of(tokens),
        digest=data_digest(tokens),
        fall_Q=np.asarray(falls, np.float32),
    )


def all_scores(prefixes: dict[str, str]) -> list[DocumentScores]:
    falls = {name: np.zeros(len(row)) for name, row in LENGTHS.items()} | {"web": FALLS}
    return [scores_of(prefix, falls[name]) for name, prefix in prefixes.items()]


def plan_of(prefixes: dict[str, str], **changes) -> Plan:
    scores = all_scores(prefixes)
    cut = Cut(scores[0].fingerprint, "fall", unit="documents", edges=EDGES, held_out=HELD_OUT)
    plan = Plan(
        datasets=tuple(each.dataset for each in scores),
        strata=(
            *(Stratum(f"web/{i}", 0, share) for i, share in enumerate((0.2, 0.4, 0.4))),
            Stratum("code", 1),
            *(Stratum(f"books/{i}", 2, share) for i, share in enumerate((0.75, 0.25))),
        ),
        stages=STAGES,
        seq_length=SEQ_LENGTH,
        seed=5,
        cuts=(cut, None, Cut(scores[2].fingerprint, "frequency")),
        documents=tuple(PARTS.values()),
    )
    return replace(plan, **changes)


def job_datasets(prefixes: dict[str, str], cache: Path | None, **config):
    """The training datasets of a job."""
    settings = gpt_config(cache, SEQ_LENGTH)
    for name, value in config.items():
        setattr(settings, name, value)
    return [
        gpt_dataset(prefix, settings, documents=range(*PARTS[name]))
        for name, prefix in prefixes.items()
    ]


def packings_of(plan, prefixes, cache, scores=None, *, build=True, jobs=None, **config):
    """The datasets of the plan's packings, as a job opens them."""
    scores = scores or all_scores(prefixes)
    jobs = jobs or job_datasets(prefixes, cache, **config)
    documents = packed_documents(plan, jobs, scores.__getitem__, cache, build=build)
    return open_packings(plan, jobs, documents, cache, None, build=build)


def follow(plan, prefixes, cache, n_samples=150, scores=None, *, build=True, jobs=None, **options):
    """The dataset that follows a plan."""
    scores = scores or all_scores(prefixes)
    packed = packings_of(plan, prefixes, cache, scores, build=build, jobs=jobs)

    def part(packing, dataset):
        def sample_scores():
            cut = plan.cuts[packing.dataset]
            return SampleScores.from_document_scores(
                scores[packing.dataset], sample_index(dataset), cut
            )

        return PlanPart(dataset, dataset.unique_description_hash, sample_scores)

    parts = [
        None if dataset is None else part(packing, dataset)
        for packing, dataset in zip(plan.packings, packed, strict=True)
    ]
    return prepare(plan, parts, n_samples, cache, build=build, **options)


def dataset_of(tokens: list[int]) -> str:
    """The dataset that a sample's tokens are of."""
    return max(FIRST, key=lambda name: (FIRST[name] <= tokens[0]) * FIRST[name])


def documents_in(sample) -> tuple[str, list[int]]:
    """The dataset and the documents that a sample reads, told by its tokens."""
    tokens = read_tokens(sample)
    name = dataset_of(tokens)
    pieces = pieces_of(tokens, LENGTHS[name], FIRST[name])
    return name, [piece.document for piece in pieces]


def stratum_of(document: int) -> int:
    """The stratum of a document of web, by its planted fall."""
    return sum(float(FALLS[document]) >= edge for edge in EDGES)

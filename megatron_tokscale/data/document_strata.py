"""The documents of each stratum of a dataset whose documents, not samples, a plan divides.

They follow from the plan and the scores alone, so that a probe set of the documents that the
training leaves out is built without the job.

In a job one rank writes the documents into a file, and the others map it. Megatron's index of a
stratum lies in a folder whose name has the digest of the documents: the key under which Megatron
keeps an index does not hold them, so two strata of a dataset would share one.

Shapes: Q documents of a dataset (the sequences of its .idx file, all splits), D datasets of the
plan, J packings of the plan, Z strata of a dataset.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Integers, Integers32
from megatron_tokscale.data.array_files import is_right, map_array, write_array
from megatron_tokscale.data.permutation import epoch_permutation, stratum_key
from megatron_tokscale.data.plan import ORDER_VERSION, Plan
from megatron_tokscale.data.plan_parts import Cut
from megatron_tokscale.data.scores import DocumentScores

type Documents = Integers32 | slice | None
"""Documents of a packing: those of a stratum, a whole training part, or none, not drawn from."""


class _Members(NamedTuple):
    """The documents of a stratum, ascending: those of the training, and those left out of it."""

    trained: Integers32
    held_out: Integers32


def documents_of_strata(
    plan: Plan,
    dataset: int,
    scores: DocumentScores,
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
) -> list[Integers32]:
    """Return the documents that each stratum of a dataset trains on, ascending.

    Args:
        plan: the plan, which divides the dataset's documents.
        dataset: number of the dataset in the plan.
        scores: scores of the dataset's documents.
        documents: first document of the training part, and the one after its last.
        lengths_Q: tokens per document. Empty documents are in no stratum.

    Raises:
        TokscaleError: the scores lack the one that divides the documents.
    """
    return [found.trained for found in _members(plan, dataset, scores, documents, lengths_Q)]


def held_out_documents(
    plan: Plan,
    dataset: int,
    scores: DocumentScores,
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
) -> list[Integers32]:
    """Return the documents of each stratum that the training leaves out, ascending.

    They are drawn at random by the plan's seed and the stratum's name. Arguments and errors are
    those of `documents_of_strata`.
    """
    return [found.held_out for found in _members(plan, dataset, scores, documents, lengths_Q)]


def build_documents(
    plan: Plan,
    dataset: int,
    scores: Callable[[], DocumentScores],
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
    cache_dir: Path,
) -> None:
    """Write `documents_of_strata` into `cache_dir`, if it is not there or damaged.

    Args:
        plan: the plan.
        dataset: number of the dataset in the plan.
        scores: returns the scores of the dataset's documents; called only when files are made.
        documents: as in `documents_of_strata`.
        lengths_Q: tokens per document.
        cache_dir: folder of the files.

    Raises:
        OSError: the directory cannot be written.
    """
    files = _files(plan, dataset, documents, cache_dir)
    if not all(map(is_right, files)):
        found = documents_of_strata(plan, dataset, scores(), documents, lengths_Q)
        write_array(files[0], np.concatenate(found))
        write_array(files[1], np.array([len(row) for row in found], dtype=np.int64))


def load_documents(
    plan: Plan, dataset: int, documents: tuple[int, int], cache_dir: Path
) -> list[Integers32]:
    """Map the files that `build_documents` wrote; return the documents of each stratum.

    Raises:
        TokscaleError: a file is missing or damaged.
    """
    files = _files(plan, dataset, documents, cache_dir)
    n_strata = len(plan.strata_of(dataset))
    count_Z = cast(Integers, map_array(files[1], (n_strata,), np.int64))
    every = cast(Integers32, map_array(files[0], (int(count_Z.sum()),), np.int32))
    return np.split(every, np.cumsum(count_Z)[:-1])


def _files(plan: Plan, dataset: int, documents: tuple[int, int], cache_dir: Path) -> list[Path]:
    """Return the files of the documents, stratum by stratum, and of their number in each."""
    names = [plan.strata[z].name for z in plan.strata_of(dataset)]
    content = [ORDER_VERSION, asdict(cut_of(plan, dataset)), plan.seed, names, documents]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return [cache_dir / f"tokscale-{key}-{what}.npy" for what in ("documents", "counts")]


def index_folder(documents: Integers32) -> str:
    """Return the name of the folder of Megatron's index of a stratum of documents."""
    digest = hashlib.sha256(np.ascontiguousarray(documents).data).hexdigest()[:16]
    return f"tokscale-{digest}-index"


def documents_of_packings(
    plan: Plan,
    parts_D: Sequence[tuple[int, int] | None],
    divided: Callable[[int], Sequence[Integers32]],
) -> list[Documents]:
    """Return the documents of each packing of a plan.

    Args:
        plan: the plan.
        parts_D: first document of the training part of each dataset, and the one after its last;
            None for a dataset that is not drawn from.
        divided: returns the documents of each stratum of a dataset, by its number in the plan;
            called for datasets whose documents the plan divides.
    """
    found: list[Documents] = []
    for dataset, (part, cut) in enumerate(zip(parts_D, plan.cuts, strict=True)):
        is_divided = cut is not None and cut.unit == "documents"
        if part is None:
            found += [None] * (len(plan.strata_of(dataset)) if is_divided else 1)
        elif is_divided:
            found += divided(dataset)
        else:
            found.append(slice(*part))
    return found


def packing_sizes(
    plan: Plan,
    lengths_D: Sequence[NDArray[np.integer] | None],
    documents_J: Sequence[Documents],
    extra: int = 1,
) -> list[int]:
    """Return the samples of each packing of a plan, from the lengths of the documents alone.

    Args:
        plan: the plan.
        lengths_D: tokens per document of each dataset; None for one that is not drawn from.
        documents_J: documents of each packing.
        extra: tokens that a sample reads beyond its sequence length.
    """
    sizes = []
    for packing, documents in zip(plan.packings, documents_J, strict=True):
        lengths_Q = lengths_D[packing.dataset]
        if lengths_Q is None or documents is None:
            sizes.append(0)
        else:
            n_tokens = int(lengths_Q[documents].sum(dtype=np.int64))
            sizes.append(max(n_tokens - extra, 0) // plan.seq_length)
    return sizes


def cut_of(plan: Plan, dataset: int) -> Cut:
    """Return the cut that divides a dataset's documents."""
    cut = plan.cuts[dataset]
    assert cut is not None and cut.unit == "documents"
    return cut


def _members(
    plan: Plan,
    dataset: int,
    scores: DocumentScores,
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
) -> list[_Members]:
    cut = cut_of(plan, dataset)
    start, stop = documents
    found = start + np.flatnonzero(lengths_Q[start:stop])
    score = scores.ordering_Q(cut.order)[found].astype(np.float64)
    score = np.nan_to_num(score, nan=-np.inf)
    stratum = np.searchsorted(np.array(cut.edges), score, side="right")
    return [
        _split(found[stratum == place].astype(np.int32), cut.held_out, plan, z)
        for place, z in enumerate(plan.strata_of(dataset))
    ]


def _split(documents: Integers32, held_out: int, plan: Plan, z: int) -> _Members:
    """Divide the documents of a stratum into those of the training and those held out."""
    n_held_out = min(held_out, len(documents) // 2)
    is_held_out = np.zeros(len(documents), np.bool_)
    if n_held_out:
        key = stratum_key(plan.seed, f"{plan.strata[z].name}/held-out")
        drawn = epoch_permutation(len(documents), key, 0).many(np.arange(n_held_out))
        is_held_out[drawn] = True
    return _Members(documents[~is_held_out], documents[is_held_out])

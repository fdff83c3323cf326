"""The packings of a plan in a job: a Megatron dataset of one epoch for each.

Shapes: D datasets of the plan, J packings of the plan.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_tokscale.core.arrays import Integers32
from megatron_tokscale.data import DocumentScores, Plan
from megatron_tokscale.data.document_strata import (
    Documents,
    build_documents,
    documents_of_packings,
    index_folder,
    load_documents,
    packing_sizes,
)
from megatron_tokscale.training.data.megatron_datasets import documents_of, one_epoch


def packed_documents(
    plan: Plan,
    datasets: Sequence[GPTDataset | None],
    scores: Callable[[int], DocumentScores],
    cache: Path,
    *,
    build: bool,
) -> list[Documents]:
    """Return the documents of each packing of a plan.

    Args:
        plan: the plan.
        datasets: the job's datasets, in the order of the plan; None for one that is not drawn from.
        scores: returns the scores of a dataset's documents, by its number in the plan; called only
            when files are built.
        cache: folder of the plan's files.
        build: this rank makes missing files.

    Raises:
        TokscaleError: the scores do not fit, or a file is missing.
        OSError: the cache cannot be written.
    """

    def divided(number: int) -> list[Integers32]:
        dataset = datasets[number]
        assert dataset is not None, "only datasets that are drawn from are divided"
        part, lengths = documents_of(dataset), dataset.dataset.sequence_lengths
        if build:
            build_documents(plan, number, lambda: scores(number), part, lengths, cache)
        return load_documents(plan, number, part, cache)

    parts = [None if dataset is None else documents_of(dataset) for dataset in datasets]
    return documents_of_packings(plan, parts, divided)


def packed_sizes(
    plan: Plan, datasets: Sequence[GPTDataset | None], documents_J: Sequence[Documents]
) -> list[int]:
    """Return the samples of each packing, before it is opened."""
    lengths = [None if each is None else each.dataset.sequence_lengths for each in datasets]
    extra = {int(each.config.add_extra_token_to_sequence) for each in datasets if each is not None}
    return packing_sizes(plan, lengths, documents_J, max(extra, default=1))


def open_packings(
    plan: Plan,
    datasets: Sequence[GPTDataset | None],
    documents_J: Sequence[Documents],
    cache: Path,
    own_cache: Path | None,
    *,
    build: bool,
) -> list[GPTDataset | None]:
    """Return the dataset of each packing; None for one without documents.

    Args:
        plan: the plan.
        datasets: the job's datasets, in the order of the plan; None for one that is not drawn from.
        documents_J: the documents of each packing.
        cache: folder of the plan's files; in it each stratum of documents has a folder of its own.
        own_cache: folder of Megatron's indices of whole datasets, if not the job's.
        build: this rank makes the indices.

    Raises:
        OSError: the indices cannot be written, or are damaged.
    """
    opened: list[GPTDataset | None] = []
    for packing, documents in zip(plan.packings, documents_J, strict=True):
        dataset = datasets[packing.dataset]
        if dataset is None or documents is None:
            opened.append(None)
        elif isinstance(documents, slice):
            opened.append(one_epoch(dataset, own_cache, build=build))
        elif len(documents):
            folder = cache / index_folder(documents)
            opened.append(one_epoch(dataset, folder, build=build, documents=documents))
        else:
            opened.append(None)
    return opened


def share_masks(datasets: Sequence[Any]) -> None:
    """Let all packings of a plan have one attention mask, which Megatron keeps once per dataset.

    A mask has S^2 bytes, and a plan has many packings. It is made here, before loader workers are
    forked, so that they share it too. Nothing is shared where the masks depend on the sample.

    Args:
        datasets: what `open_packings` returns.
    """
    filled = [each for each in datasets if each is not None and len(each)]
    if not filled or not filled[0].masks_and_position_ids_are_cacheable:
        return
    first, *others = filled
    first[0]  # Megatron makes the masks with a dataset's first sample
    first.cached_loss_mask = torch.ones_like(first.cached_loss_mask)  # without that sample's pads
    for each in others:
        each.cached_attention_mask = first.cached_attention_mask
        each.cached_loss_mask = first.cached_loss_mask
        each.cached_position_ids = first.cached_position_ids
        each.masks_and_position_ids_are_cached = True

"""Megatron's own datasets, as the plan and the run's records need them."""

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_tokscale.core.arrays import Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import whole_prefix
from megatron_tokscale.data import DatasetIdentity
from megatron_tokscale.data.prepare import JobDataset
from megatron_tokscale.data.samples import SampleIndex
from megatron_tokscale.training.data.held_out import TrainedPart
from megatron_tokscale.training.gpt_flags import DATASET_ARGUMENTS, from_args
from megatron_tokscale.training.upstream import steps_taken


def gpt_dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Return the configuration of the GPT datasets of a job, as Megatron's flags give it."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    counts = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        blend=blend,
        blend_per_split=blend_per_split,
        tokenizer=build_tokenizer(args),
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        sequences_per_dataset=(
            json.loads(Path(counts).read_text(encoding="utf-8")) if counts else None
        ),
        **from_args(DATASET_ARGUMENTS, args),
    )


def gpt_datasets(train: Any) -> list[GPTDataset]:
    """Return the datasets that a training dataset blends.

    Raises:
        TokscaleError: one of them is not Megatron's GPTDataset.
    """
    datasets = blended_datasets(train)
    others = {type(each).__name__ for each in datasets if type(each) is not GPTDataset}
    if others:
        raise TokscaleError(
            f"--tokscale-plan draws from GPTDataset, not from {', '.join(sorted(others))}"
        )
    return datasets


def blended_datasets(train: Any) -> list[Any]:
    """Return the datasets that a training dataset blends; itself, if it is no blend."""
    return list(getattr(train, "datasets", [train]))


def job_dataset(dataset: GPTDataset) -> JobDataset:
    """Return the headers of a dataset and the documents that the job trains on."""
    lengths = dataset.dataset.sequence_lengths
    prefix = dataset.dataset_path
    identity = DatasetIdentity(
        Path(prefix).name, len(lengths), int(lengths.sum()), whole_prefix(prefix)
    )
    return JobDataset(identity, documents_of(dataset))


def documents_of(dataset: GPTDataset) -> tuple[int, int]:
    """Return the first document of a training dataset, and the one after its last."""
    indices = dataset.indices
    if indices is None:  # --train-data-path, under fast cache load
        return 0, len(dataset.dataset.sequence_lengths)
    return (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)


def trained_parts(train: Any) -> list[TrainedPart] | None:
    """Return the documents of a training dataset; None if it blends other than GPTDatasets.

    A dataset that follows a plan has None in the place of one that is not drawn from.
    """
    datasets = [each for each in blended_datasets(train) if each is not None]
    if any(not isinstance(each, GPTDataset) or each.dataset_path is None for each in datasets):
        return None
    return [TrainedPart(each.dataset_path, _trained_documents(each)) for each in datasets]


def _trained_documents(dataset: GPTDataset) -> range | Integers32:
    """Return the documents of a training dataset, which a plan may have chosen one by one."""
    whole = range(*documents_of(dataset))
    if dataset.indices is None or len(dataset.indices) == len(whole):
        return whole
    return np.asarray(dataset.indices, np.int32)


def one_epoch(
    dataset: GPTDataset,
    cache: Path | None,
    *,
    build: bool,
    documents: Integers32 | None = None,
) -> GPTDataset:
    """Return the dataset's documents as one epoch, whatever the job's number of samples.

    So the order does not depend on --train-iters, and no draw lies past the end. Megatron's cache
    does not have the indices of one epoch yet: the rank that builds them may neither assume that
    they exist (--dataloader-fast-cache-load) nor open them later
    (--dataloader-defer-npy-index-mmap).

    Args:
        dataset: the job's dataset.
        cache: folder of the indices, if not the one of `dataset`.
        build: this rank makes the indices.
        documents: those of a stratum, with a `cache` of its own; None: all of the training part.

    Raises:
        OSError: the indices cannot be written, or are damaged.
    """
    indices, config = dataset.indices, dataset.config
    if documents is not None:
        indices = documents
    if indices is None:  # --train-data-path, under fast cache load
        indices = np.arange(len(dataset.dataset.sequence_lengths), dtype=np.int32)
    if build or cache:
        config = copy.copy(config)
    if cache:
        config.path_to_cache = str(cache)
    if build:
        config.fast_cache_load = config.defer_npy_index_mmap = False
    prefix = dataset.dataset_path
    try:
        return GPTDataset(dataset.dataset, prefix, indices, None, dataset.index_split, config)
    except (ValueError, EOFError) as error:  # Megatron cuts files short where the disk is full
        raise OSError(f"the index files of {prefix} are damaged: {error}") from error


def sample_index(dataset: GPTDataset) -> SampleIndex:
    """Return the documents and offsets of a dataset's samples, from its index files."""
    return SampleIndex(
        dataset.dataset.sequence_lengths,
        dataset.document_index,
        dataset.sample_index,
        dataset.shuffle_index,
        int(dataset.config.add_extra_token_to_sequence),
    )


def phase_start(args: Namespace) -> int:
    """Return the consumed samples at which the present phase of the job began.

    With --phase-transition-iterations Megatron counts the samples of each phase from 0
    (`build_train_valid_test_data_loaders`).
    """
    transitions = getattr(args, "phase_transition_iterations", None) or []
    began = max(iteration for iteration in (0, *transitions) if iteration <= steps_taken(args))
    return int(began) * int(args.global_batch_size) if transitions else 0

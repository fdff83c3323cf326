"""The training that a plan is for, and its data cut into strata."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data import DatasetIdentity, dataset_names
from megatron_tokscale.data.scores import DocumentScores, identity_of, read_scores
from megatron_tokscale.reweight.cut_documents import cut_documents
from megatron_tokscale.reweight.cut_samples import cut_samples
from megatron_tokscale.reweight.cutting import CutDataset, CutSettings


@dataclass(frozen=True)
class Job:
    """The training that a plan is for.

    Attributes:
        datasets: its training data.
        base_weights: weight of each dataset in the job's blend without a plan, all positive.
        train_samples: samples it will consume.
        seq_length: sequence length in tokens.
        seed: keys the order of the samples.
        epoch_samples: training samples in one epoch of each dataset.
        documents: first document of each dataset's training part, and the one after its last;
            empty where that is not known.

    Raises:
        TokscaleError: on construction, if these do not fit together.
    """

    datasets: Sequence[DatasetIdentity]
    base_weights: Sequence[float]
    train_samples: int
    seq_length: int
    seed: int
    epoch_samples: Sequence[int]
    documents: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if not self.datasets or len(self.datasets) != len(self.base_weights):
            raise TokscaleError(
                f"the job has {len(self.base_weights)} base weights for {len(self.datasets)} "
                "training datasets; expected one for each"
            )
        names = dataset_names(self.datasets)
        for name, weight in zip(names, self.base_weights, strict=True):
            if not 0 < weight < np.inf:
                raise TokscaleError(
                    f"the base weight of {name} is {weight:g}; expected a positive one, as "
                    "Megatron demands; leave the dataset out of the job's data"
                )
        if self.train_samples < 1 or self.seq_length < 1:
            raise TokscaleError(
                f"the job has {self.train_samples} samples of {self.seq_length} tokens; expected 1 "
                "or more of each; give another --train-samples or --seq-length"
            )
        for dataset, samples in zip(self.datasets, self.epoch_samples, strict=True):
            if samples < 1:
                raise TokscaleError(
                    f"dataset {dataset} has not enough training tokens; expected one sample of "
                    f"{self.seq_length} tokens at least; leave it out of the job's data"
                )

    @cached_property
    def base_D(self) -> Floats:
        """Base weights, summing to one."""
        weights_D = np.array(self.base_weights, dtype=np.float64)
        return np.asarray(weights_D / weights_D.sum())


def job_of(data: DataSource, train_samples: int, seq_length: int, seed: int) -> Job:
    """Return the job with these data, --train-samples and --seq-length.

    Args:
        data: the data of the job. Without weights the datasets have the weights of their sizes, as
            in Megatron.
        train_samples: samples that the job consumes.
        seq_length: sequence length in tokens.
        seed: keys the order of the samples.

    Raises:
        TokscaleError: a file is missing or damaged, or these do not fit together.
    """
    portions = data.portions("train")
    return Job(
        datasets=[identity_of(portion.tokens) for portion in portions],
        base_weights=[portion.weight for portion in portions],
        train_samples=train_samples,
        seq_length=seq_length,
        seed=seed,
        epoch_samples=[max(portion.n_tokens - 1, 0) // seq_length for portion in portions],
        documents=[(portion.sequences.start, portion.sequences.stop) for portion in portions],
    )


def cut_job(
    data: DataSource,
    seq_length: int,
    seed: int,
    *,
    scores: Path | None = None,
    settings: CutSettings | None = None,
) -> list[CutDataset]:
    """Cut the datasets of a job into strata by their scores.

    Args:
        data: the data of the job.
        seq_length: sequence length in tokens.
        seed: seed of the plan. It keys the documents that are held out, and the order in which
            documents are laid out to cut samples.
        scores: folder of the scores; None: beside their .bin/.idx.
        settings: number and kind of the strata.

    Raises:
        TokscaleError: a training document has no score, or the scores are of other data.
    """
    settings = settings or CutSettings()
    portions = data.portions("train")
    # All scores are read before any dataset is cut, so that a missing file is reported at once.
    read = [read_scores(portion.tokens, scores) for portion in portions]
    return [
        cut_dataset(portion.name, portion, each, settings, seq_length, seed)
        for portion, each in zip(portions, read, strict=True)
    ]


def cut_dataset(
    name: str,
    portion: Portion,
    scores: DocumentScores,
    settings: CutSettings,
    seq_length: int,
    seed: int,
) -> CutDataset:
    """Cut the training part of a dataset into strata of samples or of documents.

    Args:
        name: name of the dataset in the plan, with which the names of its strata begin.
        portion: the training part.
        scores: scores of the dataset.
        settings: number and kind of the strata.
        seq_length: sequence length in tokens.
        seed: as in `cut_job`.

    Raises:
        TokscaleError: a training document has no score, or there are too few tokens for a sample.
    """
    cut = cut_documents if settings.unit == "documents" else cut_samples
    return cut(name, portion, scores, settings, seq_length, seed)

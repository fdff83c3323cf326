"""The training that a plan is for, read from what the job is started with."""

from pathlib import Path

from megatron_tokscale.corpus.source import DataPath, DataSource
from megatron_tokscale.data.scores import identity_of
from megatron_tokscale.reweight.cutting import CutDataset, Cutting, cut_dataset, read_scores
from megatron_tokscale.reweight.planning import Job


def job_of(
    data_path: DataPath, split: str | None, train_samples: int, seq_length: int, seed: int
) -> Job:
    """Describe a job by its --data-path, --split, --train-samples and --seq-length.

    Args:
        data_path: Megatron's words: prefixes, or weights and prefixes in turn; or those of each
            part. Without weights the datasets have the weights of their sizes, as in Megatron.
        split: Megatron's --split; None with per-split arguments.
        train_samples: samples that the job consumes.
        seq_length: sequence length in tokens.
        seed: keys the order of the samples.

    Raises:
        TokscaleError: a file is missing or damaged, or these do not fit together.
    """
    portions = DataSource(data_path, split).portions("train")
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
    data_path: DataPath,
    split: str | None,
    seq_length: int,
    seed: int,
    *,
    scores: Path | None = None,
    cutting: Cutting | None = None,
) -> list[CutDataset]:
    """Cut the datasets of a job into strata by their scores.

    Args:
        data_path: as of `job_of`; so are split, seq_length and seed.
        split: Megatron's --split.
        seq_length: sequence length in tokens.
        seed: of the order in which the documents are laid out.
        scores: folder of the scores; by default they lie beside their .bin/.idx.
        cutting: into what.

    Raises:
        TokscaleError: there are no scores, not of all training documents, or of other data.
    """
    portions = DataSource(data_path, split).portions("train")
    every = [read_scores(portion.tokens, scores) for portion in portions]
    return [
        cut_dataset(portion.name, portion, one, cutting or Cutting(), seq_length, seed)
        for portion, one in zip(portions, every, strict=True)
    ]

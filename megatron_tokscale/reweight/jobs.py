"""The training that a plan is for, read from what the job is started with."""

from collections.abc import Sequence

from megatron_tokscale.data import DatasetIdentity
from megatron_tokscale.indexed import IndexedTokens, parse_data_path, split_range
from megatron_tokscale.reweight.planning import Job

_ENOUGH = 1_000_000


def job_of(
    data_path: Sequence[str], split: str, train_samples: int, seq_length: int, seed: int
) -> Job:
    """Describe a job by its --data-path, --split, --train-samples and --seq-length.

    Args:
        data_path: Megatron's words: prefixes, or weights and prefixes in turn. Without weights the
            datasets have the weights of their sizes, as in Megatron.
        split: Megatron's --split.
        train_samples: samples that the job consumes.
        seq_length: sequence length in tokens.
        seed: keys the order of the samples.

    Raises:
        TokscaleError: a file is missing or damaged, or these do not fit together.
    """
    prefixes, weights = parse_data_path(data_path)
    files = [IndexedTokens.open(prefix) for prefix in prefixes]
    return Job(
        datasets=[DatasetIdentity(file.name, file.n_sequences, file.n_tokens) for file in files],
        base_weights=weights or [float(file.n_tokens) for file in files],
        train_samples=train_samples,
        seq_length=seq_length,
        seed=seed,
        train_fraction=len(split_range(split, "train", _ENOUGH)) / _ENOUGH,
    )

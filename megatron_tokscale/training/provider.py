"""The user's training dataset, made to follow a plan inside Megatron's data pipeline."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets import helpers_cpp
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training import get_args

from megatron_tokscale.data import (
    DatasetIdentity,
    Plan,
    load_or_build_index,
    match_datasets,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.training.config import config_from_args, run_directory
from megatron_tokscale.training.support import check_plan, plan_misfits, raise_first


def load_plan(path: str, args: Namespace) -> Plan:
    """Read the plan and check what can be checked before the data is opened.

    Raises:
        TokscaleError: the plan is damaged, for another sequence length, or cannot be followed.
    """
    check_plan(args)
    plan = Plan.load(Path(path))
    raise_first(plan_misfits(plan, path, args.seq_length))
    return plan


def follow_plan(
    plan: Plan,
    datasets: tuple[Any, Any, Any],
    num_samples: Sequence[int],
    provider: Callable[..., Any],
) -> tuple[Any, Any, Any]:
    """Replace the training dataset by one that follows `plan`, and leave validation and test.

    Every rank calls this, also those that hold no data. Rank 0 builds the files that the others
    then map.

    Raises:
        TokscaleError: the datasets are not those of the plan, or not of a supported kind.
    """
    if not getattr(provider, "is_distributed", False):
        raise TokscaleError(
            "--tokscale-plan needs a datasets provider that runs on every rank: set "
            "provider.is_distributed = True, as pretrain_gpt.py does"
        )
    train, valid, test = datasets
    is_first = torch.distributed.get_rank() == 0
    if is_first and train is not None:
        train = _planned(plan, train, num_samples[0], build=True)
    torch.distributed.barrier()
    if not is_first and train is not None:
        train = _planned(plan, train, num_samples[0], build=False)
    return train, valid, test


def _planned(plan: Plan, train: Any, n_samples: int, *, build: bool) -> PlannedDataset:
    args = get_args()
    parts = list(getattr(train, "datasets", [train]))
    unsupported = {type(part).__name__ for part in parts if type(part) is not GPTDataset}
    if unsupported:
        raise TokscaleError(
            f"--tokscale-plan draws from GPTDataset, not from {', '.join(sorted(unsupported))}"
        )
    if build:
        _keep_plan(plan, args)
    order = match_datasets(plan, [_identity(part) for part in parts], args.seq_length)
    cache = args.data_cache_path or run_directory(config_from_args(args), args) / "tokscale/cache"
    index = load_or_build_index(
        plan, n_samples, Path(cache), helpers_cpp.build_blending_indices, build=build
    )
    return PlannedDataset(
        plan,
        [_one_epoch(parts[position]) for position in order],
        index,
        split=getattr(train, "split", None),
        index_split=parts[0].index_split,
    )


def _keep_plan(plan: Plan, args: Namespace) -> None:
    """Keep a copy of the plan with the run; refuse one that has another past.

    Raises:
        TokscaleError: the run has consumed samples in another order than this plan's.
    """
    copy = run_directory(config_from_args(args), args) / "tokscale/plan.json"
    consumed = int(args.consumed_train_samples)
    if consumed and copy.exists():
        known = Plan.load(copy)
        if known.fingerprint_until(consumed) != plan.fingerprint_until(consumed):
            raise TokscaleError(
                f"the job has consumed {consumed} samples under plan {known.fingerprint} ({copy}), "
                f"and plan {plan.fingerprint} orders them otherwise; resume with a plan that "
                "differs only in later stages"
            )
    plan.save(copy)


def _identity(part: GPTDataset) -> DatasetIdentity:
    lengths = part.dataset.sequence_lengths
    return DatasetIdentity(Path(part.dataset_path).name, len(lengths), int(lengths.sum()))


def _one_epoch(part: GPTDataset) -> GPTDataset:
    """The same documents as one epoch, however many samples the job asked for.

    So the order does not depend on --train-iters, and no draw can run past the end.
    """
    return GPTDataset(
        part.dataset, part.dataset_path, part.indices, None, part.index_split, part.config
    )

"""The run's record of its training data (data.json), which `megatron-tokscale trace` reads."""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training import print_rank_0

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    PlanRecord,
    UntracedRecord,
    record_path,
)
from megatron_tokscale.training.data.megatron_datasets import blended_datasets, phase_start
from megatron_tokscale.training.events import BuiltDatasets, JobPart, TrainingState
from megatron_tokscale.training.probe.prober import Prober


def record_plan(
    run: Path,
    planned: PlannedDataset,
    datasets: Sequence[DatasetRecord],
    cache: Path,
    consumed: int,
    fingerprint: str,
) -> None:
    """Record the samples of a job under a plan; on rank 0.

    Args:
        run: the run directory.
        planned: the training dataset.
        datasets: records of the plan's packings.
        cache: folder of the plan's files.
        consumed: samples consumed by now.
        fingerprint: fingerprint of the plan under its decisions.

    Raises:
        TokscaleError: the existing record cannot be read.
        OSError: the record cannot be written.
    """
    order = PlanRecord(
        str(cache.absolute()),
        fingerprint,
        len(planned.index),
        tuple(
            None if file is None else str(file.absolute()) for file in planned.strata.files or ()
        ),
    )
    DataRecord(tuple(datasets), order, consumed).save(record_path(run))


class BlendRecorder(JobPart):
    """Records the samples of a job without a plan."""

    def __init__(self, run: Path, prober: Prober) -> None:
        """Record into `run`, after `prober` has opened it."""
        self._run, self._prober = run, prober
        self._train: Any = None

    def on_data(self, state: TrainingState, built: BuiltDatasets) -> BuiltDatasets:
        """Remember the training dataset of the last model chunk that reads data."""
        if built.train is not None:
            self._train = built.train
        return built

    def on_train_start(self, state: TrainingState) -> None:
        """Write the record, now that the run directory is this job's own; on rank 0 alone.

        Samples in an order that cannot be traced are recorded as such, lest an earlier record be
        taken for theirs. A record that cannot be written must not stop a job; the earlier record is
        removed instead.
        """
        if torch.distributed.get_rank() > 0:
            return
        path, start = record_path(self._run), state.consumed_samples
        followed = path.with_name("plan.json")
        if start > 0 and followed.exists():
            print_rank_0(
                f"tokscale: the run has followed the plan {followed}; this job has no "
                f"--tokscale-plan, so from sample {start} on it draws as Megatron does"
            )
        record, untraced_from = self._record(state), self._prober.untraced_from
        try:
            if untraced_from is not None and untraced_from < start:
                reason = "a launch of which this directory has no record"
                DataRecord((), UntracedRecord(reason), untraced_from).save(path)
            record.save(path)
        except OSError:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        except TokscaleError as error:  # `trace` refuses an unreadable record too
            print_rank_0(f"tokscale: the job's data is not recorded: {error}")

    def _record(self, state: TrainingState) -> DataRecord:
        start, train = state.consumed_samples, self._train
        if reason := untraceable(train, state.args):
            return DataRecord((), UntracedRecord(reason), start)
        datasets = blended_datasets(train)
        return DataRecord(
            tuple(DatasetRecord.from_gpt_dataset(each) for each in datasets),
            BlendRecord.from_blended_dataset(train) if train is not datasets[0] else None,
            start,
            offset=phase_start(state.args),
        )


def untraceable(train: Any, args: Namespace) -> str | None:
    """Return the reason if the job's k-th sample is not sample k of its training dataset."""
    if args.dataloader_type not in (None, "single"):
        return f"--dataloader-type {args.dataloader_type}"
    for name in ("hybrid_context_parallel", "perform_rl_step"):
        if getattr(args, name, False):
            return f"--{name.replace('_', '-')}"
    datasets = train.datasets if type(train) is BlendedDataset else [train]
    others = {type(each).__name__ for each in datasets if type(each) is not GPTDataset}
    return f"a dataset of type {', '.join(sorted(others))}" if others else None

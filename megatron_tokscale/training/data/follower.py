"""The part of a job that follows a plan, in its training dataset and in its run directory."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training import print_rank_0

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Decision, DocumentScores, Plan
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.history import resume, save_decisions, save_run_plan, skips_of_run
from megatron_tokscale.data.index import extend_index
from megatron_tokscale.data.match import check_skipped_order
from megatron_tokscale.data.plan_parts import Packing
from megatron_tokscale.data.plan_scores import scores_of_plan
from megatron_tokscale.data.prepare import (
    PlanPart,
    check_draws,
    check_skips,
    match_job,
    prepare,
)
from megatron_tokscale.data.record import DatasetRecord, check_order, record_path
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.store import RunPaths
from megatron_tokscale.training.data.agreement import (
    FollowedPlan,
    agree_on_decision,
    agree_on_plan,
    refuse_edits,
)
from megatron_tokscale.training.data.megatron_datasets import (
    documents_of,
    gpt_datasets,
    job_dataset,
    phase_start,
    sample_index,
)
from megatron_tokscale.training.data.packings import (
    open_packings,
    packed_documents,
    packed_sizes,
    share_masks,
)
from megatron_tokscale.training.data.records import record_plan
from megatron_tokscale.training.events import BuiltDatasets, JobPart, TrainingState
from megatron_tokscale.training.ranks import from_rank_0, together, while_others_wait
from megatron_tokscale.training.settings import JobPlanSettings, JobSettings
from megatron_tokscale.training.support import (
    PARTS_UNKNOWN,
    check_plan,
    plan_misfits,
    raise_first,
    replan_misfits,
)

_SHOWN_WITHIN_SECONDS: Final = 10
"""Seconds that a rank waits for a file of rank 0 to appear. Our choice: network file systems cache
the absence of a file for some seconds; the report of a missing file is delayed by as much."""


class Follower(JobPart):
    """Replaces the training dataset by one that follows a plan. All ranks hold one.

    Attributes:
        followed: the plan and its decisions, the same on all ranks.
        planned: the dataset; None on a rank that reads no data.
    """

    def __init__(self, plan: JobPlanSettings, settings: JobSettings, args: Namespace) -> None:
        """Read the plan and make all checks that need no open data.

        Raises:
            TokscaleError: the plan is damaged, for another sequence length, or cannot be followed;
                or its weights may not be changed in the job, which is to do so.
        """
        check_plan(args)
        self._settings = plan
        self._given = Plan.load(plan.path)
        raise_first(plan_misfits(self._given, str(plan.path), args.seq_length))
        if plan.replan_interval is not None:
            raise_first(replan_misfits(self._given, str(plan.path)))
        self._run = settings.run
        self._cache = settings.plan_cache
        self._data_cache = settings.data_cache
        self._is_moved = False
        self._is_settled = False
        self._records: list[DatasetRecord] = []
        self.followed = FollowedPlan(self._given)
        self.planned: PlannedDataset | None = None

    @property
    def plan(self) -> Plan:
        """The plan under its decisions."""
        return self.followed.plan

    def on_data(self, state: TrainingState, built: BuiltDatasets) -> BuiltDatasets:
        """Replace the training dataset by one that follows the plan; leave validation and test.

        Every rank calls this, also those that hold no data, once for each model chunk. Rank 0
        builds the files that the others then map: in the job's data cache, or in the run's own
        where that cannot be written. It may take hours; the others wait in no collective.

        Raises:
            TokscaleError: the datasets are not those of the plan, or not of a supported kind.
        """
        if not built.is_distributed:
            raise TokscaleError(
                "--tokscale-plan needs a datasets provider that runs on every rank: set "
                "provider.is_distributed = True, as pretrain_gpt.py does"
            )
        self._settle(state)
        train, n_samples = built.train, built.n_samples[0]
        is_first, has_data = torch.distributed.get_rank() == 0, train is not None
        made = while_others_wait(
            lambda: _with_one_mask(self._build(state, train, n_samples)) if has_data else None,
            where=is_first,
        )
        if from_rank_0(lambda: self._is_moved):
            self._move()
        mapped = together(
            lambda: _with_one_mask(
                _once_shown(lambda: self._prepared(state, train, n_samples, build=False))
            ),
            where=has_data and not is_first,
        )
        return built.with_train(mapped if made is None else made)

    def make_files(self, state: TrainingState, train: Any, n_samples: int) -> Path:
        """Make the plan's files before the job, in a process of its own; return their folder.

        Args:
            state: state in which the job will start.
            train: the job's training dataset, or an object with its `datasets`.
            n_samples: samples of the job's training dataset.

        Raises:
            TokscaleError: the job would be refused, or no folder can be written.
            OSError: a file of the run or of the plan cannot be read.
        """
        consumed, step, overrides = state.consumed_samples, state.step, self._settings.overrides
        base, decisions = resume(self._given, self._run, consumed, step, accept=overrides)
        self.followed = FollowedPlan(base, tuple(decisions))
        self._build(state, train, n_samples)
        return self._cache

    def _settle(self, state: TrainingState) -> None:
        """Agree on the plan, once, when the number of consumed samples is known."""
        if self._is_settled:
            return
        self.followed = agree_on_plan(
            self._given, self._run, state, overrides=self._settings.overrides
        )
        self._is_settled = True
        accepted = self.followed.base.accepted
        if accepted and accepted[-1].at == state.consumed_samples:
            print_rank_0(f"tokscale: plan {self._given.fingerprint} holds from here on")

    def _build(self, state: TrainingState, train: Any, n_samples: int) -> PlannedDataset:
        """Make the planned dataset and its files, on rank 0."""
        try:
            return self._prepared(state, train, n_samples, build=True)
        except OSError as error:
            place = self._data_cache or "beside the data"
            reason = f"the data cache {place} cannot be used ({error})"
        self._move()
        try:
            planned = self._prepared(state, train, n_samples, build=True)
        except OSError as error:
            raise TokscaleError(
                f"{reason}, nor can {self._cache} ({error}); expected a place for the plan's "
                "files; make room or get permission in either"
            ) from error
        print_rank_0(f"tokscale: {reason}; the plan's files are in {self._cache}")
        return planned

    def _move(self) -> None:
        """Keep the plan's files in the run's directory, not in the job's data cache."""
        self._is_moved, self._cache = True, RunPaths(self._run).cache

    def _prepared(
        self, state: TrainingState, train: Any, n_samples: int, *, build: bool
    ) -> PlannedDataset:
        """Return the planned dataset of one model chunk; with `build`, make its files first."""
        # Find the plan's datasets among the job's.
        found, consumed = gpt_datasets(train), state.consumed_samples
        headers = [job_dataset(each) for each in found]
        order = match_job(self.plan, headers, int(state.args.seq_length), consumed)
        chosen = [None if place is None else found[place] for place in order]
        # Refuse another order of the samples, before any file is written.
        if build:
            orders = [DatasetRecord.of_job(each) for each in found]
            if consumed:
                check_order(record_path(self._run), orders)
            check_skipped_order(
                self.plan, [None if place is None else orders[place].order for place in order]
            )
        # Find the documents of strata of documents; refuse a plan that draws too much from them.
        documents = packed_documents(
            self.plan, chosen, lambda d: self._scores(d, chosen[d]), self._cache, build=build
        )
        offset = phase_start(state.args)
        if build:
            sizes = packed_sizes(self.plan, chosen, documents)
            check_draws(self.plan, sizes, offset + n_samples, consumed)
        # Open the packings at one epoch. Megatron's indices of that epoch are in the cache too.
        moved = self._cache if self._is_moved else None
        packed = open_packings(self.plan, chosen, documents, self._cache, moved, build=build)
        if build:
            self._records = [
                self._record_of(packing, dataset)
                for packing, dataset in zip(self.plan.packings, packed, strict=True)
            ]
        self.planned = prepare(
            self.plan,
            [
                None if dataset is None else self._part(packing.dataset, dataset)
                for packing, dataset in zip(self.plan.packings, packed, strict=True)
            ],
            n_samples,
            self._cache,
            build=build,
            consumed=consumed,
            offset=offset,
            shares_index=self._settings.replan_interval is not None,
            like=self.planned,
            split=getattr(train, "split", None),
            index_split=found[0].index_split,
        )
        if build and self.plan.skips:
            check_skips(self.plan, self.planned.index, consumed, skips_of_run(self._run))
        return self.planned

    def _record_of(self, packing: Packing, dataset: GPTDataset | None) -> DatasetRecord:
        stratum = self.plan.strata[packing.strata.start].name if packing.is_stratum else ""
        if dataset is None:
            return DatasetRecord.unused(self.plan.datasets[packing.dataset].path, stratum)
        return DatasetRecord.from_gpt_dataset(dataset, stratum)

    def _part(self, number: int, dataset: GPTDataset) -> PlanPart:
        return PlanPart(
            dataset, dataset.unique_description_hash, lambda: self._sample_scores(number, dataset)
        )

    def _sample_scores(self, number: int, dataset: GPTDataset) -> SampleScores:
        """Return the scores of a dataset's samples."""
        scores = self._scores(number, dataset)
        return SampleScores.from_document_scores(
            scores, sample_index(dataset), self.plan.cuts[number]
        )

    def _scores(self, number: int, dataset: GPTDataset | None) -> DocumentScores:
        """Return the scores of a dataset's documents, from the file beside its data.

        Raises:
            TokscaleError: the scores are missing, of other data, or not those of the plan.
        """
        assert dataset is not None, "only datasets that are drawn from are cut into strata"
        folder, part = self._settings.scores_dir, range(*documents_of(dataset))
        return scores_of_plan(self.plan, number, dataset.dataset_path, part, folder)

    def on_train_start(self, state: TrainingState) -> None:
        """Write the plan into the run directory; all ranks call it.

        Raises:
            AgreedError: the plan cannot be written.
        """
        consumed = state.consumed_samples
        together(lambda: self._keep(consumed), where=torch.distributed.get_rank() == 0)
        print_rank_0(f"tokscale: this job follows plan {self.plan.fingerprint}")
        if not self.plan.documents:
            print_rank_0(f"tokscale: {PARTS_UNKNOWN}")

    def _keep(self, consumed: int) -> None:
        try:
            save_run_plan(self.followed.base, self.followed.decisions, self._run)
            self._record(consumed)
        except (OSError, TokscaleError) as error:
            place = RunPaths(self._run).folder
            raise TokscaleError(f"the plan cannot be kept in {place}: {error}") from error

    def _record(self, consumed: int) -> None:
        """Record the job's samples, for `megatron-tokscale trace`; on rank 0."""
        if self.planned is not None:
            record_plan(
                self._run,
                self.planned,
                self._records,
                self._cache,
                consumed,
                self.plan.fingerprint,
            )

    def refuse_edits(self) -> None:
        """Stop the job if the plan in its run directory was changed; all ranks call it.

        Raises:
            AgreedError: the plan has changed.
        """
        refuse_edits(self.followed, self._run)

    def add(self, decision: Decision, consumed: int) -> str | None:
        """Follow a decision from its start on; every rank adds the same.

        Args:
            decision: the new weights, and the sample from which they hold.
            consumed: samples consumed by now.

        Returns:
            The reason if the decision is not followed: it would repeat a stratum too often, or
            cannot be written.

        Raises:
            AgreedError: the ranks follow different plans.
        """
        result = agree_on_decision(self.followed, decision, lambda new: self._write(new, consumed))
        if isinstance(result, str):
            return result
        self.followed = result
        if self.planned is not None:
            extend_index(self.plan, self.planned.index, decision.start)
        if torch.distributed.get_rank() == 0:
            with suppress(OSError):  # only `trace` needs the record: the job continues without it
                self._record(consumed)
        return None

    def _write(self, new: FollowedPlan, consumed: int) -> str | None:
        """Write a plan's decisions, on rank 0; return the reason if they cannot be followed."""
        assert self.planned is not None, "rank 0 reads data"
        try:
            self.planned.strata.check(new.plan, len(self.planned.index), consumed)
            save_decisions(new.base, new.decisions, self._run)
        except (TokscaleError, OSError) as error:
            return str(error)
        return None


def _with_one_mask(planned: PlannedDataset) -> PlannedDataset:
    """Return the dataset of a job, whose packings share their masks."""
    share_masks(planned.datasets)
    return planned


def _once_shown(action: Callable[[], PlannedDataset]) -> PlannedDataset:
    """Call `action`; repeat it while a file that rank 0 has written is not there.

    A network file system may show such a file late.
    """
    deadline = time.monotonic() + _SHOWN_WITHIN_SECONDS
    while True:
        try:
            return action()
        except (TokscaleError, OSError) as error:
            is_missing = isinstance(error.__cause__ or error, FileNotFoundError)
            if not is_missing or time.monotonic() > deadline:
                raise
        time.sleep(1)

"""The user's training dataset, made to follow a plan inside Megatron's data pipeline."""

import copy
import json
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training import print_rank_0

from megatron_tokscale.data import (
    DatasetIdentity,
    Decision,
    Index,
    Plan,
    load_or_build_index,
    match_datasets,
    with_decisions,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.history import (
    load_run_plan,
    resume,
    save_decisions,
    save_run_plan,
)
from megatron_tokscale.data.index import extend_index
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    PlanRecord,
    check_order,
    record_path,
)
from megatron_tokscale.data.samples import SampleIndex, SampleScores
from megatron_tokscale.data.strata import Strata, load_or_build_strata
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.names import whole_prefix
from megatron_tokscale.training.config import TokscaleConfig, run_directory
from megatron_tokscale.training.ranks import first_of_all_ranks, refuse_together
from megatron_tokscale.training.support import (
    check_plan,
    plan_misfits,
    raise_first,
    scores_of_plan,
)


class Follower:
    """What a job follows: a plan, the decisions made since, and the datasets that follow them.

    Every rank has one. Rank 0 decides what is followed, and writes it down; the others take it
    from there.
    """

    def __init__(self, config: TokscaleConfig, args: Namespace) -> None:
        """Read the plan and check what can be checked before the data is opened.

        Raises:
            TokscaleError: the plan is damaged, for another sequence length, or cannot be followed.
        """
        assert config.tokscale_plan is not None
        check_plan(args)
        self._config, self._args = config, args
        self._given = Plan.load(Path(config.tokscale_plan))
        raise_first(plan_misfits(self._given, config.tokscale_plan, args.seq_length))
        self._run = run_directory(config, args)
        self._base = self.plan = self._given
        self.decisions: list[Decision] = []
        self.index: Index | None = None
        self.strata: Strata | None = None
        self._cache = Path(args.data_cache_path or self._run / "tokscale/cache")
        self._records: list[DatasetRecord] = []
        self._is_settled = False

    def follow(
        self, datasets: tuple[Any, Any, Any], num_samples: Sequence[int], provider: Any
    ) -> tuple[Any, Any, Any]:
        """Replace the training dataset by one that follows the plan; leave validation and test.

        Every rank calls this, also those that hold no data, once for each model chunk. Rank 0
        builds the files that the others then map.

        Raises:
            TokscaleError: the datasets are not those of the plan, or not of a supported kind.
        """
        if not getattr(provider, "is_distributed", False):
            raise TokscaleError(
                "--tokscale-plan needs a datasets provider that runs on every rank: set "
                "provider.is_distributed = True, as pretrain_gpt.py does"
            )
        self._settle()
        train, valid, test = datasets
        planned = None
        is_first = torch.distributed.get_rank() == 0
        for build in (True, False):
            refusal = None
            if train is not None and is_first == build:
                try:
                    planned = self._planned(train, num_samples[0], build=build)
                except TokscaleError as error:
                    refusal = str(error)
            refuse_together(refusal)
        return planned, valid, test

    def _settle(self) -> None:
        """Agree on what is followed: once, when it is known how many samples are consumed."""
        if self._is_settled:
            return
        args = self._args
        settled, refusal = None, None
        if torch.distributed.get_rank() == 0:
            try:
                plan, decisions = resume(
                    self._given,
                    self._run,
                    int(args.consumed_train_samples),
                    int(args.iteration),
                    accept=self._config.tokscale_accept_plan,
                )
                settled = self._as_text(plan, decisions)
            except TokscaleError as error:
                refusal = str(error)
        refuse_together(refusal)
        # Also from rank 0 to ranks whose file system does not show its files yet.
        self._base, self.decisions = self._from_text(first_of_all_ranks(settled))
        self.plan = with_decisions(self._base, self.decisions)
        self._is_settled = True
        taken_over = self._base.provenance.get("accepted", [])
        if taken_over and taken_over[-1]["at"] == args.consumed_train_samples:
            print_rank_0(f"tokscale: plan {self._given.fingerprint} holds from here on")

    def keep(self) -> None:
        """Write what is followed into the run's directory; all ranks call it, as training starts.

        Raises:
            TokscaleError: it cannot be written.
        """
        refusal = None
        if torch.distributed.get_rank() == 0:
            try:
                save_run_plan(self._base, self.decisions, self._run)
                if self.index is not None:
                    self._record()
            except (OSError, TokscaleError) as error:
                refusal = f"the plan cannot be kept in {self._run / 'tokscale'}: {error}"
        refuse_together(refusal)
        print_rank_0(f"tokscale: this job follows plan {self.plan.fingerprint}")

    def _planned(self, train: Any, n_samples: int, *, build: bool) -> PlannedDataset:
        args = self._args
        parts = list(getattr(train, "datasets", [train]))
        unsupported = {type(part).__name__ for part in parts if type(part) is not GPTDataset}
        if unsupported:
            raise TokscaleError(
                f"--tokscale-plan draws from GPTDataset, not from {', '.join(sorted(unsupported))}"
            )
        identities = [_identity(part) for part in parts]
        consumed = int(args.consumed_train_samples)
        order = match_datasets(self.plan, identities, args.seq_length, consumed)
        chosen = [None if place is None else parts[place] for place in order]
        datasets = [None if part is None else _one_epoch(part, build=build) for part in chosen]
        sizes_D = [0 if dataset is None else len(dataset) for dataset in datasets]
        offset = _phase_start(args)
        if build:  # before anything is written
            self._records = [
                DatasetRecord.unused(row.path) if part is None else DatasetRecord.of(part)
                for row, part in zip(self.plan.datasets, datasets, strict=True)
            ]
            if consumed:
                check_order(record_path(self._run), self._records)
            Strata(self.plan, sizes_D, [None] * len(sizes_D)).check(
                self.plan, offset + n_samples, consumed
            )
        if self.index is None or self.strata is None:
            self.strata = load_or_build_strata(
                self.plan,
                sizes_D,
                ["" if part is None else part.unique_description_hash for part in datasets],
                lambda d: self._sample_scores(d, datasets[d]),
                self._cache,
                build=build,
            )
            index = load_or_build_index(self.plan, offset + n_samples, self._cache, build=build)
            self.index = index.shared() if self._config.tokscale_replan else index
        return PlannedDataset(
            self.plan,
            datasets,
            self.index,
            self.strata,
            offset=offset,
            consumed=consumed,
            split=getattr(train, "split", None),
            index_split=parts[0].index_split,
        )

    def _record(self) -> None:
        """Note where samples come from, for `megatron-tokscale trace`; on rank 0."""
        assert self.index is not None and self.strata is not None
        order = PlanRecord(
            str(self._cache.absolute()),
            self.plan.fingerprint,
            len(self.index),
            tuple(
                None if file is None else str(file.absolute()) for file in self.strata.files or ()
            ),
        )
        start = int(self._args.consumed_train_samples)
        DataRecord(tuple(self._records), order, start).save(record_path(self._run))

    def _sample_scores(self, number: int, dataset: GPTDataset) -> SampleScores:
        """Scores of the samples of a dataset of the plan, from the file beside its data.

        Raises:
            TokscaleError: the scores are missing, of other data, or not those of the plan.
        """
        folder, prefix = self._config.tokscale_scores, dataset.dataset_path
        scores = scores_of_plan(self.plan, number, prefix, dataset.indices, folder)
        return SampleScores.of(scores, _sample_index(dataset), self.plan.cuts[number])

    def refuse_edits(self) -> None:
        """Stop if the run's plan on disk is not what this job follows; all ranks call it.

        Raises:
            TokscaleError: somebody has changed it.
        """
        refuse_together(self._edited() if torch.distributed.get_rank() == 0 else None)

    def add(self, decision: Decision) -> str | None:
        """Follow a decision from its start on; every rank adds the same.

        Returns:
            Why it is not followed, if it would go through a stratum too often or cannot be written.

        Raises:
            TokscaleError: the ranks do not agree.
        """
        decisions = [*self.decisions, decision]
        plan = with_decisions(self._base, decisions)
        agreed = first_of_all_ranks(plan.fingerprint)
        is_other = plan.fingerprint != agreed
        refuse_together(
            f"a rank follows plan {plan.fingerprint}, the first {agreed}" if is_other else None
        )
        objection = None
        if torch.distributed.get_rank() == 0:
            objection = self._write(plan, decisions)
        if objection := first_of_all_ranks(objection):
            return objection
        self.plan, self.decisions = plan, decisions
        if self.index is not None:
            extend_index(plan, self.index, decision.start)
        if torch.distributed.get_rank() == 0:
            with suppress(OSError):  # it serves a look back, and the job has its decision
                self._record()
        return None

    def _edited(self) -> str | None:
        """What to say if the plan in the run's directory is not what this job follows."""
        folder = self._run / "tokscale"
        try:
            if load_run_plan(self._run) == (self._base, self.decisions):
                return None
            reason = "it is another now"
        except TokscaleError as error:
            reason = str(error)
        return (
            f"the plan in {folder} was changed under this job ({reason}); restore it, and give a "
            "new plan as --tokscale-plan, with --tokscale-accept-plan"
        )

    def _write(self, plan: Plan, decisions: Sequence[Decision]) -> str | None:
        """Write decisions, on the first rank; what keeps them from being followed, if anything."""
        assert self.index is not None and self.strata is not None
        try:
            self.strata.check(plan, len(self.index), int(self._args.consumed_train_samples))
            save_decisions(self._base, decisions, self._run)
        except (TokscaleError, OSError) as error:
            return str(error)
        return None

    @staticmethod
    def _as_text(plan: Plan, decisions: Sequence[Decision]) -> str:
        return json.dumps([plan.to_json(), [vars(decision) for decision in decisions]])

    @staticmethod
    def _from_text(text: str | None) -> tuple[Plan, list[Decision]]:
        assert text is not None
        plan, decisions = json.loads(text)
        return Plan.from_json(plan), [Decision.from_json(row) for row in decisions]


def record_blend(train: Any, config: TokscaleConfig, args: Namespace) -> None:
    """Note where the samples of a job without a plan come from, for `megatron-tokscale trace`.

    On rank 0 alone. What is not of Megatron's GPT datasets is not noted, and what cannot be written
    neither: it must not stop a job.
    """
    if torch.distributed.get_rank() > 0:
        return
    parts = list(getattr(train, "datasets", [train]))
    if any(type(part) is not GPTDataset for part in parts):
        return
    phase = _phase_start(args)
    record = DataRecord(
        tuple(DatasetRecord.of(part) for part in parts),
        BlendRecord.of(train) if train is not parts[0] else None,
        start=int(args.consumed_train_samples),
        offset=phase,
    )
    with suppress(OSError, TokscaleError):
        record.save(record_path(run_directory(config, args)))


def _phase_start(args: Namespace) -> int:
    """Consumed samples at which the present phase of --phase-transition-iterations began.

    Megatron counts the samples of each phase from 0 (`build_train_valid_test_data_loaders`).
    """
    transitions = getattr(args, "phase_transition_iterations", None) or []
    began = max(iteration for iteration in (0, *transitions) if iteration <= args.iteration)
    return int(began) * int(args.global_batch_size) if transitions else 0


def _identity(part: GPTDataset) -> DatasetIdentity:
    lengths = part.dataset.sequence_lengths
    prefix = part.dataset_path
    return DatasetIdentity(
        Path(prefix).name, len(lengths), int(lengths.sum()), whole_prefix(prefix)
    )


def _one_epoch(part: GPTDataset, *, build: bool) -> GPTDataset:
    """The same documents as one epoch, however many samples the job asked for.

    So the order does not depend on --train-iters, and no draw can run past the end. Its indices
    are new to Megatron's cache: the rank that builds them may neither take them to be there
    (--dataloader-fast-cache-load) nor put off opening them (--dataloader-defer-npy-index-mmap).
    """
    indices, config = part.indices, part.config
    if indices is None:  # of a part of its own (--train-data-path), under fast cache load
        indices = np.arange(len(part.dataset.sequence_lengths), dtype=np.int32)
    if build:
        config = copy.copy(config)
        config.fast_cache_load = config.defer_npy_index_mmap = False
    return GPTDataset(part.dataset, part.dataset_path, indices, None, part.index_split, config)


def _sample_index(dataset: GPTDataset) -> SampleIndex:
    return SampleIndex(
        dataset.dataset.sequence_lengths,
        dataset.document_index,
        dataset.sample_index,
        dataset.shuffle_index,
        int(dataset.config.add_extra_token_to_sequence),
    )

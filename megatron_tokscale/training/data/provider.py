"""The user's training dataset, made to follow a plan inside Megatron's data pipeline."""

import copy
import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training import print_rank_0

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.corpus.names import whole_prefix
from megatron_tokscale.data import (
    DatasetIdentity,
    Decision,
    Plan,
    PlanIndex,
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
from megatron_tokscale.data.match import check_documents
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    PlanRecord,
    UntracedRecord,
    check_order,
    record_path,
)
from megatron_tokscale.data.samples import SampleIndex, SampleScores
from megatron_tokscale.data.strata import Strata, load_or_build_strata
from megatron_tokscale.training.config import TokscaleConfig, run_directory
from megatron_tokscale.training.data.held_out import TrainedPart
from megatron_tokscale.training.ranks import (
    first_of_all_ranks,
    from_rank_0,
    refuse_together,
    together,
)
from megatron_tokscale.training.support import (
    check_plan,
    plan_misfits,
    raise_first,
    scores_of_plan,
)

_SHOWN_WITHIN: Final = 10  # seconds, our choice
# Of a plan made before the training parts were noted.
PARTS_UNKNOWN: Final = (
    "whether the job's --split is the plan's is not known: the plan does not say which documents "
    "it was made for; make it again to have that checked"
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
        self.index: PlanIndex | None = None
        self.strata: Strata | None = None
        self._cache = Path(args.data_cache_path or self._run / "tokscale/cache")
        self._is_moved = False
        self._records: list[DatasetRecord] = []
        self._is_settled = False

    def follow(
        self, datasets: tuple[Any, Any, Any], num_samples: Sequence[int], provider: Any
    ) -> tuple[Any, Any, Any]:
        """Replace the training dataset by one that follows the plan; leave validation and test.

        Every rank calls this, also those that hold no data, once for each model chunk. Rank 0
        builds the files that the others then map: in the job's data cache, or in the run's own
        where that cannot be written.

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
        is_first, has_data = torch.distributed.get_rank() == 0, train is not None
        built = together(lambda: self._built(train, num_samples[0]), where=has_data and is_first)
        if from_rank_0(lambda: self._is_moved):
            self._move()
        mapped = together(
            lambda: _once_shown(lambda: self._planned(train, num_samples[0], build=False)),
            where=has_data and not is_first,
        )
        return mapped if built is None else built, valid, test

    def _built(self, train: Any, n_samples: int) -> PlannedDataset:
        """Make the planned dataset, and the files that it needs; on rank 0."""
        try:
            return self._planned(train, n_samples, build=True)
        except OSError as error:
            place = self._args.data_cache_path or "beside the data"
            reason = f"the data cache {place} cannot be used ({error})"
        self._move()
        try:
            planned = self._planned(train, n_samples, build=True)
        except OSError as error:
            raise TokscaleError(
                f"{reason}, and nor can {self._cache} ({error}); expected a place for the plan's "
                "files; make room or get permission in either"
            ) from error
        print_rank_0(f"tokscale: {reason}; the plan's files are in {self._cache}")
        return planned

    def _move(self) -> None:
        """Keep the plan's files in the run's directory, not in the job's data cache."""
        self._is_moved, self._cache = True, self._run / "tokscale/cache"

    def _settle(self) -> None:
        """Agree on what is followed: once, when it is known how many samples are consumed."""
        if self._is_settled:
            return
        args = self._args

        def settled() -> str:
            plan, decisions = resume(
                self._given,
                self._run,
                int(args.consumed_train_samples),
                int(args.iteration),
                accept=self._config.tokscale_override_plan,
            )
            return self._as_text(plan, decisions)

        # Also from rank 0 to ranks whose file system does not show its files yet.
        self._base, self.decisions = self._from_text(from_rank_0(settled))
        self.plan = with_decisions(self._base, self.decisions)
        self._is_settled = True
        accepted = self._base.accepted
        if accepted and accepted[-1].at == args.consumed_train_samples:
            print_rank_0(f"tokscale: plan {self._given.fingerprint} holds from here on")

    def keep(self) -> None:
        """Write what is followed into the run's directory; all ranks call it, as training starts.

        Raises:
            TokscaleError: it cannot be written.
        """
        together(self._keep, where=torch.distributed.get_rank() == 0)
        print_rank_0(f"tokscale: this job follows plan {self.plan.fingerprint}")
        if not self.plan.documents:
            print_rank_0(f"tokscale: {PARTS_UNKNOWN}")

    def _keep(self) -> None:
        try:
            save_run_plan(self._base, self.decisions, self._run)
            if self.index is not None:
                self._record()
        except (OSError, TokscaleError) as error:
            place = self._run / "tokscale"
            raise TokscaleError(f"the plan cannot be kept in {place}: {error}") from error

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
        check_documents(self.plan, order, [documents_of(part) for part in parts])
        chosen = [None if place is None else parts[place] for place in order]
        # Where the plan's files are, so are Megatron's of the one epoch that it draws from.
        moved = self._cache if self._is_moved else None
        datasets = [
            None if part is None else _one_epoch(part, moved, build=build) for part in chosen
        ]
        sizes_D = [0 if dataset is None else len(dataset) for dataset in datasets]
        offset = _phase_start(args)
        if build:  # before anything is written
            self._records = [
                DatasetRecord.unused(row.path)
                if part is None
                else DatasetRecord.from_gpt_dataset(part)
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
            self.index = index.shared() if self._config.tokscale_replan_interval else index
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
        folder, prefix = self._config.tokscale_scores_dir, dataset.dataset_path
        scores = scores_of_plan(self.plan, number, prefix, dataset.indices, folder)
        return SampleScores.from_document_scores(
            scores, _sample_index(dataset), self.plan.cuts[number]
        )

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
        """Return what to say if the plan in the run's directory is not what this job follows."""
        folder = self._run / "tokscale"
        try:
            base, decisions = load_run_plan(self._run)
            base = replace(base, provenance=self._base.provenance)
            if (base, decisions) == (self._base, self.decisions):
                return None
            reason = "it is another now"
        except (TokscaleError, OSError) as error:
            reason = str(error)
        return (
            f"the plan in {folder} was changed under this job ({reason}); restore it, and give a "
            "new plan as --tokscale-plan, with --tokscale-override-plan"
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
        return json.dumps([to_json(plan), to_json(decisions)])

    @staticmethod
    def _from_text(text: str) -> tuple[Plan, list[Decision]]:
        plan, decisions = json.loads(text)
        return from_json(Plan, plan), from_json(list[Decision], decisions)


def _once_shown(action: Callable[[], PlannedDataset]) -> PlannedDataset:
    """Do `action`, again while a file that rank 0 has written is not there.

    A network file system may show it late, but hardly later than `_SHOWN_WITHIN`.
    """
    deadline = time.monotonic() + _SHOWN_WITHIN
    while True:
        try:
            return action()
        except (TokscaleError, OSError) as error:
            is_missing = isinstance(error.__cause__ or error, FileNotFoundError)
            if not is_missing or time.monotonic() > deadline:
                raise
        time.sleep(1)


def record_blend(
    train: Any, config: TokscaleConfig, args: Namespace, untraced_from: int | None = None
) -> None:
    """Note where the samples of a job without a plan come from, for `megatron-tokscale trace`.

    On rank 0 alone. Samples in an order that `trace` does not know are noted as such, lest a record
    from before answer for them. A record that cannot be written must not stop a job; one from
    before is removed then.

    Args:
        train: the job's training dataset.
        config: the plugin's settings.
        args: Megatron's.
        untraced_from: the sample from which on the run directory tells of another branch, if so.
    """
    if torch.distributed.get_rank() > 0:
        return
    path = record_path(run_directory(config, args))
    start = int(args.consumed_train_samples)
    if reason := _untraceable(train, args):
        record = DataRecord((), UntracedRecord(reason), start)
    else:
        parts = list(getattr(train, "datasets", [train]))
        record = DataRecord(
            tuple(DatasetRecord.from_gpt_dataset(part) for part in parts),
            BlendRecord.from_blended_dataset(train) if train is not parts[0] else None,
            start,
            offset=_phase_start(args),
        )
    followed = path.with_name("plan.json")
    if start > 0 and followed.exists():
        print_rank_0(
            f"tokscale: the run has followed the plan {followed}; this job has no --tokscale-plan, "
            f"so from sample {start} on it draws as Megatron does"
        )
    try:
        if untraced_from is not None and untraced_from < start:
            reason = "a launch of which this directory has no record"
            DataRecord((), UntracedRecord(reason), untraced_from).save(path)
        record.save(path)
    except OSError:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    except TokscaleError as error:  # trace refuses what it cannot read, too
        print_rank_0(f"tokscale: the job's data is not recorded: {error}")


def _untraceable(train: Any, args: Namespace) -> str | None:
    """Return why the job's k-th sample is not sample k of its training dataset, if it is not."""
    if args.dataloader_type not in (None, "single"):
        return f"--dataloader-type {args.dataloader_type}"
    for name in ("hybrid_context_parallel", "perform_rl_step"):
        if getattr(args, name, False):
            return f"--{name.replace('_', '-')}"
    parts = train.datasets if type(train) is BlendedDataset else [train]
    others = {type(part).__name__ for part in parts if type(part) is not GPTDataset}
    return f"a dataset of type {', '.join(sorted(others))}" if others else None


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


def documents_of(part: GPTDataset) -> tuple[int, int]:
    """Return the first document of a part of a dataset, and the one after its last."""
    indices = part.indices
    if indices is None:  # of a part of its own (--train-data-path), under fast cache load
        return 0, len(part.dataset.sequence_lengths)
    return (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)


def trained_parts(train: Any) -> list[TrainedPart] | None:
    """Return what a training dataset of Megatron's is made of; None for one of another kind."""
    parts = list(getattr(train, "datasets", [train]))
    if any(not isinstance(part, GPTDataset) or part.dataset_path is None for part in parts):
        return None
    return [TrainedPart(part.dataset_path, *documents_of(part)) for part in parts]


def _one_epoch(part: GPTDataset, cache: Path | None, *, build: bool) -> GPTDataset:
    """The same documents as one epoch, however many samples the job asked for.

    So the order does not depend on --train-iters, and no draw can run past the end. Its indices
    are new to Megatron's cache: the rank that builds them may neither take them to be there
    (--dataloader-fast-cache-load) nor put off opening them (--dataloader-defer-npy-index-mmap).

    Args:
        part: the job's dataset.
        cache: where its indices are, if not where those of `part` are.
        build: whether this rank makes the indices.

    Raises:
        OSError: the indices cannot be written, or are damaged.
    """
    indices, config = part.indices, part.config
    if indices is None:  # of a part of its own (--train-data-path), under fast cache load
        indices = np.arange(len(part.dataset.sequence_lengths), dtype=np.int32)
    if build or cache:
        config = copy.copy(config)
    if cache:
        config.path_to_cache = str(cache)
    if build:
        config.fast_cache_load = config.defer_npy_index_mmap = False
    try:
        return GPTDataset(part.dataset, part.dataset_path, indices, None, part.index_split, config)
    except (ValueError, EOFError) as error:  # Megatron cuts files short where the disk is full
        raise OSError(f"the index files of {part.dataset_path} are damaged: {error}") from error


def _sample_index(dataset: GPTDataset) -> SampleIndex:
    return SampleIndex(
        dataset.dataset.sequence_lengths,
        dataset.document_index,
        dataset.sample_index,
        dataset.shuffle_index,
        int(dataset.config.add_extra_token_to_sequence),
    )

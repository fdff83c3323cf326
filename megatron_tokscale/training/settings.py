"""The settings of a job, read once from its flags, for the job, the replay and the doctor."""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.source import is_in_storage
from megatron_tokscale.probe import DEFAULT_SCHEDULE, ProbeSchedule
from megatron_tokscale.store import RunPaths
from megatron_tokscale.training.config import TokscaleConfig, config_from_args

DECISION_STEPS: Final = 4
"""Optimizer steps between a probe and the decision on weights from its losses: time for the process
that computes them. Our choice: with fewer steps the training may wait, with more the weights are
older."""


class ProbeSetFile(NamedTuple):
    """A file of `--tokscale-probe-set`.

    Attributes:
        path: the file.
        name: name of the set in the log and of its run directory: the file's, without its ending;
            empty for the job's first set, whose run directory is the job's.
    """

    path: Path
    name: str

    def directory(self, run: Path) -> Path:
        """Return the run directory of the set in a job whose run directory is `run`."""
        return RunPaths(run).of_probe_set(self.name) if self.name else run


@dataclass(frozen=True, kw_only=True)
class JobProbeSettings:
    """Settings of a job's probes: the watched tokens, the schedule, and the files of losses.

    Attributes:
        files: files of the probe sets, in the order of the flag.
        schedule_text: the probe schedule, from the flag or by default.
        loss_dtype: precision of the losses on disk.
        fall_threshold: nats; the share of tokens that fall by more is logged.
        takes_probe_at_exit: one more probe is taken when the job ends without an error.
        verifies_isolation: the training's state is hashed before and after each probe.
        stops_on_write_error: the job ends if losses cannot be written.
        records_samples: the losses of the training samples are recorded.
        is_replay: the job probes saved checkpoints.
        replayed_step: the step whose samples' losses a replay computes; None for none.
        saves_checkpoints: the job saves checkpoints.
    """

    files: tuple[Path, ...]
    schedule_text: str
    loss_dtype: Literal["float32", "float16"]
    fall_threshold: float
    takes_probe_at_exit: bool
    verifies_isolation: bool
    stops_on_write_error: bool
    records_samples: bool
    is_replay: bool
    replayed_step: int | None
    saves_checkpoints: bool

    @cached_property
    def probe_sets(self) -> tuple[ProbeSetFile, ...]:
        """The files of the probe sets, with their names.

        Raises:
            TokscaleError: two files have the same name.
        """
        stems = Counter(file.stem for file in self.files)
        stem, count = stems.most_common(1)[0]
        if count > 1:
            same = " and ".join(str(file) for file in self.files if file.stem == stem)
            raise TokscaleError(
                f"--tokscale-probe-set has {same}; expected files of different names, since a "
                "set's losses go to a folder of that name; rename one, or drop it"
            )
        first, *further = self.files
        return (ProbeSetFile(first, ""), *(ProbeSetFile(file, file.stem) for file in further))

    @cached_property
    def schedule(self) -> ProbeSchedule:
        """The steps after which a probe is due.

        Raises:
            TokscaleError: the schedule cannot be read, or needs checkpoints that are not saved.
        """
        schedule = ProbeSchedule.parse(self.schedule_text)
        if schedule.in_tokens and self.is_replay:
            raise TokscaleError(
                f"--tokscale-probe-schedule {schedule.spec} counts tokens, and --tokscale-replay "
                "chooses checkpoints by their steps; give a schedule in steps, or none for all of "
                "them"
            )
        if schedule.spec == "checkpoints" and not (self.is_replay or self.saves_checkpoints):
            raise TokscaleError(
                "--tokscale-probe-schedule checkpoints gives no probe, as the job saves none; give "
                "--save or another schedule"
            )
        return schedule


@dataclass(frozen=True, kw_only=True)
class JobPlanSettings:
    """Settings of a job's data plan.

    Attributes:
        path: file of the plan.
        scores_dir: folder of the document scores that the plan was made with; None: beside the
            data.
        overrides: the plan takes over from the one that the run has followed so far.
        steps_between_decisions: --tokscale-replan-interval, not checked; None where weights are not
            decided in the job.
    """

    path: Path
    scores_dir: Path | None
    overrides: bool
    steps_between_decisions: int | None

    @cached_property
    def replan_interval(self) -> int | None:
        """Optimizer steps between two decisions on the weights; None without decisions.

        Raises:
            TokscaleError: the interval is too short for a decision.
        """
        steps = self.steps_between_decisions
        if steps is not None and steps <= DECISION_STEPS:
            raise TokscaleError(
                f"--tokscale-replan-interval is {steps}; expected steps above {DECISION_STEPS}, "
                "which a decision takes; give more"
            )
        return steps


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The plugin's settings of one job.

    A value that may be refused is checked when it is first read. A job calls `check` once, so that
    a refusal comes before the model is built; the doctor reads each value, to find every refusal.

    Attributes:
        probe: None in a job without a probe set.
        plan: None in a job without a plan.
        replay: folder of the checkpoints to probe; None in a job that trains.
        run_dir: --tokscale-dir; None without it.
        data_cache: Megatron's --data-cache-path.
    """

    probe: JobProbeSettings | None
    plan: JobPlanSettings | None
    replay: Path | None
    run_dir: Path | None
    data_cache: Path | None

    @classmethod
    def from_args(cls, args: Namespace) -> Self:
        """Read the settings from Megatron's parsed arguments, validated by it or not.

        Raises:
            TokscaleError: see `config_from_args`.
        """
        config = config_from_args(args)
        replay, plan = config.tokscale_replay, config.tokscale_plan
        run_dir = config.tokscale_dir or replay or args.save
        scores_dir = config.tokscale_scores_dir
        return cls(
            probe=_probe_settings(config, args) if config.tokscale_probe_set else None,
            plan=JobPlanSettings(
                path=Path(plan),
                scores_dir=Path(scores_dir) if scores_dir else None,
                overrides=config.tokscale_override_plan,
                steps_between_decisions=config.tokscale_replan_interval,
            )
            if plan
            else None,
            replay=Path(replay) if replay else None,
            run_dir=Path(run_dir) if run_dir else None,
            data_cache=Path(args.data_cache_path) if args.data_cache_path else None,
        )

    @property
    def has_part(self) -> bool:
        """True if the flags request a probe or a plan."""
        return self.probe is not None or self.plan is not None

    @cached_property
    def run(self) -> Path:
        """The run directory: --tokscale-dir, or else the directory of the checkpoints.

        Raises:
            TokscaleError: neither is set, or it is in object storage.
        """
        if self.run_dir is None:
            raise TokscaleError("there is no place for the losses; give --tokscale-dir or --save")
        if is_in_storage(self.run_dir):
            raise TokscaleError(
                f"{self.run_dir} is in object storage, and the losses need a file system; give "
                "--tokscale-dir on one that all nodes share"
            )
        return self.run_dir

    @property
    def plan_cache(self) -> Path:
        """The folder of the plan's index files."""
        return self.data_cache or RunPaths(self.run).cache

    def check(self) -> None:
        """Read every value that may be refused.

        Raises:
            TokscaleError: see the properties.
        """
        if self.probe is not None:
            _ = self.probe.probe_sets, self.probe.schedule
        if self.plan is not None:
            _ = self.plan.replan_interval
        if self.has_part:
            _ = self.run


def _probe_settings(config: TokscaleConfig, args: Namespace) -> JobProbeSettings:
    assert config.tokscale_probe_set
    is_replay = config.tokscale_replay is not None
    default = "checkpoints" if is_replay else DEFAULT_SCHEDULE
    return JobProbeSettings(
        files=tuple(Path(file) for file in config.tokscale_probe_set),
        schedule_text=config.tokscale_probe_schedule or default,
        loss_dtype=config.tokscale_loss_dtype,
        fall_threshold=config.tokscale_fall_threshold,
        takes_probe_at_exit=config.tokscale_probe_at_exit,
        verifies_isolation=config.tokscale_verify_isolation and not is_replay,
        # A replay cannot continue without probes.
        stops_on_write_error=is_replay or config.tokscale_on_write_error == "abort",
        records_samples=config.tokscale_sample_losses,
        is_replay=is_replay,
        replayed_step=config.tokscale_replay_step,
        saves_checkpoints=bool(args.save),
    )

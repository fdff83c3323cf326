"""The --tokscale-* flags: one dataclass, whose field docstrings are the help."""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import DEFAULT_SCHEDULE, ProbeSchedule

_FOR_THE_PROBE = {
    "tokscale_probe_schedule",
    "tokscale_probe_at_exit",
    "tokscale_loss_dtype",
    "tokscale_fall_threshold",
    "tokscale_on_write_error",
    "tokscale_verify_isolation",
    "tokscale_replay",
    "tokscale_replan_interval",
}
_FOR_THE_PLAN = {"tokscale_scores_dir", "tokscale_override_plan", "tokscale_replan_interval"}
_NOT_IN_A_REPLAY = {"tokscale_plan", "tokscale_verify_isolation", "tokscale_probe_at_exit"}


@dataclass(frozen=True, kw_only=True)
class TokscaleConfig:
    """Watch the loss of single tokens while the model trains, and train under a data plan."""

    tokscale_probe_set: str | None = None
    """Probe set to watch, made by `megatron-tokscale probe build`. Turns the probe on."""

    tokscale_dir: str | None = None
    """Run directory: what is watched goes to DIR/tokscale. Default: the directory of --save, or of
    --tokscale-replay."""

    tokscale_probe_schedule: str | None = None
    """When to probe, 0 being before training: log:per-octave=P, linear:EVERY, list:AT,AT,... in
    steps, or, with the prefix tokens:, in consumed tokens; first, last, checkpoints; or several
    joined by '+'. Default: log:per-octave=8; all checkpoints for --tokscale-replay."""

    tokscale_probe_at_exit: bool = False
    """Take one more probe when the job ends in order: at its last step, at an exit interval or
    duration, or on a signal (with --exit-signal-handler), after the checkpoint is saved."""

    tokscale_loss_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the losses on disk; float16 halves the space and keeps 3 digits."""

    tokscale_fall_threshold: float = 0.2
    """Log the share of tokens whose loss has fallen by more nats than this since the last probe."""

    tokscale_on_write_error: Literal["continue", "abort"] = "continue"
    """What to do when losses cannot be written: continue the training without probes, or abort the
    job."""

    tokscale_verify_isolation: bool = False
    """Hash parameters, buffers, optimizer state and generators before and after every probe, and
    stop the job on a difference. Slow: for trying a new setting, not for a long run."""

    tokscale_replay: str | None = None
    """Train nothing: probe the checkpoints saved in this directory, in any parallel layout that can
    load them. For a run that was trained without the plugin."""

    tokscale_plan: str | None = None
    """Data plan to follow, made by `megatron-tokscale plan build`: what each training sample is
    drawn from. Needs --dataloader-type single."""

    tokscale_scores_dir: str | None = None
    """Folder of the document scores that the plan was made with. Default: beside the data."""

    tokscale_override_plan: bool = False
    """Let --tokscale-plan take over from the plan that the run has followed so far: its weights
    hold from the present sample on, and no sample is lost or repeated."""

    tokscale_replan_interval: int | None = None
    """Decide the datasets' weights anew at the first probe at or after every so many steps, from
    the losses so far; the plan's weights hold until then, and those within datasets stay."""

    tokscale_cpu: bool = False
    """Run Megatron on the CPU with gloo, on a machine without a GPU."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(TokscaleConfig).build_group(parser, title="tokscale")


def config_from_args(args: Namespace) -> TokscaleConfig:
    """Read the flags back from Megatron's parsed arguments.

    Raises:
        TokscaleError: a flag is given that does nothing without another one, or beside one; its
            value is empty or out of range; or the flags are not among the arguments: Megatron drops
            the command line for --yaml-cfg.
    """
    if not hasattr(args, "tokscale_probe_set"):
        raise TokscaleError("--yaml-cfg makes Megatron ignore the --tokscale flags; drop either")
    config = TokscaleConfig(
        **{field.name: getattr(args, field.name) for field in fields(TokscaleConfig)}
    )
    _check_values(config)
    for needed, names in (("probe_set", _FOR_THE_PROBE), ("plan", _FOR_THE_PLAN)):
        if getattr(config, f"tokscale_{needed}") is None:
            for field in fields(TokscaleConfig):
                if field.name in names and getattr(config, field.name) != field.default:
                    flag, other = (f"--{word.replace('_', '-')}" for word in (field.name, needed))
                    raise TokscaleError(
                        f"{flag} does nothing without --tokscale-{other[2:]}; give both"
                    )
    if config.tokscale_dir and not (config.tokscale_probe_set or config.tokscale_plan):
        raise TokscaleError(
            "--tokscale-dir does nothing without --tokscale-probe-set or --tokscale-plan; give one"
        )
    if config.tokscale_replay:
        for field in fields(TokscaleConfig):
            if field.name in _NOT_IN_A_REPLAY and getattr(config, field.name) != field.default:
                raise TokscaleError(f"--tokscale-replay trains nothing; drop {_flag(field.name)}")
    return config


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_values(config: TokscaleConfig) -> None:
    for field in fields(TokscaleConfig):
        if getattr(config, field.name) == "":
            raise TokscaleError(
                f"{_flag(field.name)} is empty; expected a value; give one, or drop the flag"
            )
    if not 0 <= config.tokscale_fall_threshold < math.inf:
        raise TokscaleError(
            f"--tokscale-fall-threshold is {config.tokscale_fall_threshold:g}; expected nats, 0 or "
            "more; give a number such as 0.2"
        )


def schedule_of(config: TokscaleConfig, args: Namespace) -> ProbeSchedule:
    """Return when the job probes.

    Raises:
        TokscaleError: the schedule cannot be read, or is of checkpoints that are not saved.
    """
    default = "checkpoints" if config.tokscale_replay else DEFAULT_SCHEDULE
    schedule = ProbeSchedule.parse(config.tokscale_probe_schedule or default)
    if schedule.in_tokens and config.tokscale_replay:
        raise TokscaleError(
            f"--tokscale-probe-schedule {schedule.spec} counts tokens, and --tokscale-replay "
            "chooses checkpoints by their steps; give a schedule in steps, or none for all of them"
        )
    if schedule.spec == "checkpoints" and not (config.tokscale_replay or args.save):
        raise TokscaleError(
            "--tokscale-probe-schedule checkpoints gives no probe, as the job saves none; give "
            "--save or another schedule"
        )
    return schedule


def run_directory(config: TokscaleConfig, args: Namespace) -> Path:
    """The run directory: --tokscale-dir, or else where the checkpoints are.

    Raises:
        TokscaleError: neither is given.
    """
    folder = config.tokscale_dir or config.tokscale_replay or args.save
    if folder is None:
        raise TokscaleError("there is no place for the losses; give --tokscale-dir or --save")
    return Path(folder)

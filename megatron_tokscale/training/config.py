"""The --tokscale-* flags: one dataclass, whose field docstrings are the help."""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import Field, dataclass, field, fields
from typing import Any, Final, Literal

from megatron_tokscale.core.errors import TokscaleError

# Metadata of the fields below, checked by `config_from_args`:
#   "needs"           flags without which this one does nothing
#   "needs_one_of"    flags of which one must be given
#   "not_in_a_replay" True: the flag is for a job that trains
_PROBE: Final = {"needs": ("probe_set",)}
_PLAN: Final = {"needs": ("plan",)}
_NOT_IN_A_REPLAY: Final = {"not_in_a_replay": True}


@dataclass(frozen=True, kw_only=True)
class TokscaleConfig:
    """Watch the loss of single tokens while the model trains, and train under a data plan."""

    tokscale_probe_set: list[str] | None = None
    """Probe set to watch, made by `megatron-tokscale probe build`. Turns the probe on. The losses
    of each further file go to a run directory of its own, DIR/probe-sets/NAME for NAME.safetensors.
    """

    tokscale_dir: str | None = field(default=None, metadata={"needs_one_of": ("probe_set", "plan")})
    """Run directory: the losses and the plan of the run are kept in DIR/tokscale. Default: the
    directory of --save, or of --tokscale-replay."""

    tokscale_probe_schedule: str | None = field(default=None, metadata=_PROBE)
    """When to probe, 0 being before training: log:per-octave=P, linear:EVERY, list:AT,AT,... in
    steps, or, with the prefix tokens:, in consumed tokens; first, last, checkpoints; or several
    joined by '+'. Default: log:per-octave=8; all checkpoints for --tokscale-replay."""

    tokscale_probe_at_exit: bool = field(default=False, metadata=_PROBE | _NOT_IN_A_REPLAY)
    """Take one more probe when the job ends without an error: at its last step, at an exit interval
    or duration, or on a signal (with --exit-signal-handler), after the checkpoint is saved."""

    tokscale_loss_dtype: Literal["float32", "float16"] = field(default="float32", metadata=_PROBE)
    """Precision of the losses on disk; float16 halves the space and keeps 3 digits."""

    tokscale_fall_threshold: float = field(default=0.2, metadata=_PROBE)
    """Log the share of tokens whose loss has fallen by more nats than this since the last probe."""

    tokscale_on_write_error: Literal["continue", "abort"] = field(
        default="continue", metadata=_PROBE
    )
    """Continue the training without probes, or abort the job, when losses cannot be written."""

    tokscale_verify_isolation: bool = field(default=False, metadata=_PROBE | _NOT_IN_A_REPLAY)
    """Hash parameters, buffers, optimizer state and generators before and after every probe, and
    stop the job on a difference. Slow: for trying a new setting, not for a long run."""

    tokscale_sample_losses: bool = field(default=False, metadata=_PROBE | _NOT_IN_A_REPLAY)
    """Record each training sample's mean and largest token loss, from the losses of the training
    itself, for `megatron-tokscale trace --spikes`: 32 bytes a sample, in DIR/tokscale/samples.
    Needs --dataloader-type single."""

    tokscale_replay: str | None = field(default=None, metadata=_PROBE)
    """Train nothing: probe the checkpoints saved in this directory, in any parallel layout that can
    load them. For a run that was trained without the plugin."""

    tokscale_replay_step: int | None = field(default=None, metadata={"needs": ("replay",)})
    """Compute the losses of the training samples of this step too, under the last checkpoint of
    --tokscale-replay before it, for a run without --tokscale-sample-losses."""

    tokscale_plan: str | None = field(default=None, metadata=_NOT_IN_A_REPLAY)
    """Data plan to follow, made by `megatron-tokscale plan build`: it says from which part of the
    data each training sample is drawn. Needs --dataloader-type single."""

    tokscale_scores_dir: str | None = field(default=None, metadata=_PLAN)
    """Folder of the document scores that the plan was made with. Default: beside the data."""

    tokscale_override_plan: bool = field(default=False, metadata=_PLAN)
    """Let --tokscale-plan take over from the plan that the run has followed so far: its weights
    hold from the present sample on, and no sample is lost or repeated."""

    tokscale_replan_interval: int | None = field(
        default=None, metadata={"needs": ("probe_set", "plan")}
    )
    """Decide the datasets' weights anew at the first probe at or after every so many steps, from
    the losses so far; the plan's weights hold until then. Weights of strata of documents too, if a
    further probe set watches the documents that the plan keeps out."""

    tokscale_cpu: bool = False
    """Run Megatron on the CPU with gloo, on a machine without a GPU."""

    def __post_init__(self) -> None:
        # A callback's user may give one file as a string.
        if isinstance(self.tokscale_probe_set, str):
            object.__setattr__(self, "tokscale_probe_set", [self.tokscale_probe_set])


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags to Megatron's parser, as a group of their own."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(TokscaleConfig).build_group(parser, title="tokscale")


def config_from_args(args: Namespace) -> TokscaleConfig:
    """Read the flags back from Megatron's parsed arguments.

    Raises:
        TokscaleError: a flag has no effect without another flag, or beside one; a value is empty or
            out of range; or the flags are not among the arguments, since Megatron drops the command
            line for --yaml-cfg.
    """
    if not hasattr(args, "tokscale_probe_set"):
        raise TokscaleError(
            "--yaml-cfg is given, for which Megatron ignores the --tokscale flags; expected one of "
            "both; drop either"
        )
    config = TokscaleConfig(
        **{each.name: getattr(args, each.name) for each in fields(TokscaleConfig)}
    )
    _check_values(config)
    given = [each for each in fields(config) if getattr(config, each.name) != each.default]
    for each in given:
        _check_needs(config, each)
    for each in given:
        if config.tokscale_replay and each.metadata.get("not_in_a_replay"):
            raise TokscaleError(f"--tokscale-replay trains nothing; drop {flag_of(each.name)}")
    return config


def flag_of(name: str) -> str:
    """Return the flag of a field of `TokscaleConfig`."""
    return f"--{name.replace('_', '-')}"


def _check_needs(config: TokscaleConfig, given: Field[Any]) -> None:
    """Refuse a flag that has no effect without flags that are not set."""
    flag = flag_of(given.name)
    for needed in given.metadata.get("needs", ()):
        if getattr(config, f"tokscale_{needed}") is None:
            other = flag_of(f"tokscale_{needed}")
            raise TokscaleError(f"{flag} does nothing without {other}; give both")
    choices = given.metadata.get("needs_one_of", ())
    if choices and not any(getattr(config, f"tokscale_{name}") for name in choices):
        others = " or ".join(flag_of(f"tokscale_{name}") for name in choices)
        raise TokscaleError(f"{flag} does nothing without {others}; give one")


def _check_values(config: TokscaleConfig) -> None:
    for each in fields(TokscaleConfig):
        value = getattr(config, each.name)
        if value == "" or (isinstance(value, list) and "" in value):
            raise TokscaleError(
                f"{flag_of(each.name)} is empty; expected a value; give one, or drop the flag"
            )
    if config.tokscale_replay_step is not None and config.tokscale_replay_step < 1:
        raise TokscaleError(
            f"--tokscale-replay-step is {config.tokscale_replay_step}; expected the number of an "
            "optimizer step, the first one being 1; give 1 or more"
        )
    if not 0 <= config.tokscale_fall_threshold < math.inf:
        raise TokscaleError(
            f"--tokscale-fall-threshold is {config.tokscale_fall_threshold:g}; expected nats, 0 or "
            "more; give a number such as 0.2"
        )

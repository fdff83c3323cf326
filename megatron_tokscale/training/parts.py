"""The parts of a job that its flags request, in the order in which they act."""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tokscale.training.events import JobPart
from megatron_tokscale.training.settings import JobSettings
from megatron_tokscale.training.support import SKIP_TRAIN, group_refusals, raise_first

if TYPE_CHECKING:
    from megatron_tokscale.training.replay import Load


def parts_of_job(
    args: Namespace, given: Sequence[str] = (), load: "Load | None" = None
) -> list[JobPart]:
    """Check the flags and the files that they name, and make the parts of the job.

    Megatron is initialised. No rank communicates.

    Args:
        args: Megatron's arguments.
        given: names of the arguments that the training script gives to `pretrain`.
        load: loads a checkpoint for a replay; None: as Megatron does.

    Raises:
        TokscaleError: a flag is refused, or a file does not fit the job.
    """
    settings = JobSettings.from_args(args)
    if args.skip_train and not settings.replay:
        if settings.has_part:
            from megatron.training import print_rank_0

            print_rank_0(f"tokscale: {SKIP_TRAIN}")
        return []
    settings.check()
    if settings.probe:
        raise_first(group_refusals(given))
    return _parts(settings, args, load) if settings.has_part else []


def _parts(settings: JobSettings, args: Namespace, load: "Load | None") -> list[JobPart]:
    from megatron_tokscale.training.data.follower import Follower
    from megatron_tokscale.training.data.held_out import HeldOutNote
    from megatron_tokscale.training.data.plan_monitor import PlanMonitor
    from megatron_tokscale.training.data.records import BlendRecorder
    from megatron_tokscale.training.data.replan import Replanner
    from megatron_tokscale.training.probe.prober import Prober
    from megatron_tokscale.training.replay import Replay
    from megatron_tokscale.training.samples.recorder import SampleRecorder
    from megatron_tokscale.training.samples.replayed import ReplayedStep

    parts: list[JobPart] = []
    prober = follower = None
    interval = settings.plan.replan_interval if settings.plan else None
    if settings.probe:
        prober = Prober(settings.probe, settings.run, args)
        parts.append(prober)
    if settings.plan:
        follower = Follower(settings.plan, settings, args)
        parts.append(follower)
    elif prober:
        parts.append(BlendRecorder(settings.run, prober))
    if prober:  # behind the follower, whose dataset leaves out what its plan keeps out
        named = {each.name: each.probe_set for each in prober.sets}
        parts.append(HeldOutNote(named, replans=interval is not None))
    if prober and settings.probe and settings.probe.records_samples:
        stops = settings.probe.stops_on_write_error
        parts.append(SampleRecorder(prober, args, stops_on_error=stops))
    if follower and prober and interval:
        parts.append(Replanner(interval, settings.run, follower, prober, args))
    if follower:
        parts.append(PlanMonitor(follower, args))
    if prober and settings.probe and settings.replay:
        step = settings.probe.replayed_step
        replayed = None if step is None else ReplayedStep(step, settings.run, prober, args)
        parts.append(Replay(settings.replay, settings.probe.schedule, prober, args, load, replayed))
    return parts

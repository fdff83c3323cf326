"""The steps after which a probe is due, counted from the last probe of the run."""

from argparse import Namespace

from megatron_tokscale.probe import JobPoint
from megatron_tokscale.training.settings import JobProbeSettings


class DueProbes:
    """Rule for due probes: a probe is due if a point of the schedule lies after the last call.

    Between two calls a job can skip steps or resume; a probe missed there is due at the next call.

    Attributes:
        step: step up to which the job has its probes; -1 before training.
    """

    def __init__(self, settings: JobProbeSettings, args: Namespace) -> None:
        self._schedule = settings.schedule
        self._takes_probe_at_exit = settings.takes_probe_at_exit
        self._args = args
        self.step = -1

    def is_due(self, step: int, tokens: int, tokens_before: int, *, is_checkpoint: bool) -> bool:
        """Return whether a probe is due after `step`, since the last call.

        Args:
            step: optimizer steps completed.
            tokens: training tokens consumed; 0 if unknown.
            tokens_before: tokens consumed at the last call.
            is_checkpoint: a checkpoint is saved at this step.
        """
        is_last = step >= self._args.train_iters
        point = JobPoint(
            step=step,
            step_before=self.step,
            tokens=tokens,
            tokens_before=tokens_before,
            is_last=is_last,
            is_checkpoint=is_checkpoint,
        )
        at_exit = is_last and self._takes_probe_at_exit
        return at_exit or self._schedule.is_due(point)

    def was_due_by(self, step: int, tokens: int) -> bool:
        """Return whether a probe was due at `step` or before it, in a run without any probe."""
        return self._schedule.is_due(JobPoint(step=step, step_before=-1, tokens=tokens))

    def saves_at(self, step: int) -> bool:
        """Return whether Megatron saves a checkpoint after `step` by its intervals."""
        args = self._args
        intervals = args.save_interval, getattr(args, "non_persistent_save_interval", None)
        is_regular = any(interval and step % interval == 0 for interval in intervals)
        return bool(args.save) and (is_regular or step >= args.train_iters)

    def saves_at_end(self, step: int) -> bool:
        """Return whether Megatron saves a checkpoint at `step` after its loop."""
        interval = self._args.save_interval
        return bool(self._args.save and interval and step % interval)

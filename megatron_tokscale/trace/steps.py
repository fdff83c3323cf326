"""From a step of a run to the samples that it consumed.

run.json holds each launch with the samples consumed by its start, and each losses file those
consumed by its probe step. Between two such counts the settings of the launch give the samples of
every step, as Megatron's num_microbatches_calculator.py counts them, ramp-up included. A step whose
samples the settings do not determine is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Identity, Launch, RunPaths
from megatron_tokscale.store.losses import list_losses, read_record


class Count(NamedTuple):
    """Samples that a run has consumed by a step."""

    step: int
    samples: int


@dataclass(frozen=True)
class Steps:
    """The samples of each step of a run. Make one with `Steps.open`.

    Attributes:
        path: the run directory.
        launches: launches of the run, ascending.
        losses: the losses file of each probe step.
    """

    path: Path
    launches: Sequence[Launch]
    losses: dict[int, Path]

    @classmethod
    def open(cls, run: Path | str) -> Self:
        """Return the steps of a run that was trained with the plugin.

        Raises:
            TokscaleError: the run has no record of its launches, or the record is damaged.
        """
        paths = RunPaths(Path(run))
        path = paths.identity
        launches = Identity.load(path).launches if path.is_file() else ()
        if not launches:
            raise TokscaleError(
                f"{path} has no record of a launch, so the samples of a step are not known; "
                "expected a run that was trained with the plugin; trace it by --sample"
            )
        return cls(Path(run), launches, list_losses(paths.losses))

    def samples(self, step: int) -> range:
        """Return the samples that a step consumed, or will consume before the planned end.

        Args:
            step: number of the optimizer step, from 1.

        Raises:
            TokscaleError: the run has no such step, or its samples are not known.
        """
        if step < 1:
            raise TokscaleError(f"step {step} takes no samples; expected step 1 or later")
        before = [launch for launch in self.launches if launch.step < step]
        if not before:
            raise TokscaleError(
                f"the samples of step {step} are not known: the first launch on record starts at "
                f"step {self.launches[0].step}; give a later step"
            )
        launch = before[-1]
        counts = self._counts(launch, step)
        last = next(count for count in reversed(counts) if count.step < step)
        start = _consumed(launch, last, step - 1)
        stop = start + launch.batch.size(start, launch.seq_length)
        self._check_end(launch, step, start)
        following = next((count for count in counts if count.step >= step), None)
        if following and _consumed(launch, Count(step, stop), following.step) != following.samples:
            raise TokscaleError(
                f"the samples of step {step} are not known: the run consumed "
                f"{following.samples - last.samples} samples in steps {last.step + 1} to "
                f"{following.step}, and the batch sizes of the launch at step {launch.step} give "
                f"another number; give --sample {last.samples} to {following.samples - 1}"
            )
        return range(start, stop)

    def _counts(self, launch: Launch, step: int) -> list[Count]:
        """Return the known counts of a launch next to a step, ascending; its start is the first."""
        later = [other for other in self.launches if other.step > launch.step]
        end = later[0].step if later else None
        own = [at for at in self.losses if launch.step < at and (end is None or at <= end)]
        near = [at for at in own if at < step][-1:] + [at for at in own if at >= step][:1]
        counts = [Count(launch.step, launch.consumed_samples)]
        counts += [Count(at, read_record(self.losses[at])[0].consumed_samples) for at in near]
        if later:
            counts.append(Count(later[0].step, later[0].consumed_samples))
        return counts

    def _check_end(self, launch: Launch, step: int, start: int) -> None:
        """Refuse a step behind the planned end of its launch."""
        batch = launch.batch
        is_over = start >= batch.train_samples if batch.train_samples else False
        if is_over or (batch.train_iters is not None and step > batch.train_iters):
            end = f"step {batch.train_iters}"
            if batch.train_samples:
                end = f"sample {batch.train_samples}"
            raise TokscaleError(
                f"step {step} is not in the run: its training ends with {end}; give an earlier step"
            )


def _consumed(launch: Launch, count: Count, step: int) -> int:
    """Return the samples consumed by `step`, counted on from an earlier count of the launch."""
    samples = count.samples
    if launch.batch.is_constant:
        return samples + (step - count.step) * launch.batch.size(samples, launch.seq_length)
    for _ in range(step - count.step):
        samples += launch.batch.size(samples, launch.seq_length)
    return samples


def read_steps(word: str) -> range:
    """Return the steps that a word names: N, or A-B with both ends.

    Raises:
        TokscaleError: the word is neither.
    """
    first, dash, last = word.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise TokscaleError(
            f"--step {word} is no step; give N, or a range A-B, e.g. 120 or 120-125"
        )
    steps = range(int(first), int(last if dash else first) + 1)
    if not steps:
        raise TokscaleError(f"--step {word} names no step; give a range A-B with A up to B")
    return steps

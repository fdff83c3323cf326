"""The past of a run at a step: steps, samples and tokens, summed learning rate, launches.

A checkpoint of a job with the plugin holds its past in a note; of other checkpoints the past is
reckoned (`reckon.py`), or unknown. The flags of the job that resumes are never used.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Final, Self

from megatron_tokscale.core.records import JSON, from_json, to_json
from megatron_tokscale.store import Launch

NOTE: Final = "tokscale_history"
"""Attribute of Megatron's args under which a checkpoint holds the plugin's note."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """Counts of a run up to a step.

    Attributes:
        step: optimizer steps completed.
        samples: training samples consumed.
        tokens: training tokens consumed; None if unknown.
        tokens_before: training tokens consumed before the last step; None if unknown.
        lr_sum: sum of the learning rates of the steps taken; None if unknown.
        scheduler_samples: count of the learning rate's scheduler; None if unknown.
        launches: the launches that took the steps, ascending; empty if unknown.
        source: where the counts come from, in words.
    """

    step: int
    samples: int
    tokens: int | None = None
    tokens_before: int | None = None
    lr_sum: float | None = None
    scheduler_samples: int | None = None
    launches: tuple[Launch, ...] = ()
    source: str = "unknown"

    def to_json(self) -> JSON:
        """Return the counts and launches as plain values."""
        return to_json(self)

    @classmethod
    def from_json(cls, content: JSON) -> Self:
        """Read counts and launches from plain values.

        Raises:
            ValueError: they are not of this form, or the launches do not ascend.
        """
        past = from_json(cls, content, "past")
        steps = [launch.step for launch in past.launches]
        if steps != sorted(set(steps)) or min(steps, default=0) < 0:
            raise ValueError(f"past.launches start at steps {steps}; expected ascending steps")
        return past


def beginning(samples: int) -> Past:
    """Return the past of a run that has taken no step."""
    return Past(
        step=0,
        samples=samples,
        tokens=0,
        tokens_before=-1,
        lr_sum=0.0,
        scheduler_samples=0,
        source="the run's first job",
    )


def write_note(args: Namespace, past: Past) -> None:
    """Put the past on Megatron's arguments, which it saves in the next checkpoint."""
    setattr(args, NOTE, past.to_json())


def read_note(args: Namespace, step: int, samples: int) -> Past | None:
    """Return the past in a checkpoint's note; None without a note for that step and sample.

    Args:
        args: the arguments that the checkpoint holds.
        step: optimizer steps completed at the checkpoint.
        samples: training samples consumed by then.
    """
    try:
        past = Past.from_json(getattr(args, NOTE, None))
    except ValueError:
        return None
    if (past.step, past.samples) != (step, samples):
        return None
    # A launch that starts at this step has taken no step yet.
    launches = tuple(launch for launch in past.launches if launch.step < step)
    return replace(past, launches=launches, source="the checkpoint")

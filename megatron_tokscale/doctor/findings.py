"""Findings of the doctor, and the functions that add to them."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from megatron_tokscale.core.errors import TokscaleError

# Arguments that --use-checkpoint-args takes from the checkpoint even where the command line gives
# them.
OF_THE_CHECKPOINT: Final = ("position_embedding_type", "num_experts")


@dataclass
class Findings:
    """Findings on a job's flags, a line each.

    Attributes:
        refused: reasons for which the job would be refused.
        warned: warnings that the job would print.
        passed: checks that have passed.
        unchecked: checks that only the job itself can make.
    """

    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def attempt[Result](self, read: Callable[[], Result]) -> Result | None:
        """Return the result of `read`; if it is refused, note the reason and return None."""
        try:
            return read()
        except (TokscaleError, OSError) as error:
            self.refused.append(" ".join(str(error).split()))
            return None


def error_of(read: Callable[[], object]) -> str | None:
    """Return the message with which `read` is refused; None if it is not."""
    try:
        read()
    except TokscaleError as error:
        return str(error)
    return None


def takes_arguments(args: Namespace) -> bool:
    """Return True if the job takes arguments from its checkpoint."""
    return bool(getattr(args, "use_checkpoint_args", False))


def known_arguments(args: Namespace, findings: Findings) -> Namespace:
    """Return the arguments without those that come from the checkpoint, which are not checked."""
    if not takes_arguments(args):
        return args
    known = Namespace(**vars(args))
    for name in OF_THE_CHECKPOINT:
        if getattr(args, name, None) is not None:
            setattr(known, name, None)
    brought = "the arguments that --use-checkpoint-args takes from the checkpoint"
    if brought not in findings.unchecked:
        findings.unchecked.append(brought)
    return known

"""The content of a checkpoint besides its weights."""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch

from megatron_tokscale.training.history.past import NOTE

NOTE_FILE: Final = "tokscale_history.json"
"""File of the plugin's note in a checkpoint's folder, for a loop that saves no arguments."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """Content of a checkpoint besides its weights.

    Attributes:
        step: optimizer steps completed.
        args: Megatron's arguments in the job that saved it.
        scheduler: state of the learning rate's scheduler; None if it holds none.
    """

    step: int
    args: Namespace
    scheduler: Mapping[str, Any] | None

    @classmethod
    def from_state_dict(cls, state: object) -> Self | None:
        """Return the content of a checkpoint's state; None if it is not of a trained model."""
        if not isinstance(state, Mapping) or not isinstance(state.get("args"), Namespace):
            return None
        if not isinstance(state.get("iteration"), int):
            return None
        scheduler = state.get("opt_param_scheduler")
        known = scheduler if isinstance(scheduler, Mapping) else None
        return cls(state["iteration"], state["args"], known)

    @property
    def samples(self) -> int:
        """Training samples consumed."""
        return int(getattr(self.args, "consumed_train_samples", 0))

    @property
    def skipped(self) -> int:
        """Samples of the steps that --iterations-to-skip has left out."""
        return int(getattr(self.args, "skipped_train_samples", 0) or 0)


def read_checkpoint(folder: Path, step: int) -> SavedCheckpoint | None:
    """Return the content of the checkpoint of `step` in a --save directory, without its weights.

    None if its format cannot be read without the weights, or if it is damaged: loading it reports
    that.
    """
    from megatron.core import dist_checkpointing

    path = folder / f"iter_{step:07d}"
    if note := _read_note_file(path):
        return note
    try:
        if dist_checkpointing.check_is_distributed_checkpoint(str(path)):
            state = dist_checkpointing.load_common_state_dict(str(path))
        else:
            file = min(path.glob("mp_rank_*/model_optim_rng.pt"))
            state = torch.load(file, map_location="cpu", mmap=True)
    except KeyboardInterrupt:
        raise
    except BaseException:  # for a damaged file: torch's CheckpointException is no Exception
        return None
    saved = SavedCheckpoint.from_state_dict(state)
    return saved if saved and saved.step == step else None


def _read_note_file(folder: Path) -> SavedCheckpoint | None:
    """Return the content of the note beside a checkpoint; None if there is none to be read."""
    try:
        note = json.loads((folder / NOTE_FILE).read_text(encoding="utf-8"))
        args = Namespace(consumed_train_samples=int(note["samples"]), **{NOTE: note})
        return SavedCheckpoint(int(note["step"]), args, None)
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""run.json: the identity of a run, and the launches that trained it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, cast

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    check_seal,
    read_json,
    sealed,
    write_json,
)
from megatron_tokscale.core.records import JSON, read_as, to_json
from megatron_tokscale.core.schemas import RUN_SCHEMA
from megatron_tokscale.store.imported import Imported
from megatron_tokscale.store.launches import Launch, check_starts

OLDEST_READ: Final = 2
"""Oldest schema of run.json that is read: since then, runs can be imported."""
_ENVELOPE = {"schema_version", "checksum"}  # keys of run.json that are about the file
_REMEDY = (
    "probe into another --tokscale-dir, or read its losses into a new run with `megatron-tokscale "
    "import RUN --out NEW`"
)


@dataclass(frozen=True)
class Identity:
    """The content of run.json.

    Attributes:
        run_id: drawn at random when the run starts.
        probe_fingerprint: fingerprint of its probe set.
        model: sizes of the model that stay the same when a run is resumed, by Megatron's argument.
        size: parameters, non-embedding parameters and FLOPs per token; empty if unknown.
        is_replay: true if the losses are of saved checkpoints, probed after the training.
        launches: settings of each job, ascending by the step at which it starts.
        imported: source and axis of losses that were imported; None for a run of a job.

    Raises:
        ValueError: on construction, if the launches do not ascend.
    """

    run_id: str
    probe_fingerprint: str
    model: Mapping[str, int | None] = field(default_factory=dict)
    size: Mapping[str, int] = field(default_factory=dict)
    is_replay: bool = False
    launches: tuple[Launch, ...] = ()
    imported: Imported | None = None

    def __post_init__(self) -> None:
        check_starts(self.launches)

    def save(self, path: Path) -> None:
        """Write run.json, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        content = cast("dict[str, JSON]", to_json(self))
        write_json(path, sealed({"schema_version": RUN_SCHEMA, **content}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read run.json.

        Raises:
            TokscaleError: the file is of another schema, or damaged.
        """
        content = read_json(path)
        version = content.get("schema_version")
        if type(version) is not int:
            raise TokscaleError(
                f"{path} is damaged: schema_version is {version!r}; expected a whole number; "
                "restore it"
            )
        check_schema(path, version, RUN_SCHEMA, _REMEDY if version < OLDEST_READ else None)
        rest = {name: value for name, value in content.items() if name not in _ENVELOPE}
        identity = read_as(cls, rest, path, "restore it")
        check_seal(path, content)
        return identity


def merged(known: Sequence[Launch], found: Sequence[Launch]) -> tuple[Launch, ...]:
    """Return a replayed run's launches: the known launches, and new ones that start at other steps.

    A known launch that is not found again is kept: its checkpoints may have been deleted.
    """
    starts = {launch.step for launch in known}
    new = [launch for launch in found if launch.step not in starts]
    return tuple(sorted([*known, *new], key=lambda launch: launch.step))

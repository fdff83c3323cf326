"""run.json: what a run is, and the launches that trained it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, check_seal, read_json, sealed, write_json
from megatron_tokscale.core.schemas import RUN_SCHEMA
from megatron_tokscale.store.launches import Launch, read_launches


@dataclass(frozen=True)
class Identity:
    """The content of run.json.

    Attributes:
        run_id: drawn at random when the run starts.
        probe_fingerprint: of its probe set.
        model: sizes of the model that stay the same when a run is resumed.
        size: number of parameters and operations per token; empty if unknown.
        is_replay: the losses are of saved checkpoints, probed afterwards.
        launches: settings of each job, ascending by the step at which it starts.
    """

    run_id: str
    probe_fingerprint: str
    model: Mapping[str, Any] = field(default_factory=dict)
    size: Mapping[str, Any] = field(default_factory=dict)
    is_replay: bool = False
    launches: tuple[Launch, ...] = ()

    def save(self, path: Path) -> None:
        """Write run.json, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        launches = [launch.to_json() for launch in self.launches]
        content = {"schema_version": RUN_SCHEMA, **vars(self), "launches": launches}
        write_json(path, sealed(content))

    @staticmethod
    def load(path: Path) -> "Identity":
        """Read run.json.

        Raises:
            TokscaleError: it is of another schema, or damaged.
        """
        content = read_json(path)
        try:
            version = content["schema_version"]
            if type(version) is not int:
                raise ValueError(f"schema_version is {version!r}")
            check_schema(path, version, RUN_SCHEMA)
            if version < RUN_SCHEMA:
                raise TokscaleError(
                    f"{path} is of schema version {version}, expected {RUN_SCHEMA}: an older "
                    "megatron-tokscale wrote it, which noted the settings of a run's first job "
                    "only; probe into another --tokscale-dir, or replay the run's checkpoints "
                    "there (its losses files stay readable with store.losses.read_losses)"
                )
            identity = Identity(
                run_id=_typed(content, "run_id", str),
                probe_fingerprint=_typed(content, "probe_fingerprint", str),
                model=_typed(content, "model", dict),
                size=_typed(content, "size", dict),
                is_replay=_typed(content, "is_replay", bool),
                launches=read_launches(content["launches"]),
            )
        except KeyError as error:
            raise TokscaleError(
                f"{path} is damaged: it has no {error.args[0]}; restore it"
            ) from error
        except ValueError as error:
            raise TokscaleError(f"{path} is damaged: {error}; restore it") from error
        check_seal(path, content)
        return identity


def _typed(content: Mapping[str, Any], name: str, kind: type) -> Any:
    value = content[name]
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}")
    return value


def merged(known: Sequence[Launch], found: Sequence[Launch]) -> tuple[Launch, ...]:
    """Return a replayed run's launches: those known, and those found to start at other steps.

    What is known stays: earlier checkpoints may be gone since.
    """
    starts = {launch.step for launch in known}
    new = [launch for launch in found if launch.step not in starts]
    return tuple(sorted([*known, *new], key=lambda launch: launch.step))

"""Safetensors files of named arrays whose metadata hold the kind of file and its schema."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tokscale.core.arrays import AnyArray
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, schema_version, why_unreadable


def text_crc32(text: str) -> str:
    """Return the CRC-32 of a text, in hexadecimal."""
    return f"{zlib.crc32(text.encode()):08x}"


@dataclass(frozen=True)
class TensorFile:
    """A kind of safetensors file: its mark in the metadata, and its name in messages.

    Attributes:
        kind: the mark of this kind in a file's metadata.
        schema_version: the only schema version that is read.
        what: name of such a file in a message, e.g. "probe set".
        verb: the command that makes such a file.
    """

    kind: str
    schema_version: int
    what: str
    verb: str

    def metadata(self, fingerprint: str, *, details: str, **values: str) -> dict[str, str]:
        """Return the metadata of a file of this kind; the fingerprint does not cover `details`."""
        version = str(self.schema_version)
        return {
            "kind": self.kind,
            "schema_version": version,
            "fingerprint": fingerprint,
            "details": details,
            "details_crc32": text_crc32(details),
            **values,
        }

    def check_details(self, metadata: Mapping[str, str], *names: str) -> None:
        """Check the details of a file against their checksum; details without one are accepted.

        Args:
            metadata: the file's metadata.
            names: names of the values in it that other kinds of files do not have.

        Raises:
            ValueError: the checksum is wrong, or a value has a name that is never written.
        """
        known = {*self.metadata("", details=""), *names}
        if unknown := metadata.keys() - known:  # perhaps the checksum's own name, damaged
            raise ValueError(f"it has a value named {min(unknown)!r}")
        found = text_crc32(metadata["details"])
        if metadata.get("details_crc32", found) != found:
            raise ValueError("the checksum of its details is wrong")

    def read(
        self, path: Path, names: Sequence[str], optional: Sequence[str] = ()
    ) -> tuple[dict[str, AnyArray], dict[str, str]]:
        """Return the arrays of these names, and the metadata.

        Args:
            path: the file.
            names: arrays that the file must have.
            optional: arrays that are read if the file has them.

        Raises:
            TokscaleError: the file is missing or damaged, of another schema or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        if path.is_dir():  # for which safetensors says "No such device"
            raise TokscaleError(f"cannot read {self.what} {path}: it is a directory; name a file")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("kind") != self.kind:
                    raise TokscaleError(f"{path} is not a {self.what}; make one with `{self.verb}`")
                found, again = schema_version(path, metadata), f"make it again with `{self.verb}`"
                check_schema(path, found, self.schema_version, again)
                every = set(file.keys())
                present = [name for name in optional if name in every]
                return {name: file.get_tensor(name) for name in (*names, *present)}, metadata
        except OSError as error:
            raise TokscaleError(
                f"cannot read {self.what} {path}: {why_unreadable(path, error)}"
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TokscaleError(
                f"{self.what} {path} is damaged ({error}); make it again"
            ) from error

"""Named arrays in a safetensors file that says what it holds."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, schema_version


def text_crc32(text: str) -> str:
    """Return the CRC-32 of a text, in hexadecimal."""
    return f"{zlib.crc32(text.encode()):08x}"


@dataclass(frozen=True)
class TensorFile:
    """A kind of file: how it is told from others, and what to say of one that is not it.

    Attributes:
        kind: in the file's metadata.
        schema_version: the newest that can be read.
        what: its name in a message, e.g. "probe set".
        verb: the command that makes one.
    """

    kind: str
    schema_version: int
    what: str
    verb: str

    def metadata(self, fingerprint: str, *, details: str, **values: str) -> dict[str, str]:
        """Return what a file of this kind says of itself; `details` is outside the fingerprint."""
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
        """Check the details of a file against their checksum, which files of old do not have.

        Args:
            metadata: of the file.
            names: of the values that it holds besides those of all kinds.

        Raises:
            ValueError: the checksum is wrong, or a value has a name that is never written.
        """
        known = {*self.metadata("", details=""), *names}
        if unknown := metadata.keys() - known:  # it may be the checksum's, damaged
            raise ValueError(f"it has a value named {min(unknown)!r}")
        found = text_crc32(metadata["details"])
        if metadata.get("details_crc32", found) != found:
            raise ValueError("the checksum of its details is wrong")

    def read(
        self, path: Path, names: Sequence[str]
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
        """The arrays of these names, and the metadata.

        Raises:
            TokscaleError: the file is missing, damaged, newer, or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        if path.is_dir():  # for which safetensors says "No such device"
            raise TokscaleError(f"cannot read {self.what} {path}: it is a directory; name a file")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                if metadata.get("kind") != self.kind:
                    raise TokscaleError(f"{path} is not a {self.what}; make one with `{self.verb}`")
                check_schema(path, schema_version(path, metadata), self.schema_version)
                return {name: file.get_tensor(name) for name in names}, metadata
        except OSError as error:
            raise TokscaleError(
                f"cannot read {self.what} {path}: {error.strerror or error}"
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TokscaleError(
                f"{self.what} {path} is damaged ({error}); make it again"
            ) from error

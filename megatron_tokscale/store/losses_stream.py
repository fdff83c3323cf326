"""A losses file that is written in pieces, for losses that do not fit into memory.

Shapes: N watched tokens, n tokens of a piece.
"""

import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import AnyFloats
from megatron_tokscale.core.files import sync
from megatron_tokscale.store.losses import LossRecord, losses_metadata, losses_name

_NAMES: Final = {"float16": "F16", "float32": "F32", "float64": "F64"}
"""Names of the types of numbers in a safetensors header."""
_LEAST_LOSS: Final = -1e-3
"""Least loss in nats that does not count as negative; our choice: rounding can put a loss of 0 a
little below 0."""


@dataclass
class LossesStream:
    """A losses file that grows by pieces; it can be read after `finish`.

    The file has the layout of `write_losses`. It is written into a folder that nobody reads yet, so
    it needs no temporary name. Between pieces it is closed: a matrix may have more columns than a
    process may have open files.

    Attributes:
        folder: the folder of the file.
        record: its record.
        dtype: type of the losses.
        n_tokens: number of losses.
        non_finite: losses so far that are NaN or infinite.
        negative: finite losses so far that are below 0 by more than rounding.
    """

    folder: Path
    record: LossRecord
    dtype: np.dtype[np.floating]
    n_tokens: int
    non_finite: int = field(default=0, init=False)
    negative: int = field(default=0, init=False)
    _crc32: int = field(default=0, init=False)
    _written: int = field(default=0, init=False)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / losses_name(self.record.step)

    def append(self, loss_n: AnyFloats) -> None:
        """Append losses in nats.

        Raises:
            OSError: the file cannot be written.
        """
        piece = np.ascontiguousarray(loss_n, dtype=self.dtype)
        finite_n = np.isfinite(piece)
        self.non_finite += piece.size - int(finite_n.sum())
        self.negative += int((finite_n & (piece < _LEAST_LOSS)).sum())
        with self.path.open("ab") as file:
            if not self._written:
                file.write(self._header())
            file.write(piece.data)
        self._crc32 = zlib.crc32(piece, self._crc32)
        self._written += piece.size

    def finish(self) -> None:
        """Write the checksum into the header, and wait until the file is on the disk.

        Raises:
            OSError: the file cannot be written.
        """
        assert self._written == self.n_tokens, "as many losses as announced"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # The header has the same length with any checksum.
            os.pwrite(descriptor, self._header(), 0)
            sync(descriptor)
        finally:
            os.close(descriptor)

    def _header(self) -> bytes:
        """Return the start of the safetensors file: the length of the header, and the header."""
        end = self.n_tokens * self.dtype.itemsize
        header = {
            "__metadata__": losses_metadata(self.record, self._crc32),
            "loss": {
                "dtype": _NAMES[self.dtype.name],
                "shape": [self.n_tokens],
                "data_offsets": [0, end],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data
        return struct.pack("<Q", len(text)) + text

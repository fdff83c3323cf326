"""`export_run`: the losses of a run in the interchange format, written in a stream.

losses.npz has `axis_values` [K], `loss_matrix` [N, K] and `axis_name` [1]; where they are known,
`sample_id` and `token_pos` [N], and metadata arrays [N]. The array `tokscale`, a JSON text, lets
`import` restore what the format has no name for. The matrix is stored without compression, which
would save a tenth of it and take most of the time.

Shapes: N tokens, K columns, n tokens of a piece.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import AnyArray, AnyFloats, Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent, whole_or_absent_folder, write_text
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.records import to_json
from megatron_tokscale.core.writable import check_new_file
from megatron_tokscale.store.exchange.files import MATRIX, VALUES
from megatron_tokscale.store.exchange.manifest import MANIFEST
from megatron_tokscale.store.exchange.raw_arrays import PIECE_VALUES
from megatron_tokscale.store.exchange.sources import (
    AXIS_NAME,
    INTERCHANGE_FILE,
    OWN,
    POSITION,
    SAMPLE,
    OwnMetadata,
    file_sha256,
)
from megatron_tokscale.store.exchange.token_arrays import UNKNOWN_DATASET
from megatron_tokscale.store.losses import read_stored_losses
from megatron_tokscale.store.reader import Run, Time
from megatron_tokscale.store.tokens import WatchedTokens

_COLUMN_NAMES: Final = {
    "documents": ("document", "document_N"),
    "samples": ("sample", "sample_N"),
    "positions": (POSITION, "position_N"),
    "contexts": ("context", "context_N"),
    "labels": ("label", "label_N"),
}
"""Name of the metadata array, and of the column, by what it says of the tokens."""


@dataclass(frozen=True)
class _Member:
    """An array of the file.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: type of its values.
        pieces: its rows, in order.
        compressed: true if it is deflated.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    pieces: Iterable[AnyArray]
    compressed: bool = True

    @classmethod
    def of(cls, name: str, array: AnyArray) -> "_Member":
        return cls(name, array.shape, array.dtype, [array])


def export_run(
    run: Run, out: Path, *, time: Time | None = None, progress: Progress | None = None
) -> Path:
    """Write the losses of a run in the interchange format, whole or not at all.

    Args:
        run: the run; probes without a finite loss are left out.
        out: a new file with the end .npz; or a new folder, for losses.npz and manifest.yaml.
        time: the time of the axis; by default that of the run (`Run.default_time`).
        progress: receiver of the losses exported; None for none.

    Returns:
        The path of the .npz file.

    Raises:
        TokscaleError: `out` exists, the run has no probes, a losses file is damaged, or the run has
            no record of that time.
        OSError: the disk is full or the path cannot be written.
    """
    progress = progress or NoProgress()
    if not run.records:
        raise TokscaleError(f"{run.path} has no probes, so there is nothing to export; train it")
    run.x_K(time)  # refuses a time that is not known or does not ascend
    run.verify()
    if out.suffix == ".npz":
        check_new_file(out, "it is not replaced")
        with whole_or_absent(out) as temporary:
            _write_npz(temporary, _members(run, time, progress))
        return out
    with whole_or_absent_folder(out) as folder:
        path = folder / INTERCHANGE_FILE
        members = list(_members(run, time, progress))
        _write_npz(path, members)
        write_text(folder / MANIFEST, _manifest(path, members))
    return out / INTERCHANGE_FILE


def _members(run: Run, time: Time | None, progress: Progress) -> Iterator[_Member]:
    """Yield the arrays of the file."""
    axis = run.imported.axis if run.imported else "T"
    yield _Member.of(VALUES, run.time_K(time))
    yield _Member.of(AXIS_NAME, np.array([axis]))
    own = OwnMetadata(
        fingerprint=run.tokens.fingerprint,
        datasets=run.tokens.datasets,
        vocab_size=run.tokens.vocab_size,
        unit=_unit(run, time or run.default_time),
        consumed_tokens=tuple(record.consumed_tokens for record in run.records),
        arrays=_array_names(run.tokens),
        version=__version__,
    )
    yield _Member.of(OWN, np.array([json.dumps(to_json(own))]))
    yield from _token_members(run.tokens)
    steps = run.step_K.tolist()
    dtype = np.result_type(
        *(read_stored_losses(run.paths.losses_at(step), 0, 1).dtype for step in steps)
    )
    shape = (run.n_tokens, len(steps))
    yield _Member(MATRIX, shape, dtype, _loss_pieces(run, dtype, progress), compressed=False)


def _unit(run: Run, time: Time) -> str | None:
    """Return the unit of the exported axis."""
    return run.imported.unit if time == "axis" and run.imported else time


def _array_names(tokens: WatchedTokens) -> dict[str, str]:
    """Return the names of the metadata arrays by what they say of the tokens."""
    known = {
        kind: name
        for kind, (name, column) in _COLUMN_NAMES.items()
        if getattr(tokens, column) is not None
    }
    return known if tokens.datasets == (UNKNOWN_DATASET,) else {"datasets": "dataset"} | known


def _token_members(tokens: WatchedTokens) -> Iterator[_Member]:
    """Yield `sample_id`, and an array for every column that is known."""
    if tokens.unit_kind != "blocks":
        yield _Member.of(SAMPLE, _numbered(tokens.cluster_N))
    if tokens.datasets != (UNKNOWN_DATASET,):
        names = np.array(tokens.datasets)
        rows = range(0, tokens.n_tokens, max(PIECE_VALUES // names.itemsize, 1))
        pieces = (names[tokens.dataset_N[at : at + rows.step]] for at in rows)
        yield _Member("dataset", (tokens.n_tokens,), names.dtype, pieces)
    for name, column in _COLUMN_NAMES.values():
        if (value_N := getattr(tokens, column)) is not None:
            yield _Member.of(name, value_N)


def _numbered(cluster_N: Integers) -> Integers32:
    """Return the rank of each value among the distinct values; neighbours are mostly equal."""
    starts = np.flatnonzero(np.diff(cluster_N, prepend=-1))
    _, rank = np.unique(cluster_N[starts], return_inverse=True)
    return np.repeat(rank.astype(np.int32), np.diff(starts, append=len(cluster_N)))


def _loss_pieces(run: Run, dtype: np.dtype[np.generic], progress: Progress) -> Iterator[AnyFloats]:
    """Yield the losses of the next tokens at all probes, (n, K)."""
    paths = [run.paths.losses_at(step) for step in run.step_K.tolist()]
    meter = progress.meter("export", run.n_tokens * len(paths), "losses")
    rows = max(PIECE_VALUES // len(paths), 1)
    for start in range(0, run.n_tokens, rows):
        stop = min(start + rows, run.n_tokens)
        piece_nK = np.empty((stop - start, len(paths)), dtype)
        for k, path in enumerate(paths):
            piece_nK[:, k] = read_stored_losses(path, start, stop)
        yield piece_nK
        meter(stop * len(paths))


def _write_npz(path: Path, members: Iterable[_Member]) -> None:
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for member in members:
            about = zipfile.ZipInfo(f"{member.name}.npy")  # without the time of day
            about.compress_type = zipfile.ZIP_DEFLATED if member.compressed else zipfile.ZIP_STORED
            with archive.open(about, "w", force_zip64=True) as file:
                _write_array(file, member)


def _write_array(file: IO[bytes], member: _Member) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(member.dtype),
        "fortran_order": False,
        "shape": member.shape,
    }
    np.lib.format.write_array_header_1_0(file, header)
    for piece in member.pieces:
        file.write(np.ascontiguousarray(piece).data.cast("B"))


def _manifest(path: Path, members: Iterable[_Member]) -> str:
    """Return the manifest: size, SHA-256 and shapes of the file."""
    lines = [
        "files:",
        f"  - path: {path.name}",
        f"    bytes: {path.stat().st_size}",
        f"    sha256: {file_sha256(path)}",
        "    arrays:",
    ]
    for member in members:
        shape = ", ".join(map(str, member.shape))
        lines += [
            f"      {member.name}:",
            f"        shape: [{shape}]",
            f"        dtype: {member.dtype.name}",
        ]
    return "\n".join(lines) + "\n"

"""`import_run`: a file with a matrix of losses as a run directory, in a stream.

Shapes: N tokens, K columns, n tokens of a piece.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.core.files import whole_or_absent_folder
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.store.exchange.sources import ImportSettings, MatrixSource
from megatron_tokscale.store.exchange.token_arrays import read_columns
from megatron_tokscale.store.identity import Identity
from megatron_tokscale.store.imported import (
    Imported,
    ImportedColumn,
    fingerprint_of,
    save_tokens,
)
from megatron_tokscale.store.losses import LossRecord
from megatron_tokscale.store.losses_stream import LossesStream
from megatron_tokscale.store.paths import RunPaths
from megatron_tokscale.store.tokens import ImportedTokens, TokenColumns, WatchedTokens

_TOKENS_PER_UNIT: Final = {"tokens": 1.0, "billion-tokens": 1e9}
"""Training tokens per unit of an axis that counts them."""


@dataclass(frozen=True)
class ImportSummary:
    """Summary of an import: the run, and the columns that the file has.

    Attributes:
        path: the run directory.
        imported: source and axis.
        tokens: what is known of the tokens.
        non_finite: losses that are NaN or infinite.
        negative: finite losses that are below 0 by more than rounding.
        manifest: a sentence on the manifest beside the file; None without one.
        unused: arrays of the file that were not imported.
    """

    path: Path
    imported: Imported
    tokens: WatchedTokens
    non_finite: int
    negative: int
    manifest: str | None
    unused: tuple[str, ...]


def import_run(
    source: Path, out: Path, settings: ImportSettings, progress: Progress | None = None
) -> ImportSummary:
    """Write the losses of a file as a new run directory, whole or not at all.

    The losses are read once, a few megabytes at a time. They keep their type; losses that are NaN,
    infinite or negative are kept and counted.

    Args:
        source: an .npz, .npy, .safetensors or .parquet file, or a folder with losses.npz.
        out: the run directory to make.
        settings: description of the file.
        progress: receiver of the losses imported; None for none.

    Raises:
        TokscaleError: the file cannot be imported (see `MatrixSource.open`), or `out` exists.
        OSError: the disk is full or the directory cannot be written.
    """
    opened = MatrixSource.open(source, settings)
    with whole_or_absent_folder(out) as folder:
        return write_run(opened, folder, out, progress or NoProgress())


def write_run(source: MatrixSource, folder: Path, path: Path, progress: Progress) -> ImportSummary:
    """Write the losses of an opened file into the empty folder `folder`, which becomes `path`.

    run.json is written last: until then the folder holds no run.

    Raises:
        TokscaleError: the file is damaged, or an array does not describe its tokens.
        OSError: the disk is full or the folder cannot be written.
    """
    paths = RunPaths(folder)
    tokens = _tokens(source)
    imported = Imported(
        source=source.file.path.name,
        sha256=source.sha256,
        axis=source.axis,
        axis_name=source.axis_name,
        unit=source.settings.unit,
        columns=_columns(source),
        seed=source.settings.seed,
    )
    paths.losses.mkdir(parents=True)
    streams = _streams(source, paths, imported, tokens.fingerprint)
    meter = progress.meter("import", source.n_tokens * len(streams), "losses")
    done = 0
    for columns, piece_nK in source.pieces():
        for k, stream in enumerate(streams[columns]):
            stream.append(piece_nK[:, k])
        done += piece_nK.size
        meter(done)
    for stream in streams:
        stream.finish()
    save_tokens(paths.tokens, tokens)
    Identity(
        run_id=secrets.token_hex(8),
        probe_fingerprint=tokens.fingerprint,
        size=source.settings.size,
        imported=imported,
    ).save(paths.identity)
    return ImportSummary(
        path=path,
        imported=imported,
        tokens=WatchedTokens(tokens),
        non_finite=sum(stream.non_finite for stream in streams),
        negative=sum(stream.negative for stream in streams),
        manifest=source.manifest,
        unused=source.unused,
    )


def _tokens(source: MatrixSource) -> ImportedTokens:
    """Return what the file says of its tokens."""
    settings, own = source.settings, source.own
    columns, datasets = read_columns(
        source.file, settings.arrays, source.n_tokens, settings.vocab_size
    )
    if own is not None and own.arrays.get("datasets") == settings.arrays.datasets:
        columns, datasets = _in_order(columns, datasets, own.datasets)
    return ImportedTokens(
        n_tokens=source.n_tokens,
        fingerprint=own.fingerprint if own else _fingerprint(source, columns),
        datasets=datasets,
        columns=columns,
        vocab_size=settings.vocab_size,
    )


def _in_order(
    columns: TokenColumns, found: tuple[str, ...], names: tuple[str, ...]
) -> tuple[TokenColumns, tuple[str, ...]]:
    """Return the columns with the datasets in the order of `names`, some of which have no token."""
    if not set(found) <= set(names):
        return columns, found
    place = np.array([names.index(name) for name in found], np.int16)
    known = columns.known() | {"dataset_N": place[columns.dataset_N]}
    return TokenColumns(**known), names  # type: ignore[arg-type] # one column of each type


def _fingerprint(source: MatrixSource, columns: TokenColumns) -> str:
    """Return the fingerprint of the tokens.

    Positions in documents or samples, or labels, tell tokens of two files apart. Without them two
    files watch the same tokens only if the user says so.
    """
    name = source.settings.tokens_name
    if name is not None:
        return fingerprint_of(columns, str(source.n_tokens), name)
    has_place = columns.position_N is not None and not (
        columns.document_N is None and columns.sample_N is None
    )
    if has_place or columns.label_N is not None:
        return fingerprint_of(columns, str(source.n_tokens))
    return fingerprint_of(columns, str(source.n_tokens), source.sha256)


def _columns(source: MatrixSource) -> tuple[ImportedColumn, ...]:
    """Return step and value of the columns by ascending value."""
    values = source.value_K[source.order_K].tolist()
    counts_steps = source.axis == "T" and source.settings.unit == "step"
    steps = [int(value) for value in values] if counts_steps else range(len(values))
    return tuple(ImportedColumn(step, value) for step, value in zip(steps, values, strict=True))


def _streams(
    source: MatrixSource, paths: RunPaths, imported: Imported, fingerprint: str
) -> list[LossesStream]:
    """Return a losses file for every column, in the order of the matrix."""
    consumed = _consumed_tokens(source, imported)
    streams: list[LossesStream | None] = [None] * len(imported.columns)
    for place, column, n in zip(source.order_K.tolist(), imported.columns, consumed, strict=True):
        record = LossRecord(
            step=column.step,
            consumed_samples=0,
            consumed_tokens=n,
            learning_rate=np.nan,
            lr_sum=np.nan,
            training_loss=np.nan,
            wall_time=0.0,
            duration=0.0,
            probe_fingerprint=fingerprint,
            versions=f"imported by megatron-tokscale {__version__}",
        )
        streams[place] = LossesStream(paths.losses, record, source.dtype, source.n_tokens)
    return [stream for stream in streams if stream is not None]


def _consumed_tokens(source: MatrixSource, imported: Imported) -> list[int | None]:
    """Return the training tokens of each column, by ascending value; None where unknown."""
    per_unit = _TOKENS_PER_UNIT.get(imported.unit or "")
    if per_unit is not None:
        return [round(column.value * per_unit) for column in imported.columns]
    found: list[int | None] = [None] * len(imported.columns)
    if source.own is not None and len(source.own.consumed_tokens) == len(found):
        found = [source.own.consumed_tokens[place] for place in source.order_K.tolist()]
    if source.axis == "T" and source.settings.training_tokens is not None:
        found[-1] = source.settings.training_tokens
    return found

"""A run directory of an older schema, whose losses and probe set become a new run.

| file | schema | since then |
|---|---|---|
| run.json | 1 | one set of settings, not one per launch; only its losses are taken over |
| probe.safetensors | 1 | the origin had another form; the tokens are the same |
| losses/step_*.safetensors | 1 | the same |

Shapes: N tokens, K probe steps.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import AnyArray
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import json_checksum, read_json, whole_or_absent_folder
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.schemas import RUN_SCHEMA
from megatron_tokscale.core.tensors import TensorFile
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.exchange.import_run import ImportSummary
from megatron_tokscale.store.exchange.raw_arrays import PIECE_VALUES
from megatron_tokscale.store.exchange.token_arrays import UNKNOWN_DATASET
from megatron_tokscale.store.identity import OLDEST_READ, Identity
from megatron_tokscale.store.imported import (
    Imported,
    ImportedColumn,
    save_tokens,
)
from megatron_tokscale.store.losses import (
    LossRecord,
    list_losses,
    read_record,
    read_stored_losses,
)
from megatron_tokscale.store.losses_stream import LossesStream
from megatron_tokscale.store.paths import RunPaths
from megatron_tokscale.store.tokens import ImportedTokens, TokenColumns, WatchedTokens

_OLD_PROBE_SET: Final = TensorFile("tokscale-probe-set", 1, "probe set", "megatron-tokscale import")
_ARRAYS: Final = ("tokens", "labels", "mask", "document", "position", "dataset")


def is_run_directory(path: Path) -> bool:
    """Return whether a folder holds a run of any schema, or the losses of one."""
    paths = RunPaths(path)
    return paths.identity.is_file() or bool(list_losses(paths.losses))


def import_old_run(source: Path, out: Path, progress: Progress | None = None) -> ImportSummary:
    """Write losses and probe set of a run of an older schema as a new run, whole or not at all.

    Launches and settings of the old run are not taken over. Without a readable probe set, only the
    number of the tokens is known.

    Raises:
        TokscaleError: the run is of the present schema, has no losses, or has a damaged file; or
            `out` exists.
        OSError: the disk is full or the directory cannot be written.
    """
    paths = RunPaths(source)
    _refuse_readable(paths)
    files = list_losses(paths.losses)
    if not files:
        raise TokscaleError(f"{paths.losses} has no losses files; name another run directory")
    records = [read_record(path) for path in files.values()]
    n_tokens = records[0][1]
    for path, (record, n) in zip(files.values(), records, strict=True):
        if (n, record.probe_fingerprint) != (n_tokens, records[0][0].probe_fingerprint):
            raise TokscaleError(
                f"{path} is of other tokens than {next(iter(files.values()))}; remove the file"
            )
    fingerprint = records[0][0].probe_fingerprint
    tokens = WatchedTokens(_tokens(paths, n_tokens, fingerprint))
    imported = Imported(
        source=source.name,
        sha256="",
        axis="T",
        axis_name="",
        unit="step",
        columns=tuple(ImportedColumn(step, float(step)) for step in files),
    )
    with whole_or_absent_folder(out) as folder:
        new = RunPaths(folder)
        new.losses.mkdir(parents=True)
        progress = progress or NoProgress()
        meter = progress.meter("import", n_tokens * len(files), "losses")
        non_finite = negative = 0
        for k, (path, (record, _)) in enumerate(zip(files.values(), records, strict=True)):
            copied = _copy(path, new, record, n_tokens)
            non_finite += copied.non_finite
            negative += copied.negative
            meter((k + 1) * n_tokens)
        if tokens.probe_set is not None:
            tokens.probe_set.save(new.probe_set)
        elif isinstance(tokens.source, ImportedTokens):
            save_tokens(new.tokens, tokens.source)
        Identity(secrets.token_hex(8), fingerprint, imported=imported).save(new.identity)
    return ImportSummary(out, imported, tokens, non_finite, negative, None, ())


def _refuse_readable(paths: RunPaths) -> None:
    """Refuse a run that every verb reads as it is."""
    if not paths.identity.is_file():
        return
    content = read_json(paths.identity)
    version = content.get("schema_version")
    if isinstance(version, int) and OLDEST_READ <= version <= RUN_SCHEMA:
        raise TokscaleError(
            f"{paths.root} is a run that every verb reads as it is (schema {version}); name it to "
            "`megatron-tokscale fit`"
        )
    if "checksum" in content and content["checksum"] != json_checksum(content):
        raise TokscaleError(f"{paths.identity} is damaged: its checksum is wrong; restore it")


def _copy(path: Path, new: RunPaths, record: LossRecord, n_tokens: int) -> LossesStream:
    """Copy one losses file in pieces; return the finished stream, which has counted its losses."""
    dtype = read_stored_losses(path, 0, 1).dtype
    stream = LossesStream(new.losses, record, np.dtype(dtype), n_tokens)
    for start in range(0, n_tokens, PIECE_VALUES):
        stream.append(read_stored_losses(path, start, min(start + PIECE_VALUES, n_tokens)))
    stream.finish()
    return stream


def _tokens(paths: RunPaths, n_tokens: int, fingerprint: str) -> ProbeSet | ImportedTokens:
    """Return the probe set of an old run, or the little that is known without one."""
    if not paths.probe_set.is_file():
        columns = TokenColumns(dataset_N=np.zeros(n_tokens, np.int16))
        return ImportedTokens(n_tokens, fingerprint, (UNKNOWN_DATASET,), columns)
    try:
        probe_set = ProbeSet.load(paths.probe_set)
    except TokscaleError:
        probe_set = _old_probe_set(paths.probe_set)
    if (probe_set.fingerprint, probe_set.n_tokens) != (fingerprint, n_tokens):
        raise TokscaleError(
            f"{paths.probe_set} is not the probe set of the losses in {paths.losses}; restore it, "
            "or remove it to import the losses without text"
        )
    return probe_set


def _old_probe_set(path: Path) -> ProbeSet:
    """Read a probe set of schema 1, without the origin of its tokens."""
    arrays, metadata = _OLD_PROBE_SET.read(path, _ARRAYS)
    try:
        return _probe_set(arrays, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise TokscaleError(
            f"probe set {path} is damaged ({error}); restore it, or remove it to import the losses "
            "without text"
        ) from error


def _probe_set(arrays: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> ProbeSet:
    return ProbeSet(
        tokens_BS=np.asarray(arrays["tokens"], np.int32),
        labels_BS=np.asarray(arrays["labels"], np.int32),
        mask_BS=np.asarray(arrays["mask"], np.bool_),
        document_BS=np.asarray(arrays["document"], np.int32),
        position_BS=np.asarray(arrays["position"], np.int32),
        dataset_BS=np.asarray(arrays["dataset"], np.int16),
        datasets=tuple(str(name) for name in json.loads(metadata["datasets"])),
        vocab_size=int(metadata["vocab_size"]),
    )

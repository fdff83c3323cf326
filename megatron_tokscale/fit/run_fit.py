"""`fit_run`: a run on disk, streamed by blocks of tokens, to fits.parquet and fit.json.

Shapes: N tokens, K probe steps, B sequences.
"""

import json
import math
import os
import time as clock
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.core.checked import file_checksum, write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import from_json
from megatron_tokscale.core.schemas import FIT_SCHEMA
from megatron_tokscale.fit.axis import MIN_PROBES, Axis
from megatron_tokscale.fit.parts import Parts, Ranks
from megatron_tokscale.fit.sigmoids import fit_sigmoids
from megatron_tokscale.fit.summary import (
    ClassTotal,
    FitIdentity,
    FitSettings,
    FitSummary,
    NonFiniteLosses,
)
from megatron_tokscale.fit.table import FitStatus, ParquetRows, SigmoidFits, TokenClass
from megatron_tokscale.store.losses import take_for_checked

if TYPE_CHECKING:
    from megatron_tokscale.probe import ProbeSet
    from megatron_tokscale.store import Run
    from megatron_tokscale.store.reader import Time

_BLOCK_VALUES = 2**24
_BLOCK_TOKENS = 2**14, 2**18
_BLOCKS = 64
_HEADING = "version", "run_id", "time", "steps", "probe_fingerprint"
_NON_FINITE = b"non_finite"


def fits_path(run: "Run") -> Path:
    """Where `fit_run` puts the fits of a run."""
    return run.analysis / "fits.parquet"


def fit_run(
    run: "Run",
    *,
    time: "Time" = "step",
    block_tokens: int | None = None,
    device: Any = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> FitSummary:
    """Fit every watched token of `run`; write RUN/analysis/fits.parquet and fit.json.

    Every finished block of tokens is a file under RUN/analysis/fit.parts until all of them are. A
    fit that was stopped, however, goes on from these if it is called with the same settings for
    the same losses; otherwise it starts anew. The files it ends with are the same to the bit,
    however often it was stopped and by however many processes it was made.

    Besides the probe set, memory does not grow with the number of tokens. The parquet has one row
    per token: the columns of `SigmoidFits` and the token's label, dataset, document, position and
    context length.

    Args:
        run: an opened run. Losses that appear later are left out.
        time: "step", "tokens" or "lr-sum"; x is its natural logarithm.
        block_tokens: tokens fitted at once; by default at most 64 MB of losses.
        device: where to compute; by default the CPU. A bare "cuda" is the rank's own GPU.
        progress: called on rank 0 with (tokens done, tokens to do) at first and after every block;
            neither counts what was resumed.
        ranks: the processes that call this together, each with its share of the blocks; by default
            this one alone.

    Returns:
        The content of fit.json. Its seconds and tokens per second are of this call alone.

    Raises:
        TokscaleError: too few probes, a damaged losses file, a time the run does not know, no such
            device, another fit of the run under way, or a disk that cannot be written.
    """
    ranks = ranks or Ranks()
    device = ranks.together(partial(ranks.device, device))
    made_of = ranks.on_first(partial(_made_of, run, time, block_tokens, device.type))
    run = ranks.together(partial(_same_probes, run, made_of))
    blocks = _cut(run.n_tokens, made_of["block_tokens"])
    parts = Parts(run.analysis / "fit.parts", made_of)
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(parts.locked()))
        checked = _check_losses(run, parts, ranks)
        ranks.on_first(partial(parts.prepare, checked))
        resumed = ranks.on_first(parts.finished)
        work = _Work(run, run.x_K(time), device, blocks, parts, resumed, ranks, progress)
        started = clock.monotonic()
        ranks.together(work.do, meanwhile=work.report)
        seconds = clock.monotonic() - started
        return ranks.on_first(partial(_assemble, work, made_of, seconds))


def _made_of(
    run: "Run", time: "Time", block_tokens: int | None, device_type: str
) -> dict[str, Any]:
    """Everything that decides what a part holds."""
    n_probes = len(run.records)
    if n_probes < MIN_PROBES:
        empty = f" besides {len(run.left_out)} without a finite loss" if run.left_out else ""
        raise TokscaleError(
            f"{run.path} has {n_probes} probe steps{empty}, a sigmoid needs at least {MIN_PROBES}; "
            "train on, or probe more often (--tokscale-probe-schedule)"
        )
    return {
        "version": __version__,
        "run_id": run.info.run_id,
        "time": time,
        "steps": run.step_K.tolist(),
        "probe_fingerprint": run.probe_set.fingerprint,
        "x": Axis.from_x(run.x_K(time)).as_metadata(),
        "block_tokens": block_tokens or _block_tokens(run.n_tokens, n_probes),
        "device": device_type,
        "settings": _settings(),
        "columns": list(SigmoidFits.columns()),
        "crc32": run.checksums(),
    }


def _settings() -> dict[str, Any]:
    from megatron_tokscale.fit import classes

    return {
        "criterion": "BIC",
        "noise": "autoregressive of order one, estimated for every token",
        "margin": classes.MARGIN,
        "parameters": classes.PARAMETERS,
        "known_below_nats": classes.KNOWN_BELOW,
    }


def _block_tokens(n_tokens: int, n_probes: int) -> int:
    """Tokens of a block: a 64th of the run, but 2^14 to 2^18, and at most 2^24 losses (64 MB).

    Every block opens all losses files: 40% of the time to read it at 2^14 tokens, 20% at 2^15.
    """
    fewest, most = _BLOCK_TOKENS
    return max(min(max(n_tokens // _BLOCKS, fewest), most, _BLOCK_VALUES // n_probes), 1)


def _cut(n_tokens: int, block_tokens: int) -> list[slice]:
    starts = range(0, n_tokens, block_tokens)
    return [slice(start, min(start + block_tokens, n_tokens)) for start in starts]


def _same_probes(run: "Run", made_of: dict[str, Any]) -> "Run":
    """The run with the probes that rank 0 sees: a job may have written more since, or fewer."""
    if run.step_K.tolist() == made_of["steps"]:
        return run
    records = {record.step: record for record in type(run).open(run.path).records}
    if not records.keys() >= set(made_of["steps"]):
        raise TokscaleError(
            f"the processes of this fit see different losses in {run.path}; give all of them the "
            "same directory"
        )
    return replace(run, records=tuple(records[step] for step in made_of["steps"]))


def _check_losses(run: "Run", parts: Parts, ranks: Ranks) -> dict[str, list[int]]:
    """Check the losses files, each on one rank, but for those that an earlier fit has checked.

    Returns:
        Size and time of change of each file: its stamp.
    """
    stamps = ranks.on_first(partial(_stamps, run))
    known = ranks.on_first(parts.checked)
    new = [
        step
        for step, (name, stamp) in zip(run.step_K.tolist(), stamps.items(), strict=True)
        if known.get(name) != stamp
    ]
    ranks.together(lambda: run.verify(new[ranks.rank :: ranks.size]))
    for step in run.step_K:  # the other ranks, or the fit before this one, have checked the rest
        take_for_checked(run.losses_path(step))
    return stamps


def _stamps(run: "Run") -> dict[str, list[int]]:
    stats = ((path.name, path.stat()) for path in map(run.losses_path, run.step_K))
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}


@dataclass(frozen=True)
class _Work:
    """The blocks that are left to fit, shared among the ranks.

    Attributes:
        run: with the probes that all ranks see.
        x_K: natural logarithm of the time of each probe.
        device: where to compute.
        blocks: the tokens of every block.
        parts: where finished blocks go.
        resumed: the blocks that were finished when this call began.
        ranks: who shares the work.
        progress: as `fit_run` takes it.
    """

    run: "Run"
    x_K: NDArray[np.float64]
    device: Any
    blocks: list[slice]
    parts: Parts
    resumed: set[int]
    ranks: Ranks
    progress: Callable[[int, int], None] | None

    def do(self) -> None:
        """Fit this rank's share; stop early if another rank has failed."""
        self.report()
        left = [block for block in range(len(self.blocks)) if block not in self.resumed]
        for block, loss_NK in self._read_ahead(left[self.ranks.rank :: self.ranks.size]):
            if self.ranks.is_lost:
                return
            self._fit(block, loss_NK)
            self.report()

    def report(self) -> None:
        """Tell how many tokens all ranks have fitted since this call began."""
        if self.progress and self.ranks.leads:
            done = self.tokens(self.parts.finished() - self.resumed)
            self.progress(done, self.run.n_tokens - self.tokens(self.resumed))

    def tokens(self, blocks: Iterable[int]) -> int:
        """Number of tokens in `blocks`."""
        return sum(self.blocks[block].stop - self.blocks[block].start for block in blocks)

    def _read_ahead(self, blocks: list[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each block and its losses; a thread reads the next while the caller has the last."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            reads: deque[Future[NDArray[np.float32]]] = deque()
            for block, following in pairwise([None, *blocks, None]):
                if following is not None:
                    reads.append(thread.submit(self._read, following))
                if block is not None:
                    yield block, reads.popleft().result()

    def _read(self, block: int) -> NDArray[np.float32]:
        tokens = self.blocks[block]
        return self.run.read_losses(tokens.start, tokens.stop)

    def _fit(self, block: int, loss_NK: NDArray[np.float32]) -> None:
        fits = fit_sigmoids(self.x_K, loss_NK, device=self.device)
        table = fits.to_arrow(_probe_columns(self.run.probe_set, self.blocks[block]))
        non_finite_NK = ~np.isfinite(loss_NK)
        counts = {
            "tokens": int(non_finite_NK.any(axis=1).sum()),
            "losses_K": non_finite_NK.sum(axis=0).tolist(),
        }
        self.parts.write(block, table.replace_schema_metadata({_NON_FINITE: json.dumps(counts)}))


def _probe_columns(tokens: "ProbeSet", part: slice) -> dict[str, tuple[NDArray[Any], str]]:
    """What the probe set knows of a part of its tokens, from no more rows than hold them."""
    first_B = np.concatenate([[0], tokens.mask_BS.sum(axis=1).cumsum()])
    low = int(np.searchsorted(first_B, part.start, side="right")) - 1
    rows = slice(low, int(np.searchsorted(first_B, part.stop)))
    part = slice(part.start - int(first_B[low]), part.stop - int(first_B[low]))
    mask_BS = tokens.mask_BS[rows]
    context_N = (np.nonzero(mask_BS)[1] + 1).astype(np.int32)
    return {
        "label": (tokens.labels_BS[rows][mask_BS][part], "token id"),
        "dataset": (tokens.dataset_BS[rows][mask_BS][part], "index into the probe set's datasets"),
        "document": (tokens.document_BS[rows][mask_BS][part], "index in the dataset"),
        "position": (tokens.position_BS[rows][mask_BS][part], "tokens from the document's start"),
        "context": (context_N[part], "tokens predicted from"),
    }


def _assemble(work: _Work, made_of: dict[str, Any], seconds: float) -> FitSummary:
    """Make fits.parquet and fit.json of the parts, and remove these; return the summary.

    The old fit.json goes before fits.parquet is replaced, and the new one comes after: those two
    never disagree.
    """
    run, parts = work.run, work.parts
    if run.checksums() != made_of["crc32"]:
        raise TokscaleError(f"losses in {run.path} were replaced while they were fitted; fit again")
    heading = {
        **{name: made_of[name] for name in _HEADING},
        "losses_crc32": list(made_of["crc32"].values()),
        "fit_id": parts.digest,
    }
    tally = _Tally(len(run.records))
    fits = fits_path(run)
    summary_path = fits.with_name("fit.json")
    with parts.writing():
        with ParquetRows(parts.folder / fits.name, work.x_K, heading) as rows:
            for block in range(len(work.blocks)):
                table = parts.read(block)
                tally.add(table)
                rows.append_table(table)
        resumed = work.tokens(work.resumed)
        classes, fall_nats = tally.classes()
        summary = FitSummary(
            identity=from_json(
                FitIdentity,
                {name: heading[name] for name in FitIdentity.__dataclass_fields__},
            ),
            n_tokens=run.n_tokens,
            n_probes=len(run.records),
            left_out=tuple(run.left_out),
            classes=classes,
            fall_nats=fall_nats,
            status={status.label: tally.statuses[status] for status in FitStatus},
            non_finite=NonFiniteLosses(
                int(tally.non_finite_K.sum()), tally.non_finite_tokens, run.n_tokens
            ),
            non_finite_K=tuple(tally.non_finite_K.tolist()),
            settings=from_json(FitSettings, made_of["settings"]),
            seconds=round(seconds, 3),
            tokens_per_second=round((run.n_tokens - resumed) / max(seconds, 1e-9), 1),
            resumed_tokens=resumed,
            fits_crc32=file_checksum(parts.folder / fits.name),
        )
        write_typed_result(parts.folder / summary_path.name, FIT_SCHEMA, summary)
        summary_path.unlink(missing_ok=True)
        for path in (fits, summary_path):
            os.replace(parts.folder / path.name, path)
    parts.remove()
    return summary


class _Tally:
    """Counts over the parts: tokens and fall per class, tokens per status, non-finite losses."""

    def __init__(self, n_probes: int) -> None:
        self.tokens: Counter[int] = Counter()
        self.statuses: Counter[int] = Counter()
        self.fall = dict.fromkeys(TokenClass, 0.0)
        self.non_finite_tokens = 0
        self.non_finite_K = np.zeros(n_probes, np.int64)

    def add(self, table: Any) -> None:
        """Count one part, a pyarrow table."""
        class_N, fall_N = (table[name].to_numpy() for name in ("class", "fall"))
        non_finite = json.loads(table.schema.metadata[_NON_FINITE])
        self.non_finite_tokens += non_finite["tokens"]
        self.non_finite_K += non_finite["losses_K"]
        self.statuses.update(table["status"].to_pylist())
        for token_class in TokenClass:
            of_class = class_N == token_class
            self.tokens[token_class] += int(of_class.sum())
            self.fall[token_class] += float(np.nansum(fall_N[of_class], dtype=np.float64))

    def classes(self) -> tuple[dict[str, ClassTotal], float]:
        """Return the totals of each class by its label, and the fall of all tokens in nats.

        A class's share of the fall is its part of the sum over tokens of the measured loss at the
        first probe minus that at the last: no model, the shares add up to one, and a
        class that forgets has a negative share.
        """
        n_tokens, fall = self.tokens.total(), sum(self.fall.values())
        classes = {
            token_class.label: ClassTotal(
                tokens=self.tokens[token_class],
                share=self.tokens[token_class] / max(n_tokens, 1),
                fall_nats=self.fall[token_class],
                fall_share=self.fall[token_class] / fall if fall else math.nan,
            )
            for token_class in TokenClass
        }
        return classes, fall

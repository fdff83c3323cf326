"""The fit of a run on disk, streamed by blocks of tokens, to fits.parquet and fit.json.

Shapes: N tokens, K probe steps, B sequences.
"""

import os
import time as clock
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.checked import file_checksum, write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import Meter, NoProgress, Progress
from megatron_tokscale.core.records import JSON
from megatron_tokscale.core.schemas import FIT_SCHEMA
from megatron_tokscale.core.words import counted
from megatron_tokscale.fit.common_shifts import common_shifts, shift_table, without_shifts
from megatron_tokscale.fit.fits_file import FitsWriter
from megatron_tokscale.fit.part_table import PartTotals, part_table
from megatron_tokscale.fit.parts import PartKey, Parts, Ranks, Stamp
from megatron_tokscale.fit.probe_axis import MIN_PROBES, ProbeAxis
from megatron_tokscale.fit.sigmoids import PRECISION, fit_sigmoids
from megatron_tokscale.fit.summary import (
    DatasetShifts,
    FitIdentity,
    FitSettings,
    FitSummary,
    NonFiniteLosses,
)
from megatron_tokscale.fit.table import FitStatus, SigmoidFits
from megatron_tokscale.store.losses import mark_checked
from megatron_tokscale.store.token_state import KNOWN_BELOW

if TYPE_CHECKING:
    import torch

    from megatron_tokscale.store import Run
    from megatron_tokscale.store.reader import Time

_BLOCK_VALUES = 2**24
"""Most losses of a block: 64 MB in float32, so that a block and the next one, which is read ahead,
stay small beside the memory of a machine. Our choice."""
_BLOCK_TOKENS = 2**14, 2**18
"""Fewest and most tokens of a block; our choice. To open all losses files takes 40% of the time in
which a block of 2^14 tokens is read, and 20% at 2^15. A block of 2^18 tokens takes seconds to fit:
larger blocks would make the reports of progress rare."""
LEAST_RUNS_TO_FIT = 20
"""Fewest values along D or M, one run at each, to which a token's sigmoid is fitted; our choice: a
sigmoid has four parameters, and each run brings noise of its own that all of its tokens share."""
_BLOCKS = 64
"""Blocks of a run, within these bounds; our choice. A fit that is stopped loses at most a 64th of
its work per process."""


def fit_run(
    run: "Run",
    *,
    time: "Time | None" = None,
    keep_common_shifts: bool = False,
    block_tokens: int | None = None,
    device: "torch.device | str | None" = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> FitSummary:
    """Fit every watched token of `run`; write RUN/analysis/fits.parquet and fit.json.

    First one pass over the losses finds the shift that all tokens of a dataset share at each probe
    (`fit.common_shifts`), and the fits are of losses without it: noise of a checkpoint must not
    decide the class of a token.

    Every finished block of tokens is a file under RUN/analysis/fit.parts, until all blocks are
    finished. A call resumes a stopped fit from these files, if its settings and the losses are the
    same; otherwise it starts anew. The final files are the same to the bit, however often the fit
    was stopped and however many processes shared it.

    The memory for the probe set grows with the number of tokens, all other memory does not. The
    parquet has one row per token: the columns of `SigmoidFits` and the token's label, dataset,
    document, position and context length.

    Args:
        run: an opened run. Losses that appear later are left out.
        time: "step", "tokens", "lr-sum" or "axis"; x is its natural logarithm. By default that of
            the run (`Run.default_time`).
        keep_common_shifts: whether to fit the losses as they are.
        block_tokens: tokens fitted at a time; by default at most 64 MB of losses.
        device: torch device to compute on; by default the CPU. A bare "cuda" is the rank's own GPU.
        progress: receiver, on rank 0, of the tokens done at the start and after every block, and of
            the tokens to do; tokens of an earlier call are not counted. None for none.
        ranks: the processes that call this together, each with its share of the blocks; by default
            this one alone.

    Returns:
        The content of fit.json. Its seconds and tokens per second are of this call alone.

    Raises:
        TokscaleError: too few probes, a matrix along D or M with tied values, a damaged losses
            file, a time that the run has no record of, no such device, another fit of the run under
            way, or a disk that cannot be written.
    """
    # All ranks agree on the device, on the key of the parts, and on the probes.
    ranks, time = ranks or Ranks(), time or run.default_time
    place = ranks.together(partial(ranks.device, device))
    key = ranks.on_first(partial(part_key, run, time, block_tokens, place.type, keep_common_shifts))
    run = ranks.together(partial(_same_probes, run, key))
    blocks = _cut(run.n_tokens, key.block_tokens)
    parts = Parts(run.paths.fit_parts, key)
    # The ranks fit the blocks that no earlier call has finished; rank 0 joins all blocks.
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(parts.locked()))
        checked = _check_losses(run, parts, ranks)
        ranks.on_first(partial(parts.prepare, checked))
        resumed = ranks.on_first(parts.finished)
        progress, x_K = progress or NoProgress(), run.x_K(time)
        shifts = None if keep_common_shifts else ranks.on_first(partial(common_shifts, run, x_K))
        work = _Work(run, x_K, shifts, place, blocks, parts, resumed, ranks, progress)
        started = clock.monotonic()
        ranks.together(work.do, meanwhile=work.report)
        seconds = clock.monotonic() - started
        return ranks.on_first(partial(_assemble, work, key, seconds))


def part_key(
    run: "Run",
    time: "Time",
    block_tokens: int | None,
    device_type: str,
    keep_common_shifts: bool = False,
) -> PartKey:
    """Return the key of the parts of a run's fit.

    Raises:
        TokscaleError: the run has too few probes, or no record of the time.
    """
    check_columns(run)
    n_probes = len(run.records)
    if n_probes < MIN_PROBES:
        empty = f" besides {len(run.left_out)} without a finite loss" if run.left_out else ""
        raise TokscaleError(
            f"{run.path} has {n_probes} probe steps{empty}, a sigmoid needs at least {MIN_PROBES}; "
            "train on, or probe more often (--tokscale-probe-schedule)"
        )
    return PartKey(
        version=__version__,
        run_id=run.info.run_id,
        time=time,
        steps=tuple(run.step_K.tolist()),
        probe_fingerprint=run.tokens.fingerprint,
        x=tuple(ProbeAxis.from_x(run.x_K(time)).as_metadata()),
        block_tokens=block_tokens or _block_tokens(run.n_tokens, n_probes),
        device=device_type,
        settings=_settings(),
        keeps_common_shifts=keep_common_shifts,
        columns=tuple(SigmoidFits.columns()),
        crc32=run.checksums(),
    )


def check_columns(run: "Run") -> None:
    """Refuse a matrix along D or M with too few values of the axis for a fit, or with tied values.

    A spectrum is a density over the axis, and its slopes are differences between neighbours: two
    columns at one value have none.

    Raises:
        TokscaleError: see above; it names the verb that needs no fit.
    """
    imported, n_columns = run.imported, len(run.records)
    if imported is None or imported.axis == "T":
        return
    n_values = len(set(run.time_K("axis").tolist()))
    without_fit = (
        f"run `megatron-tokscale spectrum {run.path}`, which needs no fit for learned or not, the "
        "time to the threshold and falls by group; a report needs the fit"
    )
    if n_values < LEAST_RUNS_TO_FIT:
        raise TokscaleError(
            f"{run.path} has one column per run along {imported.axis}, {n_columns} columns at "
            f"{counted(n_values, 'value')}; expected at least {LEAST_RUNS_TO_FIT} values for a "
            f"sigmoid per token; {without_fit}"
        )
    if n_values < n_columns:
        raise TokscaleError(
            f"{run.path} has {n_columns} columns at {n_values} values of {imported.axis}; expected "
            "one run of each value for a sigmoid per token; import one run of each value, or "
            f"{without_fit}"
        )


def _settings() -> FitSettings:
    from megatron_tokscale.fit import classes

    return FitSettings(
        criterion="BIC",
        noise="autoregressive of order one, estimated for every token",
        margin=classes.MARGIN,
        parameters=classes.PARAMETERS,
        known_below_nats=KNOWN_BELOW,
        precision=PRECISION,
    )


def _block_tokens(n_tokens: int, n_probes: int) -> int:
    """Return the tokens of a block: a 64th of the run, within the bounds of the constants above."""
    fewest, most = _BLOCK_TOKENS
    return max(min(max(n_tokens // _BLOCKS, fewest), most, _BLOCK_VALUES // n_probes), 1)


def _cut(n_tokens: int, block_tokens: int) -> list[slice]:
    starts = range(0, n_tokens, block_tokens)
    return [slice(start, min(start + block_tokens, n_tokens)) for start in starts]


def _same_probes(run: "Run", key: PartKey) -> "Run":
    """Return the run with rank 0's probes: a job may have written or abandoned some since."""
    if tuple(run.step_K.tolist()) == key.steps:
        return run
    records = {record.step: record for record in type(run).open(run.path).records}
    if not records.keys() >= set(key.steps):
        raise TokscaleError(
            f"the processes of this fit see different losses in {run.path}; give all of them the "
            "same directory"
        )
    return replace(run, records=tuple(records[step] for step in key.steps))


def _check_losses(run: "Run", parts: Parts, ranks: Ranks) -> dict[str, Stamp]:
    """Check the losses files that no earlier fit has checked, each on one rank.

    Returns:
        The stamp of each file, by its name.
    """
    stamps = ranks.on_first(partial(_stamps, run))
    known = ranks.on_first(parts.checked)
    new = [
        step
        for step, (name, stamp) in zip(run.step_K.tolist(), stamps.items(), strict=True)
        if known.get(name) != stamp
    ]
    ranks.together(lambda: run.verify(new[ranks.rank :: ranks.size]))
    for step in run.step_K:  # other ranks, or an earlier fit, have checked the other files
        mark_checked(run.paths.losses_at(step))
    return stamps


def _stamps(run: "Run") -> dict[str, Stamp]:
    stats = ((path.name, path.stat()) for path in map(run.paths.losses_at, run.step_K))
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}


@dataclass(frozen=True)
class _Work:
    """The blocks still to fit, shared among the ranks.

    Attributes:
        run: the run, with the probes that all ranks see.
        x_K: natural logarithm of the time of each probe.
        shifts: the common shifts that are taken out of the losses; None to leave them in.
        device: the device to compute on.
        blocks: the tokens of every block.
        parts: the folder of finished blocks.
        resumed: the blocks that were finished when this call began.
        ranks: the processes that share the work.
        progress: see `fit_run`.
    """

    run: "Run"
    x_K: Floats
    shifts: tuple[DatasetShifts, ...] | None
    device: "torch.device"
    blocks: list[slice]
    parts: Parts
    resumed: set[int]
    ranks: Ranks
    progress: Progress

    def do(self) -> None:
        """Fit this rank's blocks; stop early if another rank has failed."""
        self.report()
        left = [block for block in range(len(self.blocks)) if block not in self.resumed]
        for block, loss_NK in self._read_ahead(left[self.ranks.rank :: self.ranks.size]):
            if self.ranks.is_lost:
                return
            self._fit(block, loss_NK)
            self.report()

    def report(self) -> None:
        """Report how many tokens all ranks have fitted since this call began."""
        if self.ranks.leads:
            self._meter(self.tokens(self.parts.finished() - self.resumed))

    @cached_property
    def _meter(self) -> Meter:
        """Meter of the tokens that were left when this call began."""
        left = self.run.n_tokens - self.tokens(self.resumed)
        return self.progress.meter("fit", left, "tokens")

    def tokens(self, blocks: Iterable[int]) -> int:
        """Return the number of tokens in `blocks`."""
        return sum(self.blocks[block].stop - self.blocks[block].start for block in blocks)

    def _read_ahead(self, blocks: list[int]) -> Iterator[tuple[int, Floats32]]:
        """Yield each block and its losses, while a thread reads those of the next block."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            reads: deque[Future[Floats32]] = deque()
            for block, following in pairwise([None, *blocks, None]):
                if following is not None:
                    reads.append(thread.submit(self._read, following))
                if block is not None:
                    yield block, reads.popleft().result()

    def _read(self, block: int) -> Floats32:
        tokens = self.blocks[block]
        loss_NK = self.run.read_losses(tokens.start, tokens.stop)
        if self.shifts is None:
            return loss_NK
        dataset_N = self.run.tokens.rows(tokens).dataset_N
        return without_shifts(loss_NK, shift_table(self.shifts), dataset_N)

    def _fit(self, block: int, loss_NK: Floats32) -> None:
        fits = fit_sigmoids(self.x_K, loss_NK, device=self.device)
        tokens = self.blocks[block]
        self.parts.write(block, part_table(fits, loss_NK, self.run.tokens.rows(tokens)))


def _assemble(work: _Work, key: PartKey, seconds: float) -> FitSummary:
    """Write fits.parquet and fit.json from the parts, remove these, and return the summary."""
    run, parts = work.run, work.parts
    if run.checksums() != key.crc32:
        raise TokscaleError(f"losses in {run.path} were replaced while they were fitted; fit again")
    fits, fit = parts.folder / run.paths.fits.name, parts.folder / run.paths.fit.name
    with parts.writing():
        totals = _join_parts(work, key, fits)
        summary = _summary(work, key, totals, seconds, file_checksum(fits))
        write_typed_result(fit, FIT_SCHEMA, summary)
        # fit.json is gone while fits.parquet is replaced: the two never disagree.
        run.paths.fit.unlink(missing_ok=True)
        os.replace(fits, run.paths.fits)
        os.replace(fit, run.paths.fit)
    parts.remove()
    return summary


def _join_parts(work: _Work, key: PartKey, path: Path) -> PartTotals:
    """Write the rows of all parts to `path`, a table of fits; return their totals."""
    heading: dict[str, JSON] = {
        "version": key.version,
        "run_id": key.run_id,
        "time": key.time,
        "steps": key.steps,
        "probe_fingerprint": key.probe_fingerprint,
        "losses_crc32": tuple(key.crc32.values()),
        "fit_id": key.digest,
    }
    totals = PartTotals(len(work.run.records))
    with FitsWriter(path, work.x_K, heading) as rows:
        for block in range(len(work.blocks)):
            table = work.parts.read(block)
            totals.add(table)
            rows.append(table)
    return totals


def _summary(
    work: _Work, key: PartKey, totals: PartTotals, seconds: float, fits_crc32: str
) -> FitSummary:
    """Return the content of fit.json."""
    run, resumed = work.run, work.tokens(work.resumed)
    classes, fall_nats = totals.classes()
    return FitSummary(
        identity=FitIdentity(
            run_id=key.run_id,
            probe_fingerprint=key.probe_fingerprint,
            steps=key.steps,
            losses_crc32=tuple(key.crc32.values()),
            time=key.time,
            fit_id=key.digest,
            time_name=run.time_name(key.time),
            unit_kind=run.tokens.unit_kind,
        ),
        n_tokens=run.n_tokens,
        n_probes=len(run.records),
        left_out=tuple(run.left_out),
        classes=classes,
        fall_nats=fall_nats,
        status={status.label: totals.statuses[status] for status in FitStatus},
        non_finite=NonFiniteLosses(
            int(totals.non_finite_K.sum()), totals.non_finite_tokens, run.n_tokens
        ),
        non_finite_K=tuple(totals.non_finite_K.tolist()),
        common_shifts=work.shifts,
        settings=key.settings,
        seconds=round(seconds, 3),
        tokens_per_second=round((run.n_tokens - resumed) / max(seconds, 1e-9), 1),
        resumed_tokens=resumed,
        fits_crc32=fits_crc32,
    )

"""A run on disk, read-only: its watched tokens, its probe steps, and loss_NK by blocks of tokens.

Shapes: N watched tokens, K probe steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.identity import Identity
from megatron_tokscale.store.imported import Imported, load_tokens
from megatron_tokscale.store.launches import Launch, launch_of
from megatron_tokscale.store.losses import (
    LossRecord,
    check_losses,
    has_finite_losses,
    is_checked,
    list_losses,
    read_checksum,
    read_losses,
    read_record,
)
from megatron_tokscale.store.paths import RunPaths
from megatron_tokscale.store.tokens import WatchedTokens

_VALUES_PER_READ = 2**24  # losses of a block of tokens: 64 MB in float32
Time = Literal["step", "tokens", "lr-sum", "axis"]


@dataclass(frozen=True)
class Run:
    """A run on disk, read-only. Make one with `Run.open`.

    Attributes:
        path: the run directory (which holds `tokscale/` and `analysis/`).
        info: the content of run.json.
        tokens: the watched tokens.
        records: one record per probe that has a finite loss, by ascending step.
        left_out: steps of the probes without any finite loss, as after a divergence; they are not
            in `records`. A run without any finite loss leaves no probe out.
    """

    path: Path
    info: Identity
    tokens: WatchedTokens
    records: tuple[LossRecord, ...]
    left_out: tuple[int, ...] = ()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the run in directory `path` and check that its files belong together.

        Raises:
            TokscaleError: the directory holds no run, a damaged file, or a file of another probe
                set.
        """
        paths = RunPaths(Path(path))
        info = read_identity(paths)
        tokens = read_watched_tokens(paths, info)
        records = []
        for file in list_losses(paths.losses).values():
            record = read_record_of(file, info, tokens)
            records.append(record)
        return cls(paths.root, info, tokens, tuple(records))._without_empty_probes()

    def _without_empty_probes(self) -> Self:
        steps = [record.step for record in self.records]
        empty = [step for step in steps if not has_finite_losses(self.paths.losses_at(step))]
        if not empty or len(empty) == len(steps):
            return self
        kept = tuple(record for record in self.records if record.step not in empty)
        return replace(self, records=kept, left_out=tuple(empty))

    @property
    def paths(self) -> RunPaths:
        """The paths of the run's files."""
        return RunPaths(self.path)

    @property
    def n_tokens(self) -> int:
        """Number of watched tokens N."""
        return self.tokens.n_tokens

    @property
    def probe_set(self) -> ProbeSet:
        """The probe set: the watched tokens with their text.

        Raises:
            TokscaleError: the run was imported, so it has no text.
        """
        if self.tokens.probe_set is None:
            raise TokscaleError(
                f"{self.path} was imported and has no text, which this needs; expected a run of a "
                "job with the plugin; name such a run"
            )
        return self.tokens.probe_set

    @cached_property
    def step_K(self) -> Integers:
        """Probe steps, ascending."""
        return np.array([record.step for record in self.records], dtype=np.int64)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Settings of each job that trained the run, ascending by the step it starts at.

        Empty for a replay of checkpoints that do not hold them.
        """
        return self.info.launches

    def launch_of(self, step: int) -> Launch:
        """Return the launch that took step number `step`; the first launch for step 0.

        Raises:
            TokscaleError: no launch is known.
        """
        if not self.launches:
            raise TokscaleError(
                f"{self.path} has no record of the settings of its training; replay checkpoints "
                "of a job with the plugin"
            )
        return launch_of(self.launches, step)

    @cached_property
    def peak_learning_rate(self) -> float:
        """Highest peak of the schedules that took steps up to the last probe; NaN if unknown.

        It is one number for the whole run, so that the divided sum ascends too.
        """
        last = int(self.step_K[-1]) if self.records else 0
        used = [launch for launch in self.launches if launch.step < last] or self.launches[:1]
        return max((launch.learning_rate.peak for launch in used), default=np.nan)

    @property
    def imported(self) -> Imported | None:
        """Source and axis of losses that were imported; None for a run of a job."""
        return self.info.imported

    @property
    def default_time(self) -> Time:
        """The time that a fit counts in by default: steps, or what an imported axis counts."""
        return "axis" if self.imported and not self.imported.counts_steps else "step"

    def time_name(self, time: Time) -> str:
        """Return the name of a time for people: of an imported axis, its own name and unit."""
        return self.imported.named if time == "axis" and self.imported else time

    def time_K(self, time: Time | None = None) -> Floats:
        """Return the training time at each probe; NaN where the run has no record of it.

        Args:
            time: as in `x_K`.
        """
        time = time or self.default_time
        if time == "axis":
            values = self.imported.value_of if self.imported else {}
            return np.array([values.get(record.step, np.nan) for record in self.records])
        if time == "step":
            known = self.default_time == "step"
            return self.step_K.astype(np.float64) if known else np.full(len(self.records), np.nan)
        if time == "tokens":
            tokens = [record.consumed_tokens for record in self.records]
            return np.array([np.nan if n is None else n for n in tokens], np.float64)
        sum_K = np.array([record.lr_sum for record in self.records], np.float64)
        return sum_K / (self.peak_learning_rate or np.nan)

    def x_K(self, time: Time | None = None) -> Floats:
        """Return the natural logarithm of training time at each probe; -inf at step 0.

        Args:
            time: "step", "tokens" (consumed training tokens), "lr-sum" (sum of the learning rates
                of the steps taken, over `peak_learning_rate`), or "axis" (the values of an imported
                axis, in their unit; on the axes D and M they may be equal). By default the run's
                own, `default_time`.

        Raises:
            TokscaleError: the run has no record of that time, or the time does not ascend.
        """
        time = time or self.default_time
        time_K = self.time_K(time)
        if unknown := np.flatnonzero(~np.isfinite(time_K)).tolist():
            step = self.records[unknown[0]].step
            raise TokscaleError(
                f"{self.path} has no record of its {time} at step {step} and {len(unknown) - 1} "
                f"later "
                f"probes; use the time '{self.default_time}'"
            )
        stalled = np.flatnonzero((np.diff(time_K) <= 0) & (time_K[1:] > 0))
        may_be_equal = time == "axis" and self.imported is not None and self.imported.axis != "T"
        if len(stalled) and not may_be_equal:
            k = int(stalled[0])
            raise TokscaleError(
                f"the {time} of {self.path} does not ascend from the probe at step "
                f"{self.records[k].step} ({time_K[k]:g}) to that at step "
                f"{self.records[k + 1].step} ({time_K[k + 1]:g}): "
                "the learning rate was 0 there, or all updates were skipped; use the time 'step'"
            )
        with np.errstate(divide="ignore"):
            return np.log(time_K)

    def knows(self, time: Time) -> bool:
        """Return whether the run has a record of that time at every probe."""
        return bool(np.isfinite(self.time_K(time)).all())

    def read_losses(self, start: int = 0, stop: int | None = None) -> Floats32:
        """Return loss_NK (nats, float32) of the tokens from `start` to `stop`, all probes.

        The checksum of each file is verified, once in a process.

        Raises:
            TokscaleError: a losses file is damaged.
        """
        stop = None if stop is None else min(stop, self.n_tokens)
        length = (self.n_tokens if stop is None else stop) - start
        loss_NK = np.empty((length, len(self.records)), dtype=np.float32)
        for k, record in enumerate(self.records):
            loss_NK[:, k] = read_losses(self.paths.losses_at(record.step), start, stop)
        return loss_NK

    def read_losses_at(self, step: int) -> Floats32:
        """Return loss_N (nats, float32) of all tokens at one probe step, checksum verified."""
        return read_losses(self.paths.losses_at(step)).astype(np.float32)

    def finite_blocks(self) -> Iterator[tuple[Integers, Floats32]]:
        """Yield numbers and loss_NK of the tokens whose losses are all finite, by blocks."""
        block = max(_VALUES_PER_READ // len(self.records), 1)
        for start in range(0, self.n_tokens, block):
            loss_NK = self.read_losses(start, start + block)
            finite_N = np.isfinite(loss_NK).all(axis=1)
            yield start + np.flatnonzero(finite_N), loss_NK[finite_N]

    def mean_losses(self) -> Floats:
        """Return the mean loss at each probe over the tokens that miss no loss, (K,), in nats.

        The losses are read once, by blocks.

        Raises:
            TokscaleError: every token misses a loss, or a losses file is damaged.
        """
        total_K, count = np.zeros(len(self.records)), 0
        for _, loss_NK in self.finite_blocks():
            total_K += loss_NK.sum(axis=0, dtype=np.float64)
            count += len(loss_NK)
        if not count:
            raise TokscaleError(
                f"no token of {self.path} has finite losses at all {len(self.records)} probes; "
                "leave the run out, or train it again"
            )
        return np.asarray(total_K / count)

    def verify(self, steps: Iterable[int] | None = None) -> None:
        """Check the checksums of the losses at `steps`, by default at all probe steps.

        A file that this process has checked is not read again.

        Raises:
            TokscaleError: a file is damaged; the message names the first.
        """
        for step in self.step_K if steps is None else steps:
            path = self.paths.losses_at(step)
            if not is_checked(path):
                check_losses(path)

    def checksums(self) -> dict[str, str]:
        """Return the CRC-32 in each losses file's metadata by file name; no losses are read."""
        paths = map(self.paths.losses_at, self.step_K)
        return {path.name: read_checksum(path) for path in paths}


def read_identity(paths: RunPaths) -> Identity:
    """Return the identity of the run in a directory.

    Raises:
        TokscaleError: the directory holds no run, or its run.json is damaged.
    """
    if not paths.identity.is_file():
        raise TokscaleError(
            f"no run in {paths.root}: {paths.identity} is not there; name the directory of a run"
        )
    return Identity.load(paths.identity)


def read_watched_tokens(paths: RunPaths, info: Identity) -> WatchedTokens:
    """Return the watched tokens of a run, from its probe set or from the imported file.

    Raises:
        TokscaleError: the file is missing, damaged, or of another run.
    """
    if info.imported and not paths.probe_set.is_file():
        path, tokens = paths.tokens, WatchedTokens(load_tokens(paths.tokens))
    else:
        path, tokens = paths.probe_set, WatchedTokens(ProbeSet.load(paths.probe_set))
    if info.probe_fingerprint != tokens.fingerprint:
        raise TokscaleError(f"{path} is not the probe set of {paths.identity}; restore it")
    return tokens


def read_record_of(file: Path, info: Identity, tokens: WatchedTokens) -> LossRecord:
    """Return the record of a losses file of a run, without its losses.

    Raises:
        TokscaleError: the file is damaged, or of another run.
    """
    record, n_tokens = read_record(file)
    if n_tokens != tokens.n_tokens:
        raise TokscaleError(
            f"losses file {file} has {n_tokens} tokens, the probe set has {tokens.n_tokens}; "
            "remove the file"
        )
    if record.probe_fingerprint != tokens.fingerprint:
        raise TokscaleError(f"losses file {file} is of another probe set; remove the file")
    if info.imported and record.step not in info.imported.value_of:
        raise TokscaleError(f"losses file {file} was not imported; remove the file")
    return record


def check_different_runs(runs: Sequence[Run]) -> None:
    """Refuse a run that is given twice, also as a copy under another name.

    Raises:
        TokscaleError: two runs have the same losses; the message names them.
    """
    seen: dict[tuple[str, ...], Run] = {}
    for run in runs:
        losses = tuple(run.checksums().values())
        if losses in seen:
            raise TokscaleError(
                f"{run.path} has the losses of {seen[losses].path}; expected other runs, such as "
                "other seeds; name each run once"
            )
        seen[losses] = run


def check_same_tokens(runs: Sequence[Run]) -> None:
    """Refuse runs with different probe sets.

    Raises:
        TokscaleError: the probe sets differ; the message names the first that does.
    """
    for run in runs:
        if run.tokens.fingerprint != runs[0].tokens.fingerprint:
            raise TokscaleError(
                f"{run.path} watches other tokens than {runs[0].path}; give runs of one probe set"
            )

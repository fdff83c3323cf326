"""Reading a run: its probe set, its probe steps, and loss_NK by blocks of tokens.

Shapes: N watched tokens, K probe steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.identity import Identity
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

_VALUES_PER_READ = 2**24
Time = Literal["step", "tokens", "lr-sum"]


@dataclass(frozen=True)
class Run:
    """A run on disk, read-only. Make one with `Run.open`.

    Attributes:
        path: the run directory (which holds `tokscale/` and `analysis/`).
        info: the content of run.json.
        probe_set: the watched tokens.
        records: one record per probe that has a finite loss, by ascending step.
        left_out: steps of the probes without any finite loss, as after a divergence: these carry
            nothing and are left out. Of a run that has no finite loss at all none is left out.
    """

    path: Path
    info: Identity
    probe_set: ProbeSet
    records: tuple[LossRecord, ...]
    left_out: tuple[int, ...] = ()

    @staticmethod
    def open(path: str | Path) -> "Run":
        """Open the run in directory `path` and check that its files belong together.

        Raises:
            TokscaleError: no run there, a damaged file, or a file of another probe set.
        """
        paths = RunPaths(Path(path))
        if not paths.identity.is_file():
            raise TokscaleError(f"no run in {path}: {paths.identity} is not there")
        info = Identity.load(paths.identity)
        probe_set = ProbeSet.load(paths.probe_set)
        if info.probe_fingerprint != probe_set.fingerprint:
            raise TokscaleError(
                f"{paths.probe_set} is not the probe set of {paths.identity}; restore it"
            )
        records = []
        for file in list_losses(paths.losses).values():
            record, n_tokens = read_record(file)
            if n_tokens != probe_set.n_tokens:
                raise TokscaleError(
                    f"losses file {file} has {n_tokens} tokens, the probe set has "
                    f"{probe_set.n_tokens}; remove the file"
                )
            if record.probe_fingerprint != probe_set.fingerprint:
                raise TokscaleError(f"losses file {file} is of another probe set; remove the file")
            records.append(record)
        return Run(paths.root, info, probe_set, tuple(records))._without_empty_probes()

    def _without_empty_probes(self) -> "Run":
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
    def analysis(self) -> Path:
        """The folder for everything computed from the run."""
        return self.paths.analysis

    @property
    def n_tokens(self) -> int:
        """Number of watched tokens N."""
        return self.probe_set.n_tokens

    @cached_property
    def step_K(self) -> NDArray[np.int64]:
        """Probe steps, ascending."""
        return np.array([record.step for record in self.records], dtype=np.int64)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Settings of each job that trained the run, ascending by the step it starts at.

        Empty for a replay of checkpoints that do not tell them.
        """
        return self.info.launches

    def launch_of(self, step: int) -> Launch:
        """Return the launch that took step number `step`; the first launch for step 0.

        Raises:
            TokscaleError: no launch is known.
        """
        if not self.launches:
            raise TokscaleError(f"{self.path} does not know the settings it was trained with")
        return launch_of(self.launches, step)

    @cached_property
    def peak_learning_rate(self) -> float:
        """Highest peak of the schedules that took steps up to the last probe; NaN if unknown.

        One number for the whole run, so that the sum over it ascends with the sum.
        """
        last = int(self.step_K[-1]) if self.records else 0
        used = [launch for launch in self.launches if launch.step < last] or self.launches[:1]
        return max((launch.learning_rate.peak for launch in used), default=np.nan)

    def x_K(self, time: Time = "step") -> NDArray[np.float64]:
        """Natural logarithm of training time at each probe; -inf at step 0.

        `time` is "step", "tokens" (consumed training tokens), or "lr-sum" (sum of the learning
        rates of the steps taken, over `peak_learning_rate`).

        Raises:
            TokscaleError: the run does not know that time, or it stands still between two probes.
        """
        time_K = self._time_K(time)
        if unknown := np.flatnonzero(~np.isfinite(time_K)).tolist():
            step = self.records[unknown[0]].step
            raise TokscaleError(
                f"{self.path} does not know its {time} at step {step} and {len(unknown) - 1} later "
                "probes; use the time 'step'"
            )
        stands = np.flatnonzero((np.diff(time_K) <= 0) & (time_K[1:] > 0))
        if len(stands):
            k = int(stands[0])
            raise TokscaleError(
                f"the {time} of {self.path} does not ascend from the probe at step "
                f"{self.records[k].step} ({time_K[k]:g}) to that at step "
                f"{self.records[k + 1].step} ({time_K[k + 1]:g}): "
                "the learning rate was 0 there, or all updates were skipped; use the time 'step'"
            )
        with np.errstate(divide="ignore"):
            return np.log(time_K)

    def knows(self, time: Time) -> bool:
        """Return whether every probe has that time."""
        return bool(np.isfinite(self._time_K(time)).all())

    def _time_K(self, time: Time) -> NDArray[np.float64]:
        if time == "step":
            return self.step_K.astype(np.float64)
        if time == "tokens":
            tokens = [record.consumed_tokens for record in self.records]
            return np.array([np.nan if n is None else n for n in tokens], np.float64)
        sum_K = np.array([record.lr_sum for record in self.records], np.float64)
        return sum_K / (self.peak_learning_rate or np.nan)

    def read_losses(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Read loss_NK (nats, float32) of the tokens from `start` to `stop`, all probes.

        The checksums of the files are verified, once in a process.
        """
        stop = None if stop is None else min(stop, self.n_tokens)
        length = (self.n_tokens if stop is None else stop) - start
        loss_NK = np.empty((length, len(self.records)), dtype=np.float32)
        for k, record in enumerate(self.records):
            loss_NK[:, k] = read_losses(self.paths.losses_at(record.step), start, stop)
        return loss_NK

    def read_losses_at(self, step: int) -> NDArray[np.float32]:
        """Read loss_N (nats, float32) of all tokens at one probe step, checksum verified."""
        return read_losses(self.paths.losses_at(step)).astype(np.float32)

    def finite_blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Numbers and loss_NK of the tokens whose losses are finite at all probes, by blocks."""
        block = max(_VALUES_PER_READ // len(self.records), 1)
        for start in range(0, self.n_tokens, block):
            loss_NK = self.read_losses(start, start + block)
            finite_N = np.isfinite(loss_NK).all(axis=1)
            yield start + np.flatnonzero(finite_N), loss_NK[finite_N]

    def verify(self, steps: Iterable[int] | None = None) -> None:
        """Check the checksums of the losses at `steps`, by default at all probe steps.

        A file that this process has checked is not read again.

        Raises:
            TokscaleError: naming the first damaged file.
        """
        for step in self.step_K if steps is None else steps:
            path = self.paths.losses_at(step)
            if not is_checked(path):
                check_losses(path)

    def checksums(self) -> dict[str, str]:
        """Return the CRC-32 that each losses file gives for its losses, by file name, unchecked."""
        paths = map(self.paths.losses_at, self.step_K)
        return {path.name: read_checksum(path) for path in paths}


def check_same_tokens(runs: Sequence[Run]) -> None:
    """Refuse runs with different probe sets.

    Raises:
        TokscaleError: naming the first that differs.
    """
    for run in runs:
        if run.probe_set.fingerprint != runs[0].probe_set.fingerprint:
            raise TokscaleError(f"{run.path} watches other tokens than {runs[0].path}")

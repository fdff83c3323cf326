"""Runs cut at the end that they have in common, on one clock.

Shapes: N tokens, K probe steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

import numpy as np

from megatron_tokscale.compare.late_loss import used_probes, window_weights
from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import MIN_PROBES, SigmoidFits, fit_sigmoids
from megatron_tokscale.results import FittedRun
from megatron_tokscale.spectrum.common_clock import CLOCKS, common_clock
from megatron_tokscale.spectrum.scored_range import probe_rates, scored_range_of
from megatron_tokscale.store import Run, check_different_runs, check_same_tokens
from megatron_tokscale.store.reader import Time

_SAME_END: Final = 0.02
"""Largest difference of ln time at which two ends count as one (our choice)."""


@dataclass(frozen=True)
class CutRun:
    """A fitted run up to the common end.

    Attributes:
        source: the run and its fits.
        x_K: natural logarithm of the clock at all its probes; -inf at step 0.
        end: x of the common end.
    """

    source: FittedRun
    x_K: Floats
    end: float

    @property
    def n_kept(self) -> int:
        """The number of probes up to the common end."""
        return int(np.sum(self.x_K <= self.end + _SAME_END))

    @cached_property
    def n_used(self) -> int:
        """The number of probes up to the last one that a late loss uses."""
        return used_probes(window_weights(self.x_K, self.end))

    @property
    def goes_on(self) -> bool:
        """Return whether the run has probes after the common end."""
        return self.n_kept < len(self.x_K)

    @cached_property
    def rate_share(self) -> float:
        """The learning rate at the last kept probe over its peak until then; NaN if unknown."""
        rate_K = probe_rates(self.source.run)[: self.n_kept]
        known_K = rate_K[np.isfinite(rate_K)]
        peak = known_K.max(initial=0.0)
        return float(rate_K[-1] / peak) if peak > 0 else float("nan")

    def blocks(self) -> Iterator[tuple[slice, SigmoidFits, Floats32]]:
        """Yield all tokens once: (slice of tokens, fits up to the end, losses at all probes).

        The losses of a run that goes on are cut at the common end and fitted again, on the clock:
        fits of the whole run know how far the losses fall later, which the other run's cannot.
        """
        for at, fits, loss_NK in self.source.blocks():
            yield at, self._refitted(loss_NK) if self.goes_on else fits, loss_NK

    def _refitted(self, loss_NK: Floats32) -> SigmoidFits:
        kept = self.n_kept
        return fit_sigmoids(self.x_K[:kept], np.ascontiguousarray(loss_NK[:, :kept]))

    def on_clock(self, fits: SigmoidFits, x_N: Floats) -> Floats:
        """Return times of the fits as x of the clock; beyond the probes x advances as theirs."""
        finite_K = np.isfinite(fits.x_K)
        fit_x_K, clock_x_K = fits.x_K[finite_K], self.x_K[: len(fits.x_K)][finite_K]
        inside_N = np.clip(x_N, fit_x_K[0], fit_x_K[-1])
        return np.asarray(np.interp(inside_N, fit_x_K, clock_x_K) + (x_N - inside_N))

    @cached_property
    def scored_from(self) -> float:
        """The end of the unigram phase in x of the clock; the first probe if it is not known."""
        return scored_range_of(self.source.run, self.x_K, self.source.run.mean_losses()).from_x


@dataclass(frozen=True)
class RunsToCompare:
    """Two runs and further seeds of the first, cut at their common end.

    Attributes:
        a: the baseline.
        b: the other run.
        noise: further seeds of the baseline.
        clock: the time that they have in common.
    """

    a: CutRun
    b: CutRun
    noise: tuple[CutRun, ...]
    clock: Time

    @classmethod
    def open(cls, a: Run, b: Run, noise: Sequence[Run] = (), clock: Time | None = None) -> Self:
        """Open fitted runs, find their clock and their common end.

        Args:
            a: the baseline.
            b: the other run.
            noise: further seeds of the baseline.
            clock: the clock to use; None for the first of `CLOCKS` that all runs know. The summed
                learning rate, which explains the effect of a learning rate away, is not among them.

        Raises:
            TokscaleError: two of the runs are the same, watch different tokens or have no common
                clock, one is not fitted or not along T, or fewer than five probes are before the
                common end.
        """
        runs = [a, b, *noise]
        check_different_runs(runs)
        for run in runs:
            if run.imported and run.imported.axis != "T":
                raise TokscaleError(
                    f"{run.path} is an imported matrix along {run.imported.axis}; expected runs "
                    "along training time; name such runs"
                )
        check_same_tokens(runs)
        fitted = [FittedRun.open(run) for run in runs]
        time, x_IK = _clock_of(runs, clock)
        end = min(float(x_K[-1]) for x_K in x_IK)
        cut = [CutRun(source, x_K, end) for source, x_K in zip(fitted, x_IK, strict=True)]
        for each in cut:
            if each.n_kept < MIN_PROBES:
                raise TokscaleError(
                    f"{each.source.run.path} has {each.n_kept} probes up to the common end, "
                    f"{time} {np.exp(end):g}; expected {MIN_PROBES} or more; compare longer runs"
                )
        return cls(cut[0], cut[1], tuple(cut[2:]), time)

    @property
    def every(self) -> tuple[CutRun, ...]:
        """A, B and the noise runs."""
        return (self.a, self.b, *self.noise)

    @property
    def end(self) -> float:
        """x of the common end on the clock."""
        return self.a.end

    @cached_property
    def scored_from(self) -> float:
        """The start of the compared range of x: the unigram phase is over in every run."""
        return max(each.scored_from for each in self.every)


def _clock_of(runs: Sequence[Run], clock: Time | None) -> tuple[Time, list[Floats]]:
    """Return the clock of the runs, and x of each run's probes on it."""
    found = common_clock(runs, (clock,) if clock else CLOCKS)
    if found is None:
        raise TokscaleError(
            f"the runs have no record of a common clock ({clock or ', '.join(CLOCKS)}); give "
            "another --clock, or compare runs of one source"
        )
    return found

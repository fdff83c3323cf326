"""A run and its fits, checked to belong together, and the check of analyses against the fits.

Shapes: K probe steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.checked import file_checksum, read_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import FIT_SCHEMA
from megatron_tokscale.fit import FitStatus, SigmoidFits
from megatron_tokscale.fit.common_shifts import shift_table, without_shifts
from megatron_tokscale.fit.run_fit import check_columns
from megatron_tokscale.fit.summary import FitIdentity, FitSummary, NonFiniteLosses
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time

_VALUES_PER_READ = 2**24  # losses of a block: 64 MB
_DIFFERENCES: Final = {
    "probe_fingerprint": "of other probes",
    "run_id": "of another run",
    "steps": "of other probes",
    "losses_crc32": "of other losses",
    "time": "of another time",
    "fit_id": "of other fits",
}
"""Words for a difference in each part of a `FitIdentity`; the first difference is named."""

Block = tuple[slice, SigmoidFits, Floats32]
"""Tokens, their fits, and their losses."""


def read_fit(run: Run) -> FitSummary:
    """Return the content of fit.json, if it was made from the losses that the run has now.

    The checksums of all losses are verified as well, even for an analysis that reads no losses:
    every verb refuses a damaged file before it writes a file.

    Raises:
        TokscaleError: the run is not fitted, or must not be (`check_columns`), a losses file is
            damaged, or fit.json is damaged, older or of other losses.
    """
    path = run.paths.fit
    verb = f"run `megatron-tokscale fit {run.path}`"
    check_columns(run)
    if not path.is_file():
        raise TokscaleError(f"{path} is not there; {verb} first")
    fit = read_typed_result(FitSummary, path, FIT_SCHEMA, f"{verb} again")
    here = replace(
        fit.identity,
        run_id=run.info.run_id,
        probe_fingerprint=run.tokens.fingerprint,
        steps=tuple(run.step_K.tolist()),
        losses_crc32=tuple(run.checksums().values()),
    )
    check_identity(path, fit.identity, here, f"{verb} again")
    run.verify()
    return fit


def check_identity(path: Path, found: FitIdentity, here: FitIdentity, again: str) -> None:
    """Refuse a file in RUN/analysis that was made from other fits than the run has now.

    Args:
        path: the file.
        found: the fits that it was made from.
        here: the fits that the run has now.
        again: what to do about a file that cannot be used.

    Raises:
        TokscaleError: naming the file, the first difference, and what to do.
    """
    for name, difference in _DIFFERENCES.items():
        if getattr(found, name) != getattr(here, name):
            raise TokscaleError(f"{path} is {difference} than the run has now; {again}")


def non_finite_line(counts: NonFiniteLosses) -> list[str]:
    """Return the line that counts losses that are not finite; no line if all are finite."""
    if not counts.losses:
        return []
    return [
        f"  {counts.losses:,} losses of {counts.tokens:,} of {counts.of_tokens:,} tokens "
        "are NaN or infinite; these tokens are left out of every mean"
    ]


@dataclass(frozen=True)
class FittedRun:
    """A run and its fits, which belong together. Make one with `FittedRun.open`.

    Attributes:
        run: the run.
        x_K: natural logarithm of time at the probes.
        time: the unit that time is counted in.
        fit: the content of fit.json.
    """

    run: Run
    x_K: Floats
    time: Time
    fit: FitSummary

    @classmethod
    def open(cls, run: Run) -> Self:
        """Open a run whose fits are whole and made from its present losses.

        The file of the fits is read once for its checksum.

        Raises:
            TokscaleError: the run is not fitted, or fitted on other losses, or a file is damaged.
        """
        fit = read_fit(run)
        path = run.paths.fits
        again = f"run `megatron-tokscale fit {run.path}` again"
        if not path.is_file():
            raise TokscaleError(f"{path} is not there; {again}")
        try:
            found = file_checksum(path)
        except OSError as error:
            raise TokscaleError(f"cannot read {path}: {error.strerror or error}") from error
        if found != fit.fits_crc32:
            raise TokscaleError(
                f"{path} is damaged, or was not written together with fit.json; {again}"
            )
        time = fit.identity.time
        return cls(run, run.x_K(time), time, fit)

    @cached_property
    def shift_DK(self) -> Floats:
        """Common shifts in nats that the fits are without, of each dataset; zero if left in.

        The measured mean loss of a dataset is the mean of the losses of `blocks` plus its shifts.
        Slopes and their ceilings need that mean: without the shifts it would look free of noise.
        """
        if self.fit.common_shifts is None:
            return np.zeros((len(self.run.tokens.datasets), len(self.x_K)))
        return shift_table(self.fit.common_shifts)

    def fitted_losses(self, tokens: slice) -> Floats32:
        """Return the losses of a slice of the tokens as they were fitted: without common shifts."""
        loss_NK = self.run.read_losses(tokens.start, tokens.stop)
        if not self.shift_DK.any():
            return loss_NK
        return without_shifts(loss_NK, self.shift_DK, self.run.tokens.rows(tokens).dataset_N)

    def check_complete(self) -> None:
        """Refuse a run of which no token has finite losses at all probes.

        Raises:
            TokscaleError: naming the probes that miss most losses.
        """
        n_tokens = self.fit.n_tokens
        if self.fit.non_finite.tokens < n_tokens:
            return
        if self.fit.status[FitStatus.NON_FINITE.label] == n_tokens:
            raise TokscaleError(
                f"no token of {self.run.path} has five finite losses at its {len(self.x_K)} "
                "probes, so there is nothing to analyse; train on, or restore the losses"
            )
        missing_K = np.array(self.fit.non_finite_K)
        worst = [k for k in np.argsort(-missing_K, kind="stable")[:3] if missing_K[k]]
        named = ", ".join(
            f"{self.run.step_K[k]} ({missing_K[k]:,} of {n_tokens:,} not finite)" for k in worst
        )
        raise TokscaleError(
            f"no token of {self.run.path} has a fit and finite losses at all {len(missing_K)} "
            f"probes; most miss at steps {named}; move the losses of such steps out of "
            f"{self.run.paths.losses} and run `megatron-tokscale fit` again"
        )

    def blocks(self) -> Iterator[Block]:
        """Yield all tokens once, by blocks: (slice of tokens, their fits, their losses).

        The losses are those that were fitted, without the common shifts: residuals, widths and
        covariances of falls are of single tokens, and a shift of all tokens is none of theirs.

        Raises:
            TokscaleError: the fits are damaged, or are not those of all tokens.
        """
        at = 0
        # A row group of the parquet is divided further, so that a block's losses fit into memory.
        block = max(_VALUES_PER_READ // len(self.x_K), 1)
        for group in SigmoidFits.blocks(self.run.paths.fits):
            for start in range(0, len(group), block):
                fits = group.rows(slice(start, start + block))
                where = slice(at, at + len(fits))
                yield where, fits, self.fitted_losses(where)
                at = where.stop
        if at != self.run.n_tokens:
            raise TokscaleError(
                f"{self.run.paths.fits} has fits of {at} tokens; expected {self.run.n_tokens}; "
                f"run `megatron-tokscale fit {self.run.path}` again"
            )

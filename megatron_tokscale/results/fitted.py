"""A run and its fits, checked to belong together; what every later analysis says it was made of.

Shapes: K probe steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.checked import file_checksum, read_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import FIT_SCHEMA
from megatron_tokscale.fit import SigmoidFits, fits_path
from megatron_tokscale.store import Run

_VALUES_PER_READ = 2**24
_MADE_OF: Final = {
    "probe_fingerprint": "of other probes",
    "run_id": "of another run",
    "steps": "of other probes",
    "losses_crc32": "of other losses",
    "time": "of another time",
    "fit_id": "of other fits",
}
"""The sources that an analysis names, and their check against the run as it is now."""

Block = tuple[slice, SigmoidFits, NDArray[np.float32]]


def read_fit(run: Run) -> dict[str, Any]:
    """Return the content of fit.json, if it is of the losses that the run has now.

    The checksums of all losses are verified first, also for an analysis that reads none: damage is
    told before any file is written, and by every verb alike.

    Raises:
        TokscaleError: the run is not fitted, a losses file is damaged, or fit.json is damaged,
            older or of other losses.
    """
    path = run.paths.fit
    verb = f"run `megatron-tokscale fit {run.path}`"
    if not path.is_file():
        raise TokscaleError(f"{path} is not there; {verb} first")
    content = read_result(path, FIT_SCHEMA, f"{verb} again")
    here = {
        "run_id": run.info.run_id,
        "probe_fingerprint": run.probe_set.fingerprint,
        "steps": run.step_K.tolist(),
        "losses_crc32": list(run.checksums().values()),
    }
    check_made_of(path, content, here, f"{verb} again")
    run.verify()
    return content


def heading(fit: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an analysis of the fits that fit.json (`fit`) tells of is made of."""
    return {name: fit[name] for name in _MADE_OF}


def non_finite(fit: Mapping[str, Any]) -> dict[str, int]:
    """Return how many losses are not finite, of how many of all tokens, from fit.json (`fit`)."""
    counts = fit["non_finite"]
    return {"losses": counts["losses"], "tokens": counts["tokens"], "of_tokens": fit["n_tokens"]}


def non_finite_line(counts: Mapping[str, int]) -> list[str]:
    """Return what to say of `non_finite` in a terminal: a line, or none."""
    if not counts["losses"]:
        return []
    return [
        f"  {counts['losses']:,} losses of {counts['tokens']:,} of {counts['of_tokens']:,} tokens "
        "are NaN or infinite; these tokens are left out of every mean"
    ]


def check_made_of(
    path: Path, content: Mapping[str, Any], here: Mapping[str, Any], again: str
) -> None:
    """Refuse a file in RUN/analysis that was made of anything else than the run has now.

    Args:
        content: what it holds.
        here: what the run has, as `heading` names it.
        again: what to do about a file that cannot be used.

    Raises:
        TokscaleError: naming the file, the first difference, and what to do.
    """
    for name, value in here.items():
        if content.get(name) != value:
            raise TokscaleError(f"{path} is {_MADE_OF[name]} than the run has now; {again}")


@dataclass(frozen=True)
class FittedRun:
    """A run and its fits, which belong together. Make one with `FittedRun.open`.

    Attributes:
        x_K: natural logarithm of time at the probes.
        time: what time is counted in.
        fit: the content of fit.json.
    """

    run: Run
    x_K: NDArray[np.float64]
    time: Any
    fit: dict[str, Any]

    @staticmethod
    def open(run: Run) -> "FittedRun":
        """Check that the run is fitted, on the losses that it has now, and that its fits are whole.

        The file of the fits is read once for its checksum.

        Raises:
            TokscaleError: it is not.
        """
        fit = read_fit(run)
        path = fits_path(run)
        again = f"run `megatron-tokscale fit {run.path}` again"
        if not path.is_file():
            raise TokscaleError(f"{path} is not there; {again}")
        try:
            found = file_checksum(path)
        except OSError as error:
            raise TokscaleError(f"cannot read {path}: {error.strerror or error}") from error
        if found != fit["fits_crc32"]:
            raise TokscaleError(
                f"{path} is damaged, or was not written together with fit.json; {again}"
            )
        return FittedRun(run, run.x_K(fit["time"]), fit["time"], fit)

    def check_complete(self) -> None:
        """Refuse a run of which no token has finite losses at all probes.

        Raises:
            TokscaleError: naming the probes that miss most.
        """
        n_tokens, missing = self.fit["n_tokens"], self.fit["non_finite"]
        if missing["tokens"] < n_tokens:
            return
        if self.fit["status"]["non-finite"] == n_tokens:
            raise TokscaleError(
                f"no token of {self.run.path} has five finite losses at its {len(self.x_K)} "
                "probes, so there is nothing to analyse; train on, or restore the losses"
            )
        missing_K = np.array(missing["losses_K"])
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
        """Tokens as (where they are, their fits, their losses), all of them once.

        Raises:
            TokscaleError: the fits are damaged, or are not those of all tokens.
        """
        at = 0
        block = max(_VALUES_PER_READ // len(self.x_K), 1)
        for group in SigmoidFits.blocks(fits_path(self.run)):
            for start in range(0, len(group), block):
                fits = group.rows(slice(start, start + block))
                where = slice(at, at + len(fits))
                yield where, fits, self.run.read_losses(where.start, where.stop)
                at = where.stop
        if at != self.run.n_tokens:
            raise TokscaleError(
                f"{fits_path(self.run)} has fits of {at} tokens, the run has {self.run.n_tokens}; "
                f"run `megatron-tokscale fit {self.run.path}` again"
            )

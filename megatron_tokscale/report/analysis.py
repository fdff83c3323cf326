"""What `fit_run`, `spectrum_run` and others left of a run, read and checked to belong together.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.fit import SigmoidFits, fits_path, read_metadata
from megatron_tokscale.report.optional import AxisSpectrum, read_axes, read_laws, read_transfer
from megatron_tokscale.report.planned import DrawnPlan, read_plan
from megatron_tokscale.report.read import read_arrays, read_result
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time

_SCHEMAS = {"fit.json": 1, "spectrum.json": 2, "reconstruction.json": 2}


@dataclass(frozen=True)
class Analysis:
    """A run with everything computed from it. Make one with `Analysis.load`.

    Attributes:
        run: the run.
        time: the time axis of the fits: "step", "tokens" or "lr-sum".
        fits: the fits of all N tokens.
        fit: the content of fit.json.
        spectrum: the content of spectrum.json.
        reconstruction: the content of reconstruction.json.
        arrays: the arrays of spectrum.npz by name.
        transfer: the entries of transfer.json, one per run whose learning times were tested here.
        laws: the content of laws.json; None if there is none.
        axes: spectra over runs of growing size.
        plan: the data plan that the run followed, and what it drew; None if there is none.
    """

    run: Run
    time: Time
    fits: SigmoidFits
    fit: dict[str, Any]
    spectrum: dict[str, Any]
    reconstruction: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    transfer: tuple[dict[str, Any], ...]
    laws: dict[str, Any] | None
    axes: tuple[AxisSpectrum, ...]
    plan: DrawnPlan | None

    @staticmethod
    def load(run: Run, axes: Sequence[Path] = ()) -> "Analysis":
        """Read RUN/analysis, and the folders of spectra along D and M.

        Raises:
            TokscaleError: a file is missing or damaged, of another schema, or of other probes than
                the run has now.
        """
        names = ("spectrum.npz", *_SCHEMAS)
        needed = [fits_path(run), *(run.analysis / name for name in names)]
        missing = [path.name for path in needed if not path.is_file()]
        verbs = [f"`megatron-tokscale {verb} {run.path}`" for verb in ("fit", "spectrum")]
        if missing:
            raise TokscaleError(
                f"{run.analysis} has no {missing[0]}; run {verbs[0]} and {verbs[1]} first"
            )
        made_of = read_metadata(fits_path(run))
        fit, spectrum, reconstruction = (
            read_result(run.analysis / name, schema, f"run {verbs[int(name != 'fit.json')]} again")
            for name, schema in _SCHEMAS.items()
        )
        arrays = read_arrays(run.analysis / "spectrum.npz", f"run {verbs[1]} again")
        time: Time = made_of["time"]
        here = (run.probe_set.fingerprint, run.step_K.tolist(), time)
        of_fits = (made_of["probe_fingerprint"], made_of["steps"], fit["time"])
        steps = arrays["step_K"].tolist()
        of_spectrum = (reconstruction["probe_fingerprint"], steps, reconstruction["time"])
        if not here == of_fits == of_spectrum:
            raise TokscaleError(
                f"{run.analysis} is of other probes or another time than the run has now; run "
                f"{verbs[0]} and {verbs[1]} again"
            )
        return Analysis(
            run,
            time,
            SigmoidFits.load(fits_path(run)),
            fit,
            spectrum,
            reconstruction,
            arrays,
            read_transfer(run, time),
            read_laws(run, time, reconstruction),
            read_axes(run, axes),
            read_plan(run),
        )

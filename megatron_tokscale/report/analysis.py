"""What `fit_run`, `spectrum_run` and others left of a run, read and checked to belong together.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_tokscale.fit import SigmoidFits, fits_path
from megatron_tokscale.laws.explain import explanations
from megatron_tokscale.report.sections.plan.drawn_plan import DrawnPlan, read_plan
from megatron_tokscale.results import (
    AxisResult,
    FittedRun,
    SpectrumResult,
    read_axis,
    read_laws,
    read_transfer,
)
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time


@dataclass(frozen=True)
class Analysis:
    """A run with everything computed from it. Make one with `Analysis.load`.

    Attributes:
        time: the time axis of the fits: "step", "tokens" or "lr-sum".
        fits: the fits of all N tokens.
        fit: the content of fit.json.
        spectrum: the content of spectrum.json.
        reconstruction: the content of reconstruction.json.
        arrays: the arrays of spectrum.npz by name.
        transfer: the entries of transfer.json, one per run whose learning times were tested here.
        laws: the content of laws.json; None if there is none.
        axes: losses over runs of growing size.
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
    axes: tuple[AxisResult, ...]
    plan: DrawnPlan | None

    @staticmethod
    def load(run: Run, axes: Sequence[Path] = ()) -> "Analysis":
        """Read RUN/analysis, and the folders of the axes D and M.

        Raises:
            TokscaleError: a file is missing or damaged, of another schema, or of other probes than
                the run has now.
        """
        fitted = FittedRun.open(run)
        spectrum = SpectrumResult.open(run)
        reconstruction = spectrum.reconstruction
        laws = read_laws(run, fitted.fit)
        if laws is not None:
            laws |= {"explanations": explanations(laws, reconstruction)}
        return Analysis(
            run,
            fitted.time,
            SigmoidFits.load(fits_path(run)),
            fitted.fit,
            spectrum.about,
            reconstruction,
            spectrum.arrays,
            read_transfer(run, fitted.fit),
            laws,
            tuple(read_axis(run, folder) for folder in axes),
            read_plan(run),
        )

"""What `fit_run` and `spectrum_run` left on disk, read and checked to belong together.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins.
"""

import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, read_json
from megatron_tokscale.fit import SigmoidFits, fits_path, read_metadata
from megatron_tokscale.store import Run

SCHEMA_VERSION = 1
_JSON = ("fit.json", "spectrum.json", "reconstruction.json")


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
    """

    run: Run
    time: str
    fits: SigmoidFits
    fit: dict[str, Any]
    spectrum: dict[str, Any]
    reconstruction: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @staticmethod
    def load(run: Run) -> "Analysis":
        """Read RUN/analysis.

        Raises:
            TokscaleError: a file is missing or damaged, or of other probes than the run has now.
        """
        needed = [fits_path(run), run.analysis / "spectrum.npz", *(run.analysis / n for n in _JSON)]
        missing = [path.name for path in needed if not path.is_file()]
        if missing:
            raise TokscaleError(
                f"{run.analysis} has no {missing[0]}; run `megatron-tokscale fit {run.path}` and "
                f"`megatron-tokscale spectrum {run.path}` first"
            )
        made_of = read_metadata(fits_path(run))
        fit, spectrum, reconstruction = (read_json(run.analysis / name) for name in _JSON)
        for name, content in zip(_JSON, (fit, spectrum, reconstruction), strict=True):
            check_schema(run.analysis / name, int(content["schema_version"]), SCHEMA_VERSION)
        arrays = _read_arrays(run)
        here = (run.probe_set.fingerprint, run.step_K.tolist(), made_of["time"])
        of_fits = (made_of["probe_fingerprint"], made_of["steps"], fit["time"])
        steps = arrays["step_K"].tolist()
        of_spectrum = (reconstruction["probe_fingerprint"], steps, reconstruction["time"])
        if not here == of_fits == of_spectrum:
            raise TokscaleError(
                f"{run.analysis} is of other probes or another time than the run has now; run "
                f"`megatron-tokscale fit {run.path}` and `megatron-tokscale spectrum {run.path}` "
                "again"
            )
        fits = SigmoidFits.load(fits_path(run))
        return Analysis(run, str(made_of["time"]), fits, fit, spectrum, reconstruction, arrays)


def _read_arrays(run: Run) -> dict[str, NDArray[Any]]:
    path = run.analysis / "spectrum.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file.items())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise TokscaleError(
            f"{path} is damaged ({error}); run `megatron-tokscale spectrum {run.path}` again"
        ) from error

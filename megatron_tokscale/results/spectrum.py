"""The spectrum that `megatron-tokscale spectrum` left in a run, and its evidence."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from megatron_tokscale.core.checked import read_arrays, read_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import SPECTRUM_SCHEMA
from megatron_tokscale.results.fitted import check_made_of, heading, read_fit
from megatron_tokscale.store import Run


@dataclass(frozen=True)
class SpectrumResult:
    """The content of spectrum.npz, spectrum.json and reconstruction.json, of the run as it is.

    Attributes:
        time: what time is counted in.
        fit: the content of fit.json.
        about: the content of spectrum.json.
        reconstruction: the content of reconstruction.json.
        arrays: the arrays of spectrum.npz by name.
    """

    run: Run
    time: Any
    fit: dict[str, Any]
    about: dict[str, Any]
    reconstruction: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @staticmethod
    def open(run: Run) -> "SpectrumResult":
        """Read the spectrum of a run.

        Raises:
            TokscaleError: the run is not fitted or has no spectrum; a file is damaged, of another
                schema, of another file's writing, or of other fits than the run has now.
        """
        verb = f"run `megatron-tokscale spectrum {run.path}`"
        path = run.paths.spectrum_arrays
        about_path, evidence_path = run.paths.spectrum, run.paths.reconstruction
        fit = read_fit(run)
        for file in (path, about_path, evidence_path):
            if not file.is_file():
                raise TokscaleError(f"{file} is not there; {verb} first")
        about, reconstruction = (
            read_result(file, SPECTRUM_SCHEMA, f"{verb} again")
            for file in (about_path, evidence_path)
        )
        for file, content in ((about_path, about), (evidence_path, reconstruction)):
            check_made_of(file, content, heading(fit), f"{verb} again")
        if reconstruction["arrays_crc32"] != about["arrays_crc32"]:
            raise TokscaleError(f"{evidence_path} is of another spectrum; {verb} again")
        arrays = read_arrays(path, about["arrays_crc32"], f"{verb} again")
        return SpectrumResult(run, fit["time"], fit, about, reconstruction, arrays)

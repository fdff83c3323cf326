"""What a report shows if it is there: transfer from other runs, laws, and spectra along D and M.

Shapes: G grid points, R resamples (the first is the data as they are), K runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.laws.explain import explanations
from megatron_tokscale.laws.run import SCHEMA_VERSION as LAWS_SCHEMA
from megatron_tokscale.report.read import read_arrays, read_result
from megatron_tokscale.spectrum.axes import SCHEMA_VERSION as AXIS_SCHEMA
from megatron_tokscale.spectrum.between import SCHEMA_VERSION as TRANSFER_SCHEMA
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time


@dataclass(frozen=True)
class AxisSpectrum:
    """The spectrum over runs of growing size.

    Attributes:
        result: the content of axis.json.
        arrays: the arrays of axis.npz by name: x_K, x_G, measured_RG, drop_weighted_RG, ...
    """

    result: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def read_transfer(run: Run, time: Time) -> tuple[dict[str, Any], ...]:
    """The entries of transfer.json; none if there is no such file.

    Raises:
        TokscaleError: it is damaged, of another schema, or an entry is of other probes or another
            time than the run has now.
    """
    path = run.analysis / "transfer.json"
    if not path.is_file():
        return ()
    again = f"remove it, and test again: `megatron-tokscale spectrum {run.path} --from OTHER-RUN`"
    content = read_result(path, TRANSFER_SCHEMA, again)
    here = (run.probe_set.fingerprint, time, run.step_K.tolist())
    for entry in content["from"]:
        if (entry["probe_fingerprint"], entry["time"], entry.get("steps")) != here:
            raise TokscaleError(
                f"{path} has an entry ({entry['source']}) that is older, or of other probes or "
                f"another time than the run has now; {again}"
            )
    return tuple(content["from"])


def read_laws(run: Run, time: Time, reconstruction: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of laws.json, its explanations with the spectrum as it is now; None without it.

    Raises:
        TokscaleError: it is damaged, of another schema, or of other probes or another time than the
            run has now.
    """
    path = run.analysis / "laws.json"
    if not path.is_file():
        return None
    again = f"run `megatron-tokscale laws {run.path}` again, with the other runs if there were any"
    laws = read_result(path, LAWS_SCHEMA, again)
    here = (run.probe_set.fingerprint, time, run.step_K.tolist())
    if (laws["probe_fingerprint"], laws["time"], laws["steps"]) != here:
        raise TokscaleError(
            f"{path} is of other probes or another time than the run has now; {again}"
        )
    return laws | {"explanations": explanations(laws, reconstruction)}


def read_axes(run: Run, folders: Sequence[Path]) -> tuple[AxisSpectrum, ...]:
    """What `axis_run` left in these folders.

    Raises:
        TokscaleError: a file is missing or damaged, of another schema or of another probe set.
    """
    again = "run `megatron-tokscale spectrum --axis D|M RUN ... --out` again"
    axes = []
    for folder in folders:
        result = read_result(folder / "axis.json", AXIS_SCHEMA, again)
        if result["probe_fingerprint"] != run.probe_set.fingerprint:
            raise TokscaleError(
                f"the runs of {folder} watch other tokens than {run.path}; show axes of runs with "
                "the same probe set"
            )
        axes.append(AxisSpectrum(result, read_arrays(folder / "axis.npz", again)))
    return tuple(axes)

"""Optional results of a run: transfer from other runs, losses along D and M."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_tokscale.core.checked import read_arrays, read_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there, read_json, schema_version
from megatron_tokscale.core.schemas import AXIS_SCHEMA, TRANSFER_SCHEMA
from megatron_tokscale.results.fitted import check_made_of, heading
from megatron_tokscale.store import Run


@dataclass(frozen=True)
class AxisResult:
    """The losses over runs of growing size. G grid points, R resamples, K runs.

    Attributes:
        result: the content of axis.json.
        arrays: the arrays of axis.npz by name: x_K, mean_loss_RK, x_G, measured_RG.
    """

    result: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def read_transfer(run: Run, fit: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the entries of transfer.json, each of the fits in `fit`; none without such a file.

    Raises:
        TokscaleError: it is damaged, of another schema, or an entry is of other fits.
    """
    path = run.analysis / "transfer.json"
    if not is_there(path):
        return ()
    again = f"remove it, and test again: `megatron-tokscale spectrum {run.path} --source OTHER-RUN`"
    entries = read_result(path, TRANSFER_SCHEMA, again)["from"]
    for entry in entries:
        check_made_of(path, entry, heading(fit), f"it has {entry['source']}; {again}")
    return tuple(entries)


def known_transfers(run: Run, fit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of transfer.json that a new one may stand beside: those of the same fits.

    Raises:
        TokscaleError: it is damaged, or of a newer schema.
    """
    path = run.analysis / "transfer.json"
    again = "remove it, and test again"
    if not is_there(path) or schema_version(path, read_json(path)) < TRANSFER_SCHEMA:
        return []
    here = heading(fit)
    entries = read_result(path, TRANSFER_SCHEMA, again)["from"]
    return [each for each in entries if here == {name: each.get(name) for name in here}]


def read_axis(run: Run, folder: Path) -> AxisResult:
    """Read what `axis_run` left in a folder, of runs that watch the tokens of `run`.

    Raises:
        TokscaleError: a file is missing or damaged, of another schema or of another probe set.
    """
    again = "run `megatron-tokscale spectrum --axis D|M RUN ... --out` again"
    result = read_result(folder / "axis.json", AXIS_SCHEMA, again)
    if result["probe_fingerprint"] != run.probe_set.fingerprint:
        raise TokscaleError(
            f"the runs of {folder} watch other tokens than {run.path}; show axes of runs with "
            "the same probe set"
        )
    return AxisResult(result, read_arrays(folder / "axis.npz", result["arrays_crc32"], again))

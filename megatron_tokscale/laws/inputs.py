"""What laws read of a run: its spectrum's files, checked.

Shapes: K probe steps, R resamples of the documents (the first is the data as they are), D datasets,
C bins of x, F groups of tokens by frequency, I fine bins of frequency.
"""

import math
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, read_json
from megatron_tokscale.store import Run

SPECTRUM_SCHEMA_VERSION = 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Inputs:
    """The arrays of spectrum.npz that laws need, and what spectrum.json says of them.

    Attributes:
        time: what time is counted in.
        t_K: time of the probes.
        mean_loss_RK: mean loss in nats.
        mean_loss_RDK: by dataset.
        x_C: centres of the bins of x.
        drop_RC: drop of the learning events per bin, nats per token.
        margin: two typical widths of a transition: later than that before the last probe it has not
            shown its floor (our choice).
        frequency_loss_RFK: mean loss of deciles of the tokens by frequency.
        frequency_share_F: their shares of the tokens.
        frequency_I: frequency, as a share of all tokens.
        frequency_time_I: learning time of the tokens of that frequency.
        domains: names of the datasets.
    """

    time: str
    t_K: Array
    mean_loss_RK: Array
    mean_loss_RDK: Array
    x_C: Array
    drop_RC: Array
    margin: float
    frequency_loss_RFK: Array
    frequency_share_F: Array
    frequency_I: Array
    frequency_time_I: Array
    domains: tuple[str, ...]

    @property
    def last_x(self) -> float:
        """Logarithm of the last time."""
        return math.log(self.t_K[-1])

    @staticmethod
    def load(run: Run) -> "Inputs":
        """Read the spectrum of a run.

        Raises:
            TokscaleError: there is none, it is damaged, of another version or of other probes.
        """
        path, about_path = run.analysis / "spectrum.npz", run.analysis / "spectrum.json"
        remedy = f"run `megatron-tokscale spectrum {run.path}`"
        for file in (path, about_path):
            if not file.is_file():
                raise TokscaleError(f"{file} is not there; {remedy} first")
        about = read_json(about_path)
        version = int(about.get("schema_version", 0))
        check_schema(about_path, version, SPECTRUM_SCHEMA_VERSION)
        if version < SPECTRUM_SCHEMA_VERSION:
            raise TokscaleError(f"{about_path} is of an older version; {remedy} again")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays: dict[str, Any] = dict(file)
            inputs = _inputs(about, arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise TokscaleError(f"{path} is damaged ({error!r}); {remedy} again") from error
        if about.get("probe_fingerprint") != run.probe_set.fingerprint or not np.array_equal(
            arrays["step_K"], run.step_K
        ):
            raise TokscaleError(f"{path} is of other probes than the run has now; {remedy} again")
        return inputs


def _inputs(about: dict[str, Any], arrays: dict[str, Any]) -> Inputs:
    names = (
        *("mean_loss_RK", "mean_loss_RDK", "x_C", "drop_RC"),
        *("frequency_loss_RFK", "frequency_share_F", "frequency_I", "frequency_time_I"),
    )
    return Inputs(
        time=str(about["time"]),
        t_K=np.exp(arrays["x_K"]),
        margin=2 * max(about["bandwidth_x"], about["common_width_x"] or 0.0),
        domains=tuple(str(domain["name"]) for domain in about["domains"]),
        **{name: arrays[name].astype(np.float64) for name in names},
    )

"""`laws_run`: from a run's spectrum and mean losses to laws.json.

Shapes: K probe steps, G grid points, D datasets.
"""

import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, read_json, write_json
from megatron_tokscale.laws.huber import Array
from megatron_tokscale.laws.power_law import DISCARDED, fit_power_law
from megatron_tokscale.laws.tail import tail_exponent
from megatron_tokscale.store import Run

SCHEMA_VERSION = 1
_SPECTRUM_SCHEMA_VERSION = 1
_OTHER_STARTS = (0.01, 0.03, 0.3)


@dataclass(frozen=True)
class _Spectrum:
    """What laws need of spectrum.npz and spectrum.json."""

    time: str
    domains: tuple[str, ...]
    margin: float
    bandwidth: float
    t_K: Array
    mean_loss_K: Array
    mean_loss_DK: Array
    x_G: Array
    drop_weighted_G: Array


def laws_run(
    run: Run, *, from_: float | None = None, n_resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Power laws of a run's mean losses and the exponent of its spectrum's tail, to laws.json.

    The tail starts where the fit of the loss does and ends two typical widths of a transition
    before the last probe, later than which a transition has not shown its floor (our choice).
    Both exponents come from the same losses: agreement is a consistency of the run with papers.md
    1.4, not two measurements.

    Args:
        run: an opened run with RUN/analysis/spectrum.npz and spectrum.json.
        from_: first time to fit, in the spectrum's time; by default a tenth of the last.
        n_resamples: bootstrap resamples of each fit.
        seed: of the bootstrap.

    Returns:
        The content of laws.json; null, with a reason, where a law is not defined.

    Raises:
        TokscaleError: the run has no spectrum, or one of other probes.
    """
    spectrum = _load_spectrum(run)
    end = float(spectrum.t_K[-1])
    start = DISCARDED * end if from_ is None else from_

    def law(loss_K: Array, first: float = start) -> dict[str, Any]:
        return _or_reason(
            "power_law",
            lambda: asdict(
                fit_power_law(spectrum.t_K, loss_K, from_=first, n_resamples=n_resamples, seed=seed)
            ),
        )

    overall = law(spectrum.mean_loss_K)
    tail = _or_reason("tail", lambda: _tail(spectrum, start))
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "time": spectrum.time,
        "probe_fingerprint": run.probe_set.fingerprint,
        "overall": overall,
        "datasets": [
            {"name": name, **law(loss_K)}
            for name, loss_K in zip(spectrum.domains, spectrum.mean_loss_DK, strict=True)
        ],
        "other_starts": [
            {"from": share * end, **law(spectrum.mean_loss_K, share * end)}
            for share in _OTHER_STARTS
        ],
        "spectrum": tail,
        "tail_minus_law": _difference(tail["tail"], overall["power_law"]),
        "settings": {"from": start, "n_resamples": n_resamples, "seed": seed},
    }
    write_json(run.analysis / "laws.json", result)
    return result


def _or_reason(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {name: compute(), "undefined": None}
    except TokscaleError as error:
        return {name: None, "undefined": str(error)}


def _tail(spectrum: _Spectrum, start: float) -> dict[str, Any]:
    first = math.log(start) if start > 0 else float(spectrum.x_G[0])
    return asdict(
        tail_exponent(
            spectrum.x_G,
            spectrum.drop_weighted_G,
            from_x=first,
            to_x=float(spectrum.x_G[-1]) - spectrum.margin,
            bandwidth=spectrum.bandwidth,
        )
    )


def _difference(tail: dict[str, Any] | None, law: dict[str, Any] | None) -> dict[str, float] | None:
    """Difference of the exponents; its error takes theirs as independent, which they nearly are.

    The tail's error comes from the scatter of learning times, the law's from that of the losses.
    """
    if tail is None or law is None:
        return None
    return {
        "difference": tail["exponent"] - law["exponent"],
        "se": math.hypot(tail["se"], law["exponent_se"]),
    }


def _load_spectrum(run: Run) -> _Spectrum:
    path, about_path = run.analysis / "spectrum.npz", run.analysis / "spectrum.json"
    remedy = f"run `megatron-tokscale spectrum {run.path}`"
    for file in (path, about_path):
        if not file.is_file():
            raise TokscaleError(f"{file} is not there; {remedy} first")
    about = read_json(about_path)
    check_schema(about_path, int(about.get("schema_version", 0)), _SPECTRUM_SCHEMA_VERSION)
    try:
        arrays = _read_arrays(path)
        widths = [about["bandwidth_x"], about["common_width_x"] or 0.0]
        spectrum = _Spectrum(
            time=str(about["time"]),
            domains=tuple(str(domain["name"]) for domain in about["domains"]),
            margin=2 * max(widths),
            bandwidth=float(widths[0]),
            t_K=np.exp(arrays["x_K"]),
            mean_loss_K=arrays["mean_loss_K"],
            mean_loss_DK=arrays["mean_loss_DK"],
            x_G=arrays["x_G"],
            drop_weighted_G=arrays["drop_weighted_G"],
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise TokscaleError(f"{path} is damaged ({error!r}); {remedy} again") from error
    if about.get("probe_fingerprint") != run.probe_set.fingerprint or not np.array_equal(
        arrays["step_K"], run.step_K
    ):
        raise TokscaleError(f"{path} is of other probes than the run has now; {remedy} again")
    return spectrum


def _read_arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        names = ("step_K", "x_K", "mean_loss_K", "mean_loss_DK", "x_G", "drop_weighted_G")
        return {name: file[name] for name in names}

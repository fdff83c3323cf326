"""Learnability of datasets: the part of their learning-time spectrum that lies just ahead.

Shapes: D datasets, G grid points, K probe steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import listed
from megatron_tokscale.data.plan_parts import DatasetIdentity
from megatron_tokscale.results import SpectrumResult
from megatron_tokscale.store import Run


@dataclass(frozen=True, eq=False)
class Spectra:
    """Learning-time spectra of the datasets of a reference run, and its time in samples.

    Attributes:
        names: the datasets.
        x_G: natural logarithm of the run's time, ascending.
        density_DG: drop-weighted spectrum in nats per token of that dataset and unit of x.
        x_K: natural logarithm of the run's time at its probes after step 0, ascending.
        log_samples_K: natural logarithm of the samples consumed at these probes, ascending.
    """

    names: tuple[str, ...]
    x_G: Floats
    density_DG: Floats
    x_K: Floats
    log_samples_K: Floats

    def x_at(self, n_samples: float) -> float:
        """Return the run's x when it had consumed `n_samples`, at most its end.

        Between probes the logarithms are interpolated linearly, which is exact while the batch
        size is constant; before the first probe the batch size is taken as at that probe.
        """
        log_samples = float(np.log(n_samples))
        if log_samples < self.log_samples_K[0]:
            return float(self.x_K[0]) + log_samples - float(self.log_samples_K[0])
        return float(np.interp(log_samples, self.log_samples_K, self.x_K))

    @property
    def n_samples(self) -> float:
        """Samples that the run had consumed at its last probe, where the spectra end."""
        return float(np.exp(self.log_samples_K[-1]))

    def learnability_D(self, start: float, stop: float) -> Floats:
        """Return the drop in nats per token learned between two counts of consumed samples."""
        edges = [self.x_at(start), self.x_at(stop)]
        drop_D2 = np.array([np.interp(edges, self.x_G, row) for row in self.learned_DG])
        return np.asarray(np.maximum(drop_D2[:, 1] - drop_D2[:, 0], 0.0))

    @cached_property
    def learned_DG(self) -> Floats:
        """Drop in nats per token whose learning time lies before each grid point."""
        mean_DH = (self.density_DG[:, 1:] + self.density_DG[:, :-1]) / 2
        return np.pad(np.cumsum(mean_DH * np.diff(self.x_G), axis=1), ((0, 0), (1, 0)))

    def select(self, names: Sequence[str]) -> "Spectra":
        """Return the spectra of `names`, in that order.

        Raises:
            TokscaleError: the run did not watch one of them.
        """
        _refuse_missing([name for name in names if name not in self.names], self.names)
        rows = [self.names.index(name) for name in names]
        return Spectra(tuple(names), self.x_G, self.density_DG[rows], self.x_K, self.log_samples_K)


def watched_names(run: Run, datasets: Sequence[DatasetIdentity]) -> list[str]:
    """Return the names of a job's datasets in a run's probe set.

    Raises:
        TokscaleError: the run did not watch one of them, or namesakes cannot be told apart.
    """
    names = run.probe_set.datasets
    found = run.probe_set.dataset_indices([dataset.path for dataset in datasets])
    rows = zip(datasets, found, strict=True)
    _refuse_missing([dataset.path for dataset, index in rows if index is None], names)
    return [names[index] for index in found if index is not None]


def _refuse_missing(missing: Sequence[str], watched: Sequence[str]) -> None:
    if missing:
        raise TokscaleError(
            f"the run with the spectrum watched no tokens of {listed(missing)}, only of "
            f"{listed(watched)}; expected all training datasets; build the probe set from them"
        )


def read_spectra(run: Run) -> Spectra:
    """Read the spectra per dataset that `megatron-tokscale spectrum` wrote into a run.

    Raises:
        TokscaleError: the run has no spectrum, a damaged spectrum or one made from other fits than
            its present ones, or no record of consumed samples.
    """
    spectrum = SpectrumResult.open(run)
    path = run.paths.spectrum_arrays
    datasets = spectrum.summary.datasets
    watched = [dataset.n_tokens > 0 for dataset in datasets]
    names = tuple(dataset.name for dataset in datasets)
    x_G, density_DG = spectrum.arrays.x_G, spectrum.arrays.drop_weighted_DG
    if density_DG.shape != (len(names), len(x_G)) or not np.isfinite(density_DG).all():
        raise TokscaleError(
            f"the spectrum {path} has shape {density_DG.shape} or values that are not finite; "
            f"expected {len(names)} datasets and {len(x_G)} grid points; make it again with "
            "`megatron-tokscale spectrum`"
        )
    spectra = Spectra(names, x_G, density_DG, *_time_in_samples(run, run.x_K(spectrum.time)))
    return spectra.select([names[d] for d in np.flatnonzero(watched)])


def _time_in_samples(run: Run, x_K: Floats) -> tuple[Floats, Floats]:
    """Return x and ln(consumed samples) of a run's probes after the first samples.

    Raises:
        TokscaleError: the probes do not hold the consumed samples.
    """
    samples_K = np.array([record.consumed_samples for record in run.records], dtype=np.float64)
    taken = samples_K > 0
    if taken.sum() < 2 or (np.diff(samples_K[taken]) <= 0).any():
        raise TokscaleError(
            f"the probes of {run.path} do not hold its consumed samples; expected ascending counts "
            "at two steps or more; give another run"
        )
    return x_K[taken].astype(np.float64), np.log(samples_K[taken])

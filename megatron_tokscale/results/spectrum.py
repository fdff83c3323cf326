"""The spectrum that `megatron-tokscale spectrum` wrote into a run, and its evidence.

Shapes: K probe steps, R resamples (the first is the data as they are), D datasets, G grid points of
x, C bins of x, W bins of transition widths (their edges are one more), F groups of tokens by
frequency, I fine bins of frequency; 2 is the lower and the upper end of a 95% interval.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Mask
from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import SPECTRUM_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.evidence import Evidence
from megatron_tokscale.results.fitted import check_identity, read_fit
from megatron_tokscale.results.npz import read_npz
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time


class RangeStart(StrEnum):
    """Reason why a scored range starts where it does."""

    UNIGRAM_PHASE = "the end of the unigram phase"
    NO_LABELS = "the first probe, as the labels are not known"
    NEVER_BELOW = "the first probe, as the mean loss stays above the entropy of the labels"
    FEW_PROBES = "the first probe, as too few probes follow the unigram phase"


class RangeEnd(StrEnum):
    """Reason why a scored range ends where it does."""

    LAST_PROBE = "the last probe"
    DECAY = "the last probe before the learning rate falls below half its peak"
    NO_RATES = "the last probe, as the learning rates are not known"
    FEW_PROBES = "the last probe, as too few probes precede the decay of the learning rate"


@dataclass(frozen=True)
class ScoredRange:
    """The range of x in which spectra and their tests count.

    Attributes:
        from_x: x of its first probe.
        to_x: x of its last probe.
        start_reason: why it starts there.
        end_reason: why it ends there.
        label_entropy: entropy of the labels in nats, which ends the unigram phase; None if the
            labels are not known.
    """

    from_x: float
    to_x: float
    start_reason: RangeStart
    end_reason: RangeEnd
    label_entropy: float | None = None

    def holds(self, x: Floats) -> Mask:
        """Return a mask of the values of x in the range."""
        return np.asarray((x >= self.from_x) & (x <= self.to_x))

    def describe(self, time: Time) -> str:
        """Return the range and its reasons in one line."""
        start = str(self.start_reason)
        if self.start_reason is RangeStart.UNIGRAM_PHASE:
            start += f" (a mean loss of {self.label_entropy:.2f} nats, the entropy of the labels)"
        return (
            f"scored range: {time} {math.exp(self.from_x):.4g} to {math.exp(self.to_x):.4g}, "
            f"from {start} to {self.end_reason}"
        )


@dataclass(frozen=True)
class DatasetCounts:
    """Tokens and learning events of one dataset.

    Attributes:
        name: the dataset.
        n_tokens: fitted tokens.
        n_events: learning events that count in its spectrum.
    """

    name: str
    n_tokens: int
    n_events: int


@dataclass(frozen=True)
class SpectrumSummary:
    """The content of spectrum.json.

    Attributes:
        fit: the fits that the spectrum is made from.
        arrays_crc32: checksum of spectrum.npz.
        units: unit of each kind of number in spectrum.npz, for people.
        n_tokens: fitted tokens.
        n_events: learning events that count in the spectrum.
        drop_of_events: sum of the events' drops, in nats per fitted token.
        fall: fall of the mean loss from the first probe to the last, in nats.
        bandwidth_x: standard deviation of the spectrum's kernel, in units of x.
        common_width_x: drop-weighted median width of the events, in units of x.
        datasets: counts of each dataset, in the order of the probe set.
    """

    fit: FitIdentity
    arrays_crc32: str
    units: dict[str, str]
    n_tokens: int
    n_events: int
    drop_of_events: Estimate
    fall: Estimate
    bandwidth_x: float
    common_width_x: Estimate
    datasets: tuple[DatasetCounts, ...]


@dataclass(frozen=True)
class SpectrumArrays:
    """The arrays of spectrum.npz. Slopes and drop-weighted spectra are in nats per unit of x.

    Attributes:
        step_K: probe steps.
        x_K: natural logarithm of their times; -inf at step 0.
        mean_loss_K: mean loss over the tokens without a missing loss, in nats.
        mean_loss_RK: its resamples.
        mean_loss_DK: mean loss of each dataset.
        mean_loss_RDK: its resamples.
        x_G: grid of x.
        density_G: learning events per unit of x; integrates to one.
        density_interval_2G: its interval.
        density_DG: density of each dataset's events.
        drop_weighted_G: the spectrum with each event counting by its drop.
        drop_weighted_interval_2G: its interval.
        drop_weighted_DG: drop-weighted spectrum of each dataset.
        measured_G: measured slope of the mean loss, -dL/dx.
        measured_se_G: its standard error from the noise that all tokens of a probe share.
        measured_interval_2G: its interval.
        measured_DG: measured slope of each dataset.
        measured_interval_D2G: its interval.
        full_G: slope reconstructed from each token's own transitions.
        kernel_G: slope reconstructed from the drop-weighted spectrum and one kernel.
        spectrum_G: slope reconstructed from learning times alone.
        half_measured_G: measured slope of one half of the documents.
        half_full_G: as `full_G`, reconstructed from the other half of the documents.
        half_kernel_G: as `kernel_G`, from the other half.
        half_spectrum_G: as `spectrum_G`, from the other half.
        x_C: centres of the bins of x.
        drop_RC: drop of the learning events per bin, in nats per token.
        width_edges_W: edges of the bins of 10-90% widths, in units of x.
        width_observed_W: share of the falling tokens' drop per bin of their width.
        width_null_W: the same share under the null model: tokens that follow the mean curve.
        frequency_loss_RFK: mean loss of the deciles of tokens by frequency, without the common
            shifts.
        frequency_share_F: share of the tokens in each decile.
        frequency_I: frequency of the tokens of each fine bin, as a share of all tokens.
        frequency_time_I: their learning time.
    """

    step_K: Integers
    x_K: Floats
    mean_loss_K: Floats
    mean_loss_RK: Floats
    mean_loss_DK: Floats
    mean_loss_RDK: Floats
    x_G: Floats
    density_G: Floats
    density_interval_2G: Floats
    density_DG: Floats
    drop_weighted_G: Floats
    drop_weighted_interval_2G: Floats
    drop_weighted_DG: Floats
    measured_G: Floats
    measured_se_G: Floats
    measured_interval_2G: Floats
    measured_DG: Floats
    measured_interval_D2G: Floats
    full_G: Floats
    kernel_G: Floats
    spectrum_G: Floats
    half_measured_G: Floats
    half_full_G: Floats
    half_kernel_G: Floats
    half_spectrum_G: Floats
    x_C: Floats
    drop_RC: Floats32
    width_edges_W: Floats
    width_observed_W: Floats
    width_null_W: Floats
    frequency_loss_RFK: Floats
    frequency_share_F: Floats
    frequency_I: Floats
    frequency_time_I: Floats

    def reconstructions(self) -> dict[str, Floats]:
        """Return the reconstructed slopes by the name of the reconstruction."""
        return {"full": self.full_G, "kernel": self.kernel_G, "spectrum": self.spectrum_G}

    def half_reconstructions(self) -> dict[str, Floats]:
        """Return the slopes reconstructed from one half of the documents, by name."""
        return {
            "full": self.half_full_G,
            "kernel": self.half_kernel_G,
            "spectrum": self.half_spectrum_G,
        }


@dataclass(frozen=True)
class SpectrumResult:
    """The content of spectrum.json, spectrum.npz and reconstruction.json.

    Attributes:
        run: the run.
        fit: the content of fit.json.
        summary: the content of spectrum.json.
        evidence: the content of reconstruction.json.
        arrays: the content of spectrum.npz.
    """

    run: Run
    fit: FitSummary
    summary: SpectrumSummary
    evidence: Evidence
    arrays: SpectrumArrays

    @property
    def time(self) -> Time:
        """The unit that time is counted in."""
        return self.summary.fit.time

    @classmethod
    def open(cls, run: Run) -> Self:
        """Read the spectrum of a run.

        Raises:
            TokscaleError: the run is not fitted or has no spectrum; a file is damaged, of another
                schema, not written with the others, or made from other fits than the run has now.
        """
        verb = f"run `megatron-tokscale spectrum {run.path}`"
        again = f"{verb} again"
        arrays_path, summary_path = run.paths.spectrum_arrays, run.paths.spectrum
        evidence_path = run.paths.reconstruction
        fit = read_fit(run)
        for path in (arrays_path, summary_path, evidence_path):
            if not path.is_file():
                raise TokscaleError(f"{path} is not there; {verb} first")
        summary = read_typed_result(SpectrumSummary, summary_path, SPECTRUM_SCHEMA, again)
        evidence = read_typed_result(Evidence, evidence_path, SPECTRUM_SCHEMA, again)
        check_identity(summary_path, summary.fit, fit.identity, again)
        check_identity(evidence_path, evidence.fit, fit.identity, again)
        if evidence.arrays_crc32 != summary.arrays_crc32:
            raise TokscaleError(f"{evidence_path} is of another spectrum; {again}")
        arrays = read_npz(SpectrumArrays, arrays_path, summary.arrays_crc32, again)
        return cls(run, fit, summary, evidence, arrays)

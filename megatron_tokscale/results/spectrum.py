"""The spectrum that `megatron-tokscale spectrum` wrote into a run, and its evidence.

Shapes: K probe steps, R resamples (the first is the data as they are), D datasets, G grid points of
x, C bins of x, W bins of transition widths (their edges are one more), F groups of tokens by
frequency, I fine bins of frequency; 2 is the lower and the upper end of a 95% interval.
"""

from dataclasses import dataclass
from typing import Self

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import SPECTRUM_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.evidence import Evidence
from megatron_tokscale.results.fitted import check_identity, read_fit
from megatron_tokscale.results.npz import read_npz
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time


@dataclass(frozen=True)
class DatasetCounts:
    """Outcomes of the tokens of one dataset by the end of the scored range.

    Attributes:
        name: the dataset.
        n_tokens: fitted tokens.
        n_events: learned tokens, each of which has one learning event.
        censored: tokens that have not fallen half-way by the end.
        known: tokens that were known before the first probe.
        forgotten: tokens whose loss rises.
        learned_nats: drops of the learned tokens, in nats per fitted token.
        expected_nats: expected drops of the censored tokens, in nats per fitted token: each counts
            with the mean drop of the learned tokens of its group.
        median_x: x by which half of the learned and censored tokens are learned (Kaplan-Meier).
    """

    name: str
    n_tokens: int
    n_events: int
    censored: int
    known: int
    forgotten: int
    learned_nats: Estimate
    expected_nats: Estimate
    median_x: Estimate | Undefined


@dataclass(frozen=True)
class SpectrumSummary:
    """The content of spectrum.json.

    Attributes:
        fit: the fits that the spectrum is made from.
        arrays_crc32: checksum of spectrum.npz.
        units: unit of each kind of number in spectrum.npz, for people.
        scored: the scored range.
        certain_to_x: x behind which drops and times of events are uncertain: two common widths
            before the last probe.
        overall: what became of all tokens, under the name "all".
        fall: fall of the mean loss from the first probe to the last, in nats.
        bandwidth_x: standard deviation of the spectrum's kernel, in units of x.
        common_width_x: drop-weighted median width of the events from the start of the scored range
            on, in units of x.
        datasets: what became of the tokens of each dataset, in the order of the watched tokens.
    """

    fit: FitIdentity
    arrays_crc32: str
    units: dict[str, str]
    scored: ScoredRange
    certain_to_x: float
    overall: DatasetCounts
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
        unlearned_G: share of the learned and expected drops that is not learned by x (Kaplan-Meier,
            each token with its drop, a censored one with the mean drop of its group); NaN behind
            the scored range.
        unlearned_interval_2G: its interval.
        measured_G: measured slope of the mean loss, -dL/dx.
        measured_se_G: its standard error from the noise that all tokens of a probe share.
        measured_interval_2G: its interval.
        measured_DG: measured slope of each dataset.
        measured_interval_D2G: its interval.
        full_G: slope reconstructed from each token's fit.
        kernel_G: slope reconstructed from drops and learning times, with mean kernels.
        spectrum_G: slope reconstructed from learning times only, with mean kernels.
        x_C: centres of the bins of x over the probed range.
        drop_RC: drop of the learning events per bin, in nats per token. Behind the scored range
            they are shown, not scored.
        width_edges_W: edges of the bins of 10-90% widths, in units of x.
        width_observed_W: share of the falling tokens' drop per bin of their width.
        width_null_W: the same share under the null model: tokens that follow the mean curve of
            their group.
        frequency_loss_RFK: mean loss of the deciles of tokens by frequency, without the common
            shifts.
        frequency_share_F: share of the tokens in each decile.
        frequency_I: frequency of the tokens of each fine bin, as a share of all tokens.
        frequency_time_I: their learning time.
        frequency_events_I: number of their learning events.
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
    unlearned_G: Floats
    unlearned_interval_2G: Floats
    measured_G: Floats
    measured_se_G: Floats
    measured_interval_2G: Floats
    measured_DG: Floats
    measured_interval_D2G: Floats
    full_G: Floats
    kernel_G: Floats
    spectrum_G: Floats
    x_C: Floats
    drop_RC: Floats32
    width_edges_W: Floats
    width_observed_W: Floats
    width_null_W: Floats
    frequency_loss_RFK: Floats
    frequency_share_F: Floats
    frequency_I: Floats
    frequency_time_I: Floats
    frequency_events_I: Integers

    def reconstructions(self) -> dict[str, Floats]:
        """Return the reconstructed slopes by the name of the reconstruction."""
        return {"full": self.full_G, "kernel": self.kernel_G, "spectrum": self.spectrum_G}


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

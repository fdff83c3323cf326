"""The content of reconstruction.json: the tests that a spectrum can fail."""

from dataclasses import dataclass
from typing import Final

from megatron_tokscale.fit.summary import FitIdentity, NonFiniteLosses
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.results.skill import GroupSkill
from megatron_tokscale.results.verdict import ClaimTest

RECONSTRUCTIONS: Final = {
    "full": "each token's fit",
    "kernel": "drops + times",
    "spectrum": "times only",
}
"""Words for the reconstructions, by their names in code and files."""


@dataclass(frozen=True)
class FallsByPart:
    """Falls of the mean loss within each eighth of the probed range of x, in nats.

    Attributes:
        edges: ends of the eighths in x, one more than there are falls.
        measured: falls by the measured slope.
        by_name: falls by each reconstruction ("full", "kernel", "spectrum").
    """

    edges: tuple[float, ...]
    measured: tuple[float, ...]
    by_name: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class SlopeNoise:
    """The noise of a mean loss curve, and how well its slope can be measured.

    Attributes:
        probes: probes of the curve that count.
        freedom: effective degrees of freedom of the smooth curve through them.
        noise: standard deviation of the mean loss around the smooth curve, in nats.
        own: the part of it that comes from the choice of documents: the tokens' own noise in the
            mean, in nats; NaN without resamples.
        shared: the rest, which all tokens of a probe share, in nats; its interval is that of the
            noise.
        lag_one_correlation: correlation of the residuals of neighbouring probes, beyond that which
            independent noise leaves; the estimates take the noise for independent.
        ceiling: R^2 of the slope that a perfect model would reach on this noise; the interval is
            that of the noise.
        straight_p_value: p-value of "the true curve is a straight line in x".
    """

    probes: int
    freedom: float
    noise: Estimate
    own: float
    shared: Estimate
    lag_one_correlation: float
    ceiling: Estimate
    straight_p_value: float


@dataclass(frozen=True)
class ReconstructionScore:
    """The agreement of one reconstruction with the measured mean loss.

    Attributes:
        r2: R^2 of the measured slope; undefined where the slope cannot be measured.
        ceiling: R^2 that a perfect model would reach.
        loss_error: root mean square over the probes of the reconstructed minus the measured mean
            loss, in nats; a reconstruction that is known up to a constant has the best constant.
    """

    r2: Estimate | Undefined
    ceiling: Estimate
    loss_error: Estimate


@dataclass(frozen=True)
class Twins:
    """R^2 of the reconstructions of two planted twins of the run, see `spectrum.twins`.

    Attributes:
        tokens: tokens of each twin.
        without_steps: R^2 by name where each token follows the mean curve of its group.
        with_steps: R^2 by name where each token follows the model of its class.
    """

    tokens: int
    without_steps: dict[str, Estimate]
    with_steps: dict[str, Estimate]


@dataclass(frozen=True)
class ClassShare:
    """Share of the tokens in one class, and share of the fall of all tokens' losses in it."""

    share: Estimate
    fall_share: Estimate


@dataclass(frozen=True)
class WidthQuartiles:
    """Quartiles of the 10-90% widths of transitions, each token weighted by its drop."""

    p25: Estimate
    p50: Estimate
    p75: Estimate


@dataclass(frozen=True)
class WidthSample:
    """Widths of the transitions of a sample of tokens.

    Attributes:
        tokens: tokens in the sample.
        falling: falling tokens with a trusted midpoint; only these count below.
        class_shares: share of the sample's tokens in each `TokenClass`, by its label; NaN in an
            empty sample.
        width_x: widths in units of x.
        width_decades: widths in decades of time.
        width_of_range: widths over the probed range of x.
        fall_in_windows: fall of the falling tokens inside their own 10-90% windows, over their
            whole fall.
    """

    tokens: int
    falling: int
    class_shares: dict[str, float]
    width_x: WidthQuartiles
    width_decades: WidthQuartiles
    width_of_range: WidthQuartiles
    fall_in_windows: Estimate


@dataclass(frozen=True)
class Locality:
    """The test of locality: transitions beside those of tokens that follow their group's curve.

    Attributes:
        from_x: x of the first probe that both samples are fitted on.
        to_x: x of the last.
        observed: the watched tokens.
        group_null: the null model: every token follows the mean curve of its group.
        test: test of `primary.LOCALITY` on the ratio of their median widths.
    """

    from_x: float
    to_x: float
    observed: WidthSample
    group_null: WidthSample
    test: ClaimTest


@dataclass(frozen=True)
class LastOctaveForecast:
    """One forecast of the mean loss over the last factor of two in time.

    Attributes:
        error: mean absolute error over the probes held out, in nats.
        fall: predicted fall from the end of the first half to the last probe, in nats.
    """

    error: Estimate
    fall: Estimate


@dataclass(frozen=True)
class ForwardPrediction:
    """The last factor of two in time, predicted from the losses of the first half.

    Attributes:
        from_x: x of the last probe of the first half, the last that is fitted.
        to_x: x of the last probe.
        probes: number of probes held out.
        fall: measured fall of the mean loss from the end of the first half to the last probe, in
            nats.
        tokens: forecast by the tokens' own fits.
        power_law: forecast by a power law of the mean loss.
        uniform: forecast by a uniform spectrum: the loss keeps its slope over the factor of two in
            time before.
        gain_over_best_rival: the smaller error of the two rivals minus the error of the tokens'
            fits, in nats.
        groups: skill in predicting which groups of tokens fall, by grouping.
    """

    from_x: float
    to_x: float
    probes: int
    fall: Estimate
    tokens: LastOctaveForecast
    power_law: LastOctaveForecast
    uniform: LastOctaveForecast
    gain_over_best_rival: Estimate
    groups: dict[str, GroupSkill]


@dataclass(frozen=True)
class SpectrumSettings:
    """Settings of `spectrum_run`.

    Attributes:
        n_resamples: bootstrap resamples of the documents.
        null_tokens: tokens that were fitted again: on the scored range, as tokens that follow their
            group, and on the first half of the time.
        seed: seed of all draws.
    """

    n_resamples: int
    null_tokens: int
    seed: int


@dataclass(frozen=True)
class Evidence:
    """The content of reconstruction.json.

    Attributes:
        fit: the fits that the spectrum is made from.
        arrays_crc32: checksum of spectrum.npz.
        n_units: number of documents, samples or blocks that the intervals are over.
        non_finite: losses that are not finite.
        scored: the range of x that the reconstructions are scored in: the part of the run's scored
            range that ends at least two widths of a transition before the last probe.
        slope_noise: the noise of the mean loss of all tokens.
        dataset_noise: the noise of the mean loss of each dataset, by its name.
        same_tokens: score of each reconstruction ("full", "kernel", "spectrum") of the measured
            slope, on the tokens that were fitted.
        other_documents: score of each reconstruction fitted on one half of the documents and
            measured on the other half.
        other_documents_note: a note for people on the limits of `other_documents`.
        twins: R^2 of the same reconstructions of planted twins with and without steps.
        falls: falls along x, measured and reconstructed.
        fall_before_first_finite_probe: fall of the mean loss from step 0, which is at x = -inf, to
            the first probe after it, in nats; None without a probe at step 0.
        classes: shares of each `TokenClass` except "unfitted", by its label.
        widths: the test of locality.
        forward: the forecast of the last factor of two in time.
        settings: settings of `spectrum_run`.
    """

    fit: FitIdentity
    arrays_crc32: str
    n_units: int
    non_finite: NonFiniteLosses
    scored: ScoredRange
    slope_noise: SlopeNoise
    dataset_noise: dict[str, SlopeNoise | Undefined]
    same_tokens: dict[str, ReconstructionScore]
    other_documents: dict[str, ReconstructionScore]
    other_documents_note: str
    twins: Twins | Undefined
    falls: FallsByPart
    fall_before_first_finite_probe: Estimate | None
    classes: dict[str, ClassShare]
    widths: Locality
    forward: ForwardPrediction | Undefined
    settings: SpectrumSettings

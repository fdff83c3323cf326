"""The content of fit.json: the identity and the results of a run's fits.

Shapes: K probe steps.
"""

from dataclasses import dataclass

from megatron_tokscale.core.resampling import UnitKind
from megatron_tokscale.store.reader import Time


@dataclass(frozen=True)
class FitIdentity:
    """The values that identify the fits of a run.

    Every analysis of the fits keeps the identity, so that a file of older fits is never taken for a
    file of the present ones.

    Attributes:
        run_id: id of the run.
        probe_fingerprint: fingerprint of its probe set.
        steps: the probe steps that were fitted, ascending.
        losses_crc32: checksum of the losses of each of these steps.
        time: the unit that time is counted in.
        fit_id: digest of all fits and of the settings that they were made with.
        time_name: name of the time for people (`Run.time_name`).
        unit_kind: what the intervals of an analysis resample.
    """

    run_id: str
    probe_fingerprint: str
    steps: tuple[int, ...]
    losses_crc32: tuple[str, ...]
    time: Time
    fit_id: str
    time_name: str
    unit_kind: UnitKind


@dataclass(frozen=True)
class NonFiniteLosses:
    """Counts of losses that are NaN or infinite.

    Attributes:
        losses: losses that are not finite.
        tokens: tokens with such a loss; they are left out of every mean.
        of_tokens: all watched tokens.
    """

    losses: int
    tokens: int
    of_tokens: int


@dataclass(frozen=True)
class DatasetShifts:
    """The common shifts of one dataset, in nats; see `fit.common_shifts`.

    Attributes:
        dataset: name of the dataset.
        tokens: its tokens that miss no loss.
        shift_K: shift of each probe, which is taken out of the losses; 0 at step 0.
        shared: standard deviation of the noise that all tokens of a probe share.
        own: standard deviation of the tokens' own noise in their mean.
        share: share that the shifts carried of the mean square departure of a loss from the
            straight line between the losses of the probes before and after it.
        jumps: probes before which the mean jumps, by index; jumps stay in the losses.
    """

    dataset: str
    tokens: int
    shift_K: tuple[float, ...]
    shared: float
    own: float
    share: float
    jumps: tuple[int, ...]


@dataclass(frozen=True)
class ClassTotal:
    """Tokens of one class, and the fall of their measured losses from the first probe to the last.

    Attributes:
        tokens: number of tokens.
        share: their share of all tokens.
        fall_nats: their fall, summed over the tokens; negative for a class that forgets.
        fall_share: their share of the fall of all tokens; NaN if that is zero.
    """

    tokens: int
    share: float
    fall_nats: float
    fall_share: float


@dataclass(frozen=True)
class FitSettings:
    """The settings of the fit that determine the classes.

    Attributes:
        criterion: name of the information criterion.
        noise: the model of the noise, in words.
        margin: by how much the criterion of a model with one more change must be lower.
        parameters: number of parameters of each model.
        known_below_nats: a flat token whose mean loss is below it counts as known.
        precision: the arithmetic of the fit, in words.
    """

    criterion: str
    noise: str
    margin: float
    parameters: dict[str, int]
    known_below_nats: float
    precision: str = "float32"


@dataclass(frozen=True)
class FitSummary:
    """The content of fit.json.

    Attributes:
        identity: identity of the fits.
        n_tokens: tokens fitted.
        n_probes: probe steps fitted.
        left_out: probe steps without any finite loss.
        classes: totals of each `TokenClass`, by its label.
        fall_nats: fall of all measured losses from the first probe to the last, summed.
        status: tokens of each `FitStatus`, by its label.
        non_finite: losses that are not finite.
        non_finite_K: number of such losses at each probe step.
        common_shifts: the common shifts of each dataset, which the fits are without; None if they
            were left in.
        settings: choices of the fit.
        seconds: wall time of the call that finished the fit.
        tokens_per_second: tokens that it fitted per second.
        resumed_tokens: tokens that earlier calls had fitted.
        fits_crc32: checksum of fits.parquet.
    """

    identity: FitIdentity
    n_tokens: int
    n_probes: int
    left_out: tuple[int, ...]
    classes: dict[str, ClassTotal]
    fall_nats: float
    status: dict[str, int]
    non_finite: NonFiniteLosses
    non_finite_K: tuple[int, ...]
    common_shifts: tuple[DatasetShifts, ...] | None
    settings: FitSettings
    seconds: float
    tokens_per_second: float
    resumed_tokens: int
    fits_crc32: str

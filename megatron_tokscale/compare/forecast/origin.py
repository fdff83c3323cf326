"""A forecast from one origin, made from the losses up to it.

The hazard's forecast is corrected by its own error one octave earlier. The same forecast from half
the origin's time said how much the mean loss falls in the octave before the origin; the ratio of
what came to what it said is kappa. Half of that error, in logarithms, is taken to persist: the
falls are multiplied by sqrt(kappa). In planted worlds the exponent that was needed lies between
0.4 and 1; the interval spans 0 to 1 (our choice, benchmarks/results/forecast.md).

The combination is the mean of the falls by the hazard and by the power law, with equal weights:
their errors are often of opposite signs (Bates and Granger 1969, docs/references.md 12). Its
interval is that of the resamples of both, pooled, so it holds what the two disagree about. Without
a correction of the hazard the combination is the power law alone (our choice: such a hazard errs by
30 to 60% in planted worlds, the power law by 10%).

Shapes: N tokens, K probe steps, H horizons, C classes, R resamples (the first is the data as they
are), U units.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Final

import numpy as np

from megatron_tokscale.compare.forecast.hazard import Census, Rates
from megatron_tokscale.compare.forecast.levels import (
    ROUNDING,
    level_weights,
    probe_noise,
)
from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers16, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.fit.common_shifts import shift_table, shifts_of, without_shifts
from megatron_tokscale.laws.estimates import Z_95, defined, symmetric_estimate
from megatron_tokscale.laws.power_law.power_law import FIRST_TIME_SHARE, power_law_falls
from megatron_tokscale.results.estimate import Estimate, Undefined, defined_or_reason
from megatron_tokscale.results.forecast import (
    FACTORS,
    GroupError,
    GroupFall,
    Horizon,
    Method,
    Origin,
)
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.evidence.falls import OCTAVE
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import loss_sums, table_of

_PERSISTS: Final = 0.5
"""Share of the log error of the octave before that is taken to persist (our choice)."""
_KAPPA_VARIANCE: Final = 0.25
"""Variance of kappa about 1 before it is measured (our choice): a ratio whose error is 0.5 counts
half, so that noise of the probes is not taken for an error of the forecast."""
_KAPPA_BOUNDS: Final = (0.1, 10.0)  # our choice: a larger error leaves no forecast to correct
_LEAST_TOKENS: Final = 100  # of a hazard: fewer have no share of events to count (our choice)
_SPREAD: Final = 0.15
"""Standard deviation of a corrected forecast's log error at the distance of one octave, whose
square grows with the distance in octaves. Our choice: the errors in planted worlds and in the demo
(benchmarks/results/forecast.md)."""
_UNCORRECTED: Final = 0.6
"""The same in addition, of a forecast without a correction. Our choice: in planted worlds with a
unigram phase the first octaves after it have log errors of 0.4 to 1."""


@dataclass(frozen=True)
class Watched:
    """Losses of the drawn tokens, and what is known of them.

    Attributes:
        x_K: natural logarithm of time at the probes; -inf at step 0.
        loss_NK: finite losses in nats, with the common shifts.
        groups: groups with a hazard of their own.
        classes: groupings in which the falls are counted, by name.
        dataset_N: dataset of each token.
        datasets: names of the datasets.
        units: resampling units.
        weight_RU: their weights; a row of ones first.
        from_x: start of the scored range.
        to_x: its end, the origin of the forecast.
        takes_shifts_out: whether common shifts are taken out before tokens are fitted.
        seed: seed of all draws.
    """

    x_K: Floats
    loss_NK: Floats32
    groups: Groups
    classes: Mapping[str, Groups]
    dataset_N: Integers16
    datasets: tuple[str, ...]
    units: Units
    weight_RU: Floats
    from_x: float
    to_x: float
    takes_shifts_out: bool
    seed: int

    @cached_property
    def mean_RK(self) -> Floats:
        """Mean losses of the resamples in nats."""
        n_units = len(self.units)
        tokens_R = self.weight_RU @ np.bincount(self.units.unit_N, minlength=n_units)
        total_UK = loss_sums(self.loss_NK, self.units.unit_N, n_units)
        return np.asarray(self.weight_RU @ total_UK / tokens_R[:, None])

    def token_shares(self, classes: Groups) -> Floats:
        """Return the share of the tokens of each class, of each resample, (R, C)."""
        shape = (len(self.units), len(classes.names))
        tokens_RC = self.weight_RU @ table_of(shape, self.units.unit_N, classes.group_N)
        return np.asarray(tokens_RC / tokens_RC.sum(axis=1, keepdims=True))

    @property
    def whole(self) -> Groups:
        """All tokens as one group."""
        return Groups(np.zeros(len(self.loss_NK), np.int64), ("all",))

    def last_probe(self, share: float) -> float:
        """Return x of the last probe at or before a share of the time of the range's end.

        Raises:
            UndefinedError: no probe is so early.
        """
        early_K = np.isfinite(self.x_K) & (self.x_K <= self.to_x + math.log(share) + ROUNDING)
        if not early_K.any():
            raise UndefinedError("the first probe is later than this origin; probe from the start")
        return float(self.x_K[early_K][-1])

    def until(self, x: float) -> Mask:
        """Return a mask of the probes up to `x`."""
        return np.asarray(self.x_K <= x + ROUNDING)


class Forecaster:
    """Forecasts from several origins; each census is taken once."""

    def __init__(self, watched: Watched):
        self._watched = watched
        self._taken: dict[float, _Taken | Undefined] = {}

    def origin(self, share: float) -> Origin:
        """Return the forecast from the last probe at or before a share of the end's time.

        Where there is no hazard, the other methods remain.

        Raises:
            UndefinedError: there are too few probes before the origin.
        """
        watched = self._watched
        x = watched.last_probe(share)
        until_K = watched.until(x)
        noise = probe_noise(watched.x_K[until_K], watched.mean_RK[0, until_K])
        reached = [
            h
            for h, factor in enumerate(FACTORS)
            if share == 1 or x + math.log(factor) <= watched.to_x + ROUNDING
        ]
        hazard = self._hazard(x, noise)
        falls = self._falls(x, hazard)
        level_K, time = level_weights(watched.x_K, x, x), math.exp(x)
        found = Origin(
            share=share,
            time=time,
            probes=int(until_K.sum()),
            loss=_with_noise(watched.mean_RK @ level_K, noise, level_K),
            learned=hazard.learned,
            censored=hazard.censored,
            hazard_per_octave=hazard.per_octave,
            correction=hazard.correction,
            horizons=tuple(
                Horizon(
                    FACTORS[h],
                    FACTORS[h] * time,
                    {method: each[h] for method, each in falls.items()},
                    None if share == 1 else self._measured(x, FACTORS[h]),
                )
                for h in reached
            ),
            groups={},
            group_errors={},
        )
        if hazard.taken is None:
            return found
        return self._with_groups(found, hazard, x)

    def _hazard(self, x: float, noise: float) -> "_Hazard":
        """Return the forecast by the hazard at `x`, or why there is none."""
        taken = self._census(x)
        if isinstance(taken, Undefined):
            return _Hazard(None, np.zeros((0, 0)), math.nan, taken.undefined)
        kappa_R = self._kappa(x, noise)
        if kappa_R is None:
            return _Hazard(taken, self._spread(_UNCORRECTED), math.nan)
        factor_R = kappa_R**_PERSISTS
        # From no correction to the full one are four standard deviations.
        unsure = math.log(kappa_R[0]) * _PERSISTS / 2
        return _Hazard(taken, factor_R[:, None] * self._spread(unsure), float(factor_R[0]))

    def _census(self, x: float) -> "_Taken | Undefined":
        if x not in self._taken:
            self._taken[x] = defined_or_reason(lambda: _Taken.at(self._watched, x))
        return self._taken[x]

    def _kappa(self, x: float, noise: float) -> Floats | None:
        """Return what came in the octave before `x` over its forecast, of each resample, (R,).

        It is shrunk to one by the error of the ratio; None where there is no such forecast.
        """
        watched = self._watched
        before = defined_or_reason(lambda: watched.last_probe(math.exp(x - watched.to_x) / 2))
        taken = self._census(before) if isinstance(before, float) else before
        if isinstance(taken, Undefined) or isinstance(before, Undefined):
            return None
        weight_K = self._fall_weights(before, FACTORS[0], until=x)
        said_R = taken.falls(watched, watched.whole)[:, 0, 0]
        if not said_R[0] > 0:
            return None
        error = noise * float(np.sqrt((weight_K**2).sum()))
        rng = np.random.default_rng([watched.seed, 3])
        drawn_R = np.concatenate([[0.0], error * rng.standard_normal(len(said_R) - 1)])
        came_R = watched.mean_RK @ weight_K + drawn_R
        kept = _KAPPA_VARIANCE / (_KAPPA_VARIANCE + (error / said_R[0]) ** 2)
        ratio_R = came_R / np.where(said_R > 0, said_R, said_R[0])
        return np.asarray(np.clip(1 + (ratio_R - 1) * kept, *_KAPPA_BOUNDS))

    def _spread(self, unsure: float) -> Floats:
        """Draw factors for the error of the forecast itself, (R, H); the first row is one.

        One draw counts for all horizons: a forecast that is too low by 2T is too low by 10T.

        Args:
            unsure: standard deviation of its log error that does not grow with the distance.
        """
        sigma_H = np.sqrt(unsure**2 + _SPREAD**2 * np.log2(FACTORS))
        rng = np.random.default_rng([self._watched.seed, 4])
        z_R = np.concatenate([[0.0], rng.standard_normal(len(self._watched.weight_RU) - 1)])
        return np.asarray(np.exp(sigma_H * z_R[:, None]))

    def _falls(self, x: float, hazard: "_Hazard") -> dict[str, tuple[Estimate | Undefined, ...]]:
        """Return the falls by method, one per horizon."""
        mean_K = self._watched.mean_RK[0]
        by_hazard, by_law = hazard.whole(self._watched), defined_or_reason(lambda: self._law(x))
        found = {
            Method.COMBINATION: defined_or_reason(
                lambda: _estimates(
                    _combined(defined(by_hazard), defined(by_law), math.isfinite(hazard.correction))
                )
            ),
            Method.HAZARD: defined_or_reason(lambda: _estimates(defined(by_hazard), least=0.0)),
            Method.POWER_LAW: defined_or_reason(lambda: _estimates(defined(by_law))),
            Method.SLOPE: defined_or_reason(lambda: _falls_of(self._slope(x, mean_K))),
            Method.NOTHING: (Estimate(0.0, 0.0, 0.0),) * len(FACTORS),
        }
        return {
            method: (each,) * len(FACTORS) if isinstance(each, Undefined) else each
            for method, each in found.items()
        }

    def _law(self, x: float) -> Floats:
        """Return the falls by the power law of the mean loss up to `x`, of each resample, (R, H).

        Raises:
            UndefinedError: there is no power law.
        """
        watched = self._watched
        until_K = watched.until(x) & np.isfinite(watched.x_K)
        return power_law_falls(
            np.exp(watched.x_K[until_K]),
            watched.mean_RK[0, until_K],
            math.exp(x) * np.array(FACTORS),
            from_=max(math.exp(watched.from_x), FIRST_TIME_SHARE * math.exp(x)),
            n_resamples=max(len(watched.weight_RU) - 1, 2),
            seed=watched.seed,
        )

    def _slope(self, x: float, mean_K: Floats) -> Estimate:
        """Return the slope -dL/dx of a mean loss at `x`, from the scored range until there.

        Raises:
            UndefinedError: there are too few probes in it.
        """
        watched = self._watched
        estimator = SlopeEstimator.from_curve(watched.x_K, mean_K, from_x=watched.from_x, to_x=x)
        slope = float(estimator.slopes(mean_K[None], [x])[0, 0])
        return symmetric_estimate(slope, Z_95 * float(estimator.error([x])[0]))

    def _slopes(self, x: float, mean_CK: Floats, tokens_C: Integers) -> Floats:
        """Return the `_slope` of each class; 0 without tokens, NaN where it is undefined."""
        slope_C = np.zeros(len(mean_CK))
        for c in np.flatnonzero(tokens_C):
            found = defined_or_reason(partial(self._slope, x, mean_CK[c]))
            slope_C[c] = math.nan if isinstance(found, Undefined) else found.value
        return slope_C

    def _fall_weights(self, x: float, factor: float, until: float) -> Floats:
        """Return weights of the probes whose sum is the fall from `x` to a later time, (K,)."""
        x_K, later = self._watched.x_K, x + math.log(factor)
        return level_weights(x_K, x, until) - level_weights(x_K, later, until)

    def _measured(self, x: float, factor: float) -> Estimate:
        """Return the fall that came, with an interval over the noise of the probes."""
        watched = self._watched
        weight_K = self._fall_weights(x, factor, until=watched.to_x)
        until_K = watched.until(watched.to_x)
        noise = probe_noise(watched.x_K[until_K], watched.mean_RK[0, until_K])
        return _with_noise(watched.mean_RK[:1] @ weight_K, noise, weight_K)

    def _with_groups(self, origin: Origin, hazard: "_Hazard", x: float) -> Origin:
        """Return the origin with the falls of the classes, and their errors in a back-test."""
        watched, n_reached = self._watched, len(origin.horizons)
        level_K = level_weights(watched.x_K, x, x)
        found: dict[str, tuple[GroupFall, ...]] = {}
        errors: dict[str, GroupError] = {}
        for grouping, classes in watched.classes.items():
            part_RCH = hazard.falls(watched, classes)
            n_classes = len(classes.names)
            own_RCH = _ratio(part_RCH, watched.token_shares(classes)[..., None])
            share_RCH = _ratio(part_RCH, part_RCH.sum(axis=1, keepdims=True))
            tokens_C = np.bincount(classes.group_N, minlength=n_classes)
            mean_CK = loss_sums(watched.loss_NK, classes.group_N, n_classes)
            mean_CK /= np.maximum(tokens_C, 1)[:, None]
            share_C = tokens_C / tokens_C.sum()
            came_CH = np.zeros((n_classes, 0))
            if origin.share < 1 and n_reached:
                weight_HK = [
                    self._fall_weights(x, each.factor, watched.to_x) for each in origin.horizons
                ]
                came_CH = mean_CK @ np.transpose(weight_HK)
                reach = math.log(origin.horizons[-1].factor)
                errors[grouping] = GroupError(
                    *(
                        float(share_C @ np.abs(said_C - came_CH[:, -1]))
                        for said_C in (
                            np.nan_to_num(own_RCH[0, :, n_reached - 1]),
                            self._slopes(x, mean_CK, tokens_C) * reach,
                            share_C @ came_CH[:, -1],
                        )
                    )
                )
            found[grouping] = tuple(
                GroupFall(
                    name=name,
                    tokens=int(tokens_C[c]),
                    loss=float(mean_CK[c] @ level_K),
                    falls=_estimates(own_RCH[:, c, :n_reached], least=0.0),
                    shares=_estimates(share_RCH[:, c, :n_reached], 0.0, 1.0),
                    measured=tuple(came_CH[c].tolist()),
                )
                for c, name in enumerate(classes.names)
                if tokens_C[c]
            )
        return replace(origin, groups=found, group_errors=errors)


@dataclass(frozen=True)
class _Hazard:
    """The forecast by the hazard at an origin.

    Attributes:
        taken: the census and its rates; None where there is no hazard.
        factor_RH: correction of the falls, times a draw of the forecast's own error.
        correction: the correction; NaN where the falls are not corrected.
        reason: why there is no hazard.
    """

    taken: "_Taken | None"
    factor_RH: Floats
    correction: float
    reason: str = ""

    @property
    def learned(self) -> float:
        """Share of the tokens that have fallen; NaN without a hazard."""
        return self.taken.census.learned if self.taken else math.nan

    @property
    def censored(self) -> float:
        """Share of the tokens that wait; NaN without a hazard."""
        return self.taken.census.censored if self.taken else math.nan

    @property
    def per_octave(self) -> Estimate:
        """Share of what is left that a factor of two in time brings; NaN without a hazard."""
        if self.taken is None:
            return Estimate(math.nan)
        return Estimate.of_sum(1 - np.exp(-self.taken.rates.pooled_R * OCTAVE), 0.0, 1.0)

    def falls(self, watched: Watched, classes: Groups) -> Floats:
        """Return the corrected falls of the classes with a draw of their error, (R, C, H)."""
        assert self.taken is not None
        return self.taken.falls(watched, classes) * self.factor_RH[:, None]

    def whole(self, watched: Watched) -> Floats | Undefined:
        """Return the fall of all tokens by each horizon, of each resample, (R, H)."""
        if self.taken is None:
            return Undefined(self.reason)
        return self.falls(watched, watched.whole)[:, 0]


@dataclass(frozen=True)
class _Taken:
    """A census and its rates under the weights of the resamples."""

    census: Census
    rates: Rates

    @classmethod
    def at(cls, watched: Watched, x: float) -> "_Taken":
        """Fit the losses up to `x`, and take the census there.

        Raises:
            UndefinedError: there are too few probes, or there is no hazard.
        """
        until_K = watched.until(x)
        x_K, loss_NK = watched.x_K[until_K], watched.loss_NK[:, until_K]
        if len(loss_NK) < _LEAST_TOKENS:
            raise UndefinedError(
                f"{len(loss_NK)} tokens are too few for a hazard; expected {_LEAST_TOKENS} or more"
            )
        probe_noise(x_K, loss_NK.mean(axis=0, dtype=np.float64))  # refuses too few probes
        if watched.takes_shifts_out:
            shifts = shifts_of(x_K, [(loss_NK, watched.dataset_N)], watched.datasets)
            loss_NK = without_shifts(loss_NK, shift_table(shifts), watched.dataset_N)
        census = Census.of(fit_sigmoids(x_K, loss_NK), loss_NK, watched.groups, watched.from_x)
        return cls(census, census.rates(watched.units.unit_N, watched.weight_RU))

    def falls(self, watched: Watched, classes: Groups) -> Floats:
        """Return the falls of the classes without a correction, (R, C, H)."""
        return self.census.falls(classes, watched.units.unit_N, watched.weight_RU, self.rates)


def _estimates(
    value_RH: Floats, least: float = -np.inf, most: float = np.inf
) -> tuple[Estimate, ...]:
    """Return the estimate of each column, with the percentiles of its resamples."""
    return tuple(Estimate.of_sum(value_R, least, most) for value_R in value_RH.T)


def _falls_of(slope: Estimate) -> tuple[Estimate, ...]:
    """Return the falls by each horizon, if the slope stays."""
    return tuple(
        Estimate(slope.value * reach, slope.low * reach, slope.high * reach)
        for reach in np.log(FACTORS).tolist()
    )


def _combined(hazard_RH: Floats, law_RH: Floats, is_corrected: bool) -> Floats:
    """Return the mean of two forecasts, then the resamples of both; without a correction the law's.

    Args:
        hazard_RH: falls by the hazard, of the data as they are and of each resample.
        law_RH: the same by the power law.
        is_corrected: whether the hazard is corrected.
    """
    if not is_corrected:
        return law_RH
    value_H = (hazard_RH[:1] + law_RH[:1]) / 2
    return np.concatenate([value_H, hazard_RH[1:], law_RH[1:]])


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """Return top / bottom; NaN where the bottom is 0."""
    return np.asarray(top / np.where(bottom == 0, np.nan, bottom))


def _with_noise(value_R: Floats, noise: float, weight_K: Floats) -> Estimate:
    """Return a weighted sum of mean losses, with an interval over the noise of the probes."""
    reach = Z_95 * noise * float(np.sqrt((weight_K**2).sum()))
    value = float(value_R[0])
    return Estimate(value, value - reach, value + reach)

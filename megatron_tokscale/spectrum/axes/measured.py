"""The shift model of an axis with its intervals, its errors on left-out runs and its verdicts.

Shapes: I runs, P points, C cells (here one, of all tokens), R resamples of the documents (the first
is the data as they are).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.axis import (
    GroupPrediction,
    LeftOutErrors,
    RunShift,
    Shift,
    Spread,
    Top,
)
from megatron_tokscale.results.estimate import Estimate, Undefined, defined_or_reason
from megatron_tokscale.results.verdict import Claim, ClaimTest
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.deltas import run_deltas, seed_noise
from megatron_tokscale.spectrum.axes.left_out import (
    LeftOut,
    Predict,
    both_spreads,
    fit_additive,
)
from megatron_tokscale.spectrum.axes.parts import Parts
from megatron_tokscale.spectrum.axes.shift import ShiftModel, fit_shift

EARLIER = Claim("the gain of size is the same tokens, learned earlier", least=0.5)
"""Half of the gain: the larger part (our choice)."""
LEFT_OUT = Claim("the last losses of left-out runs are predicted", least=0.9)
"""R^2 (our choice)."""
_MIXED = 100  # resamples for the part of the variance that is counted twice (our choice)
_LEAST_LEFT_OUT = 4  # runs; without one of them, three are left for the model


@dataclass(frozen=True)
class Curves:
    """Mean curves of the runs of an axis.

    Attributes:
        points: the counted probes of the runs.
        loss_RP: mean loss at each probe, in nats.
        top_R: the loss of a token that is not learned, in nats; NaN if unknown.
        top: its kind.
    """

    points: Points
    loss_RP: Floats
    top_R: Floats
    top: Top

    def fit(self, resample: int = 0, near: float | None = None) -> ShiftModel:
        """Return the shift model of one resample."""
        rows = slice(resample, resample + 1)
        return fit_shift(self.points, self.loss_RP[rows], self.top_R[rows], near=near)

    def mixed(self) -> "Curves":
        """Return the resamples with other documents in every run: their rows are dealt anew."""
        rows_R = np.arange(1, len(self.loss_RP))
        loss_RP = self.loss_RP[1:].copy()
        for run in range(self.points.n_runs):
            own_P = self.points.run_P == run
            loss_RP[:, own_P] = self.loss_RP[np.roll(rows_R, run)][:, own_P]
        return Curves(self.points, loss_RP, self.top_R[1:], self.top)

    @property
    def last_x(self) -> float:
        """Return the earliest of the runs' last clocks."""
        runs = np.unique(self.points.run_P)
        return float(min(self.points.x_P[self.points.run_P == run].max() for run in runs))

    @property
    def least_u(self) -> float:
        """Return u of the smallest run with points."""
        return float(self.points.u_P.min())


@dataclass(frozen=True)
class Fitted:
    """Shift models of all resamples, and without each run.

    Attributes:
        curves: the curves that they are fitted to.
        model_R: models of the resamples.
        mixed: models of resamples in which every run has documents of its own.
        without: models without each run of `runs`; empty where fewer than four runs have points.
        runs: numbers of the runs with points.
    """

    curves: Curves
    model_R: Sequence[ShiftModel]
    mixed: Sequence[ShiftModel]
    without: Sequence[ShiftModel]
    runs: Sequence[int]

    @classmethod
    def of(cls, curves: Curves) -> "Fitted":
        """Fit all models; those of resamples and of fewer runs are sought near the first.

        Raises:
            UndefinedError: the points hold no shift.
        """
        first, points = curves.fit(), curves.points
        resampled = range(1, len(curves.loss_RP))
        models = [first, *(curves.fit(r, first.kappa) for r in resampled)]
        shuffled = curves.mixed()
        mixed = [shuffled.fit(r, first.kappa) for r in range(min(len(resampled), _MIXED))]
        runs = np.unique(points.run_P).tolist()
        without = []
        if len(runs) >= _LEAST_LEFT_OUT:
            for run in runs:
                others_P = points.without(run)
                others = Curves(
                    points.rows(others_P), curves.loss_RP[:1, others_P], curves.top_R, curves.top
                )
                if len(np.unique(others.points.u_P)) > 1:
                    without.append(others.fit(near=first.kappa))
        return cls(curves, models, mixed, without if len(without) == len(runs) else [], runs)

    def spread(self, number: Callable[[ShiftModel], float]) -> Spread:
        """Return a number of the model with its intervals over documents, runs, and both."""
        value_R = [number(model) for model in self.model_R]
        documents = Estimate.from_resamples(value_R)
        without_I = np.array([number(model) for model in self.without])
        runs = Estimate.from_jackknife(value_R[0], without_I)
        cells = Estimate.from_resamples([value_R[0], *map(number, self.mixed)])
        return Spread(documents, runs, both_spreads(documents, runs, cells))


def measure_shift(
    fitted: Fitted, names: Sequence[str], groups: dict[str, GroupPrediction]
) -> Shift:
    """Return the shift model of an axis as a result.

    Args:
        fitted: the models.
        names: names of all runs of the axis.
        groups: predictions by grouping (`groups.py`).
    """
    curves = fitted.curves
    points, x, least_u = curves.points, curves.last_x, curves.least_u

    def spread(part: Callable[[Parts], Floats]) -> Spread:
        return fitted.spread(lambda model: float(part(Parts.of(model, x, least_u))[0]))

    delta_RI = np.stack(
        [
            run_deltas(model, points, loss_P)
            for model, loss_P in zip(fitted.model_R, curves.loss_RP, strict=True)
        ]
    )
    left_out = _left_out(fitted)
    errors = defined_or_reason(lambda: _errors(curves, left_out))
    gain = spread(lambda parts: parts.gain_C)
    share, of_share = _share(gain, spread(lambda parts: parts.share_C))
    r2 = errors if isinstance(errors, Undefined) else errors.last_r2
    return Shift(
        top=curves.top,
        kappa=fitted.spread(lambda model: model.kappa),
        floor=fitted.spread(lambda model: float(model.floor_C[0])),
        x=x,
        gain=gain,
        earlier=spread(lambda parts: parts.earlier_C),
        never=spread(lambda parts: parts.never_C),
        share=share,
        runs=_run_shifts(fitted.runs, names, delta_RI, left_out),
        seed_noise=seed_noise(delta_RI[0], points.u_I),
        errors=errors,
        groups=groups,
        earlier_test=ClaimTest.of(EARLIER, of_share),
        left_out_test=ClaimTest.of(LEFT_OUT, r2),
    )


def _share(gain: Spread, share: Spread) -> tuple[Spread, Estimate | Undefined]:
    """Return the share of the gain, and the number of its claim: there is none without a gain."""
    if not gain.both.has_interval or gain.both.low > 0:
        return share, share.both
    none = Estimate(float("nan"))
    return Spread(none, none, none), Undefined(
        "the gain of size is not above 0 in its whole interval, so it has no parts"
    )


def _left_out(fitted: Fitted) -> LeftOut | None:
    """Return the errors of the models without each run; None where there are none."""
    if not fitted.without:
        return None
    curves = fitted.curves
    models = iter(fitted.without)

    def fit(_points: Points, _loss_P: Floats) -> Predict:
        model = next(models)
        return lambda x, u: model.predict(x, u)[0]

    return LeftOut.of(curves.points, curves.loss_RP[0], fit)


def _errors(curves: Curves, left_out: LeftOut | None) -> LeftOutErrors:
    """Return the errors on left-out runs beside those of the rivals."""
    if left_out is None:
        raise UndefinedError(
            f"a prediction of left-out runs needs {_LEAST_LEFT_OUT} or more runs with probes along "
            "T, of two or more sizes without any one of them"
        )

    def plain(points: Points, loss_P: Floats) -> Predict:
        model = fit_shift(points, loss_P[None], curves.top_R[:1], with_floor=False)
        return lambda x, u: model.predict(x, u)[0]

    points, loss_P = curves.points, curves.loss_RP[0]
    return LeftOutErrors(
        shift_and_floor=left_out.error,
        plain_shift=LeftOut.of(points, loss_P, plain).error,
        additive=LeftOut.of(points, loss_P, fit_additive).error,
        last_r2=left_out.r2(),
    )


def _run_shifts(
    runs: Sequence[int], names: Sequence[str], delta_RI: Floats, left_out: LeftOut | None
) -> tuple[RunShift, ...]:
    nan = float("nan")
    return tuple(
        RunShift(
            name=names[run],
            delta=Estimate.from_resamples(delta_RI[:, run]),
            left_out_error=nan if left_out is None else float(left_out.error_I[i]),
            last_error=(
                nan if left_out is None else float(left_out.last_I[i] - left_out.measured_I[i])
            ),
        )
        for i, run in enumerate(runs)
    )

"""Gains of groups of tokens from size: measured, and predicted from the largest run alone.

The prediction for a run: each group's curve in the largest run, read at the clock that the shift
model moves the run's last probe to, with the model's floor. kappa and the floor come from mean
curves without the run; the run's groups are never looked at. The null model: every group gains what
the mean gains. A prediction without a shift and a floor is the null model.

Shapes: I runs, P points, C groups, R resamples (the first is the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.axis import GroupGain, GroupPrediction, Spread
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.verdict import Claim, ClaimTest, holm
from megatron_tokscale.spectrum.axes.left_out import both_spreads
from megatron_tokscale.spectrum.axes.measured import Fitted
from megatron_tokscale.spectrum.axes.parts import Parts
from megatron_tokscale.spectrum.axes.shift import ShiftModel, fit_shift
from megatron_tokscale.spectrum.interpolation import interpolated

SKILL = Claim("groups gain as the shift predicts, better than all alike", least=0)


@dataclass(frozen=True)
class GroupCurves:
    """Mean curves of the groups of one grouping.

    Attributes:
        names: names of the groups.
        share_RC: share of the tokens in each group.
        loss_RCP: mean loss of each group at each counted probe, in nats; 0 for an empty group.
        top_RC: top of each group, in nats; NaN if unknown.
    """

    names: Sequence[str]
    share_RC: Floats
    loss_RCP: Floats
    top_RC: Floats


def predict_groups(fitted: Fitted, curves: GroupCurves) -> GroupPrediction:
    """Return the skill of the shift model on one grouping, and the gains of its groups.

    Raises:
        UndefinedError: fewer than four runs, or two groups, to predict; or no gain to explain.
    """
    if not fitted.without:
        raise UndefinedError("the gains of groups are predicted from four or more runs")
    if (curves.share_RC[0] > 0).sum() < 2:
        raise UndefinedError("one group holds all tokens")
    error_RI, null_RI = _squares(fitted, curves)
    with np.errstate(invalid="ignore", divide="ignore"):
        skill_R = 1 - error_RI.sum(axis=1) / null_RI.sum(axis=1)
        others = [
            1 - np.delete(error_RI[0], i).sum() / np.delete(null_RI[0], i).sum()
            for i in range(error_RI.shape[1])
        ]
    documents = Estimate.from_resamples(skill_R, most=1)
    runs = Estimate.from_jackknife(float(skill_R[0]), np.array(others), most=1)
    skill = Spread(documents, runs, both_spreads(documents, runs, most=1))
    return GroupPrediction(
        skill=skill,
        error=float(np.sqrt(error_RI[0].mean())),
        null_error=float(np.sqrt(null_RI[0].mean())),
        groups=_gains(fitted, curves),
        test=ClaimTest.of(SKILL, skill.both),
    )


def corrected(groups: dict[str, GroupPrediction]) -> dict[str, GroupPrediction]:
    """Return the predictions with Holm's correction of their verdicts over the groupings."""
    tests = holm([each.test for each in groups.values()])
    return {
        name: replace(each, test=test)
        for (name, each), test in zip(groups.items(), tests, strict=True)
    }


def _squares(fitted: Fitted, curves: GroupCurves) -> tuple[Floats, Floats]:
    """Return squared errors of the predicted gains and of the null model's, by resample and run.

    Each is the mean over groups, weighted by tokens; the largest run is the reference.
    """
    points = fitted.curves.points
    reference = max(run for run in fitted.runs if points.u_I[run] == 0)
    own_P = points.run_P == reference
    x_K, loss_RCK = points.x_P[own_P], curves.loss_RCP[:, :, own_P]
    error, null = [], []
    for run, model in zip(fitted.runs, fitted.without, strict=True):
        if run == reference:
            continue
        last = np.flatnonzero(points.run_P == run)[-1]
        x, u = float(points.x_P[last]), float(points.u_I[run])
        predicted_RC = _predicted(model, x_K, loss_RCK, curves.top_RC, x, u) - loss_RCK[:, :, -1]
        measured_RC = curves.loss_RCP[:, :, last] - loss_RCK[:, :, -1]
        predicted_RC = _beyond_mean(predicted_RC, curves.share_RC)
        measured_RC = _beyond_mean(measured_RC, curves.share_RC)
        error.append((curves.share_RC * (measured_RC - predicted_RC) ** 2).sum(axis=1))
        null.append((curves.share_RC * measured_RC**2).sum(axis=1))
    return np.stack(error, axis=1), np.stack(null, axis=1)


def _predicted(
    model: ShiftModel, x_K: Floats, loss_RCK: Floats, top_RC: Floats, x: float, u: float
) -> Floats:
    """Return the predicted losses of the groups of a run at clock `x`, (R, C) in nats."""
    shape_RC = interpolated(loss_RCK, x_K, np.array([x + model.kappa * u]))[..., 0]
    never_RC = np.where(np.isfinite(top_RC), shape_RC - top_RC, -1.0)
    return np.asarray(shape_RC + float(model.floor_C[0]) * u * never_RC)


def _beyond_mean(gain_RC: Floats, share_RC: Floats) -> Floats:
    return np.asarray(gain_RC - (share_RC * gain_RC).sum(axis=1, keepdims=True))


def _gains(fitted: Fitted, curves: GroupCurves) -> tuple[GroupGain, ...]:
    """Return the two parts of each group's gain: its own shape and floor, and the common kappa."""
    points, x, least_u = fitted.curves.points, fitted.curves.last_x, fitted.curves.least_u
    parts = [
        Parts.of(fit_shift(points, loss_CP, top_C, kappa=model.kappa), x, least_u)
        for model, loss_CP, top_C in zip(
            fitted.model_R, curves.loss_RCP, curves.top_RC, strict=True
        )
    ]
    return tuple(
        GroupGain(
            name=name,
            share_of_tokens=float(curves.share_RC[0, c]),
            earlier=Estimate.from_resamples([float(part.earlier_C[c]) for part in parts]),
            never=Estimate.from_resamples([float(part.never_C[c]) for part in parts]),
        )
        for c, name in enumerate(curves.names)
        if curves.share_RC[0, c] > 0
    )

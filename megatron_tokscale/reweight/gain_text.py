"""The gain of a plan in words, for the terminal and the report."""

from megatron_tokscale.data import Plan
from megatron_tokscale.results.gain import Gain, ScoreQuality, TargetShift, gain_in


def describe_gain(plan: Plan) -> list[str]:
    """Return lines of text on what a plan can gain, for a terminal; none if it does not hold it."""
    rows = [f"  {name:<20}{text}" for name, text in gain_rows(plan)]
    if gain := gain_in(plan, Gain):
        rows = ["what it can gain, to first order:", *rows]
        if gain.advice:
            rows += ["advice: do not train this plan:", *(f"  {reason}" for reason in gain.advice)]
    return rows


def gain_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return what a plan holds on its gain in words, with the name of each number."""
    if gain := gain_in(plan, Gain):
        most = f"at most {gain.at_most:.1%}"
        return [
            *_spread_rows(gain),
            ("gain", f"{most} (weights and falls have covariance {gain.covariance:.4f})"),
            ("reference's cost", _cost(gain.scores)),
            ("seeds to see it", _seeds(gain)),
        ]
    if shift := gain_in(plan, TargetShift):
        return [
            ("gain on the target", "not estimated: target scores rank documents, no more"),
            ("mean target score", f"{shift.plan:.3g} nats per token, {shift.pool:.3g} in the pool"),
            ("reliability", _reliability(shift.scores)),
            ("cost before tuning", _cost(shift.scores)),
        ]
    return []


def _spread_rows(gain: Gain) -> list[tuple[str, str]]:
    """Return the rows on the scores; one, where they do not tell how reliable they are."""
    if gain.spread is None:
        return [("spread of falls", "unknown: the scores do not say how reliable they are")]
    return [
        ("spread of falls", f"CV² {gain.spread:.3f}, free of noise"),
        ("reliability", _reliability(gain.scores)),
        ("kept by the strata", f"{_number(gain.kept, '.0%')} of that spread"),
    ]


def _reliability(found: ScoreQuality) -> str:
    parts = f"{_number(found.watched)} where watched, {_number(found.predicted)} where predicted"
    return f"{_number(found.reliability)} of all scores ({parts})"


def _number(value: float | None, form: str = ".2f") -> str:
    return "unknown" if value is None else format(value, form)


def _cost(found: ScoreQuality) -> str:
    if found.cost is None:
        return "unknown: the scores do not say what their reference run took"
    if found.is_reference_size:
        size = "its own size; give --parameters"
    else:
        size = f"{found.parameters:,} parameters"
    return f"{found.cost:.1%} of a training of {size}"


def _seeds(gain: Gain) -> str:
    setting = f"paired, 80% power, two-sided 5%, sd of {gain.sd_points:g} points between seeds"
    if gain.seeds is None:
        return f"no number of them ({setting})"
    return f"{gain.seeds:,} ({setting})"

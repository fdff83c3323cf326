"""The content of forecast.json: the nats that a run has still to learn, and the back-tests.

Every forecast is of the mean loss over the watched tokens if training goes on as in the octave
before its origin: the same data, and no decay of the learning rate.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.schemas import FORECAST_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary, NonFiniteLosses
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.fitted import check_identity
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.store import Run

FACTORS: Final = (2.0, 4.0, 10.0)
"""Horizons of a forecast, as factors of the time of its origin."""
GROUPINGS: Final = {
    "dataset": "dataset",
    "frequency decile": "frequency decile of the label (10: the most frequent)",
    "position decile": "position decile (10: the longest contexts)",
    "label before": "label occurred before in its context",
}
"""Groupings of the tokens by their names in `Origin.groups`, in words."""
ORIGINS: Final = (0.25, 0.5)
"""Origins of the back-tests, as shares of the time of the forecast's own origin."""


class Method(StrEnum):
    """The methods of a forecast; the last two are what it must beat."""

    COMBINATION = "mean of hazard and power law"
    HAZARD = "hazard of falls"
    POWER_LAW = "power law of the mean"
    SLOPE = "slope that stays"
    NOTHING = "nothing more falls"


class Standing(StrEnum):
    """The verdict of a run's back-tests on a method."""

    STANDS = "stands"
    REFUTED = "refuted"
    UNTESTED = "untested"


@dataclass(frozen=True)
class Horizon:
    """The fall of the mean loss from an origin to a later time, in nats per token.

    Attributes:
        factor: the later time over the time of the origin.
        time: the later time.
        falls: forecast fall by `Method`, with its 95% interval, or why it is undefined.
        measured: the fall that came; None where the time lies behind the last probe.
    """

    factor: float
    time: float
    falls: dict[str, Estimate | Undefined]
    measured: Estimate | None = None

    def error(self, method: Method) -> float | None:
        """Return forecast minus measured fall in nats; None where one of them is not known."""
        found = self.falls.get(method, Undefined(""))
        if self.measured is None or isinstance(found, Undefined):
            return None
        return found.value - self.measured.value


@dataclass(frozen=True)
class GroupFall:
    """The forecast fall of a group of tokens, by the hazard of falls.

    Attributes:
        name: name of the group.
        tokens: number of its tokens.
        loss: their mean loss at the origin, in nats.
        falls: the fall of their mean loss by each horizon, in nats per token of the group.
        shares: share of the fall of all tokens that is theirs, by each horizon; the shares of the
            groups of a grouping add up to one.
        measured: in a back-test, the fall of their mean loss that came by each horizon, in nats per
            token of the group; empty in a forecast.
    """

    name: str
    tokens: int
    loss: float
    falls: tuple[Estimate, ...]
    shares: tuple[Estimate, ...]
    measured: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupError:
    """Errors of the falls of the groups of a grouping, in a back-test at one horizon.

    Attributes:
        hazard: mean absolute error of the forecast falls, weighted by the groups' tokens, in nats
            per token of the group.
        slope: the same if every group keeps the slope of its own mean loss.
        even: the same if the measured fall of all tokens is divided evenly over them.
    """

    hazard: float
    slope: float
    even: float


@dataclass(frozen=True)
class Origin:
    """A forecast from one origin, made from the losses up to it.

    Attributes:
        share: its time over the time of the forecast's own origin; 1 for the forecast itself.
        time: its time.
        probes: number of probes that it is made from.
        loss: mean loss at the origin, by a parabola through the losses of the octave before it (a
            line below six probes).
        learned: share of the tokens that have fallen in the scored range; NaN without a hazard.
        censored: share of the tokens that have not fallen in it, and may; NaN without a hazard.
        hazard_per_octave: share of the drops to come that a factor of two in time brings at the
            origin; NaN without a hazard.
        correction: factor on the falls by the hazard, from the fall of the octave before the origin
            over its forecast from half the origin's time; NaN where there is no such forecast: the
            falls are then not corrected, and their intervals are wider.
        horizons: the falls by each horizon; of a back-test, those that end by the forecast's own
            origin.
        groups: the falls of groups of tokens, by grouping, of `GROUPINGS`. Empty without a hazard.
        group_errors: for a back-test, the errors of the groups' falls by the last horizon, by
            grouping.
    """

    share: float
    time: float
    probes: int
    loss: Estimate
    learned: float
    censored: float
    hazard_per_octave: Estimate
    correction: float
    horizons: tuple[Horizon, ...]
    groups: dict[str, tuple[GroupFall, ...]]
    group_errors: dict[str, GroupError]


@dataclass(frozen=True)
class Judgement:
    """The verdict of the back-tests on a method.

    Attributes:
        method: the method.
        standing: the outcome.
        reason: the numbers that it rests on, a sentence.
        error: mean absolute error over the horizons of all back-tests, as a share of the fall that
            came; NaN without a back-test.
    """

    method: Method
    standing: Standing
    reason: str
    error: float


@dataclass(frozen=True)
class ForecastSettings:
    """Settings of a forecast.

    Attributes:
        tokens: number of tokens that were drawn and fitted.
        n_resamples: bootstrap resamples of the documents, or of what stands in for them.
        seed: seed of all draws.
    """

    tokens: int
    n_resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The content of forecast.json.

    Attributes:
        fit: the fits that name the losses, the time and the units of resampling.
        non_finite: counts of losses that are not finite.
        n_units: number of documents, or of what stands in for them.
        scored: the scored range: the forecast's origin is its end.
        assumed: sentences on what the forecast assumes of the training to come.
        missing: sentences on what the run does not know, and what is left out therefore.
        now: the forecast.
        back_tests: the back-tests by ascending origin, or why there is none.
        judgements: what the back-tests say of each method: those that stand come first, and of
            these the one with the smallest error.
        settings: settings of the forecast.
    """

    fit: FitIdentity
    non_finite: NonFiniteLosses
    n_units: int
    scored: ScoredRange
    assumed: tuple[str, ...]
    missing: tuple[str, ...]
    now: Origin
    back_tests: tuple[Origin | Undefined, ...]
    judgements: tuple[Judgement, ...]
    settings: ForecastSettings

    @property
    def time(self) -> str:
        """The name of the time."""
        return self.fit.time_name

    @property
    def best(self) -> Method:
        """The method that stands with the smallest error in the back-tests; if none stands, that
        with the smallest error; without back-tests, the power law."""
        return self.judgements[0].method


def read_forecast(run: Run, fit: FitSummary) -> Forecast | None:
    """Return the content of forecast.json, made from the losses in `fit`; None without the file.

    Raises:
        TokscaleError: the file is damaged, of another schema, or of other fits.
    """
    path = run.paths.forecast
    if not is_there(path):
        return None
    again = f"run `megatron-tokscale forecast {run.path}` again"
    found = read_typed_result(Forecast, path, FORECAST_SCHEMA, again)
    check_identity(path, found.fit, fit.identity, again)
    return found

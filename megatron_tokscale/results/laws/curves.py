"""Content of curve_laws.json: laws of loss curves from tables, of each run and over runs."""

from dataclasses import dataclass

from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.laws.deceleration import Deceleration
from megatron_tokscale.results.laws.explanation import ExplanationRow
from megatron_tokscale.results.laws.one_third import OneThirdLaw
from megatron_tokscale.results.laws.power_law import PowerLaw
from megatron_tokscale.results.laws.several_runs import (
    ChinchillaForecast,
    ChinchillaLaw,
    ScheduleForecast,
)


@dataclass(frozen=True)
class CurveLaws:
    """The laws of one loss curve: one column of one table.

    Attributes:
        losses: name of the column.
        n_points: number of steps with a loss.
        n_missing: number of rows without a finite loss, which are left out.
        n_merged: number of rows merged into another row of the same step.
        last_step: last step with a loss.
        tokens: tokens trained on by then; None if the table does not hold them.
        last_loss: loss at the last step, in nats.
        power_law: power law of the step, from a tenth of the last step on.
        one_third: one-third law of the summed learning rate.
        deceleration: broken power law, prepared and fitted as Mircea et al. do.
    """

    losses: str
    n_points: int
    n_missing: int
    n_merged: int
    last_step: float
    tokens: float | None
    last_loss: float
    power_law: PowerLaw | Undefined
    one_third: OneThirdLaw | Undefined
    deceleration: Deceleration | Undefined


@dataclass(frozen=True)
class TableLaws:
    """The laws of one run's table.

    Attributes:
        name: name of the run.
        file: path of the table.
        parameters: parameters of the model without embeddings; None if not given.
        step_column: column of the steps; None where steps follow from tokens.
        tokens_column: column of the tokens; None where tokens follow from steps, or are not known.
        learning_rate_column: column of the learning rate; None without one.
        n_rows: number of rows.
        n_without_step: number of rows without a step, which are left out.
        curves: laws of each column of losses.
    """

    name: str
    file: str
    parameters: int | None
    step_column: str | None
    tokens_column: str | None
    learning_rate_column: str | None
    n_rows: int
    n_without_step: int
    curves: tuple[CurveLaws, ...]


@dataclass(frozen=True)
class ModelForecast:
    """Forecasts of the longest schedules of one model.

    Attributes:
        parameters: parameters of the model without embeddings.
        forecasts: the forecast of each longest run, or why there is none.
    """

    parameters: int
    forecasts: tuple[ScheduleForecast, ...] | Undefined


@dataclass(frozen=True)
class LawsOverTables:
    """The laws over runs of one column of losses.

    Attributes:
        losses: name of the column.
        chinchilla: Chinchilla's law of the last losses.
        chinchilla_forecast: its forecast of the largest model.
        multi_power: forecasts by the multi-power law, for each size of a model; or why none.
    """

    losses: str
    chinchilla: ChinchillaLaw | Undefined
    chinchilla_forecast: ChinchillaForecast | Undefined
    multi_power: tuple[ModelForecast, ...] | Undefined


@dataclass(frozen=True)
class CurveClaim:
    """A claim and its verdict on curves.

    Attributes:
        runs: name of the run, or of the runs' model; "all runs" for a law over runs.
        losses: name of the column of losses.
        row: the claim.
    """

    runs: str
    losses: str
    row: ExplanationRow


@dataclass(frozen=True)
class CurveLawsResult:
    """The content of curve_laws.json.

    Attributes:
        n_resamples: number of bootstrap resamples of each fit.
        seed: seed of the bootstrap.
        tables: laws of each run.
        over_tables: laws over the runs, for each column that several tables have.
        claims: every claim; all of them are one family (Holm).
    """

    n_resamples: int
    seed: int
    tables: tuple[TableLaws, ...]
    over_tables: tuple[LawsOverTables, ...]
    claims: tuple[CurveClaim, ...]

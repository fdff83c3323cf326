"""`laws_curves`: fit the laws of loss curves in tables, write curve_laws.json.

Shapes: K steps with a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.schemas import CURVE_LAWS_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.laws.chinchilla import chinchilla_over_runs, forecast_chinchilla
from megatron_tokscale.laws.claims import (
    ClaimRow,
    chinchilla_row,
    corrected,
    deceleration_row,
    multi_power_rows,
    one_third_row,
)
from megatron_tokscale.laws.deceleration import (
    WINDOW,
    decimal_rows,
    fit_deceleration,
    log_window_mean,
)
from megatron_tokscale.laws.multi_power.forecast import NamedCurve, forecast_longest
from megatron_tokscale.laws.one_third.one_third import fit_one_third
from megatron_tokscale.laws.power_law.power_law import fit_power_law
from megatron_tokscale.laws.tables.columns import ColumnNames
from megatron_tokscale.laws.tables.curves import Curve, CurveTable
from megatron_tokscale.laws.tables.manifest import tables_of
from megatron_tokscale.results.estimate import Undefined, defined_or_reason
from megatron_tokscale.results.laws import Deceleration, OneThirdLaw, RunLoss, ScheduleForecast
from megatron_tokscale.results.laws.curves import (
    CurveClaim,
    CurveLaws,
    CurveLawsResult,
    LawsOverTables,
    ModelForecast,
    TableLaws,
)
from megatron_tokscale.store.paths import check_result

FILE_NAME: Final = "curve_laws.json"
ALL_RUNS: Final = "all runs"


def laws_curves(
    files: Sequence[Path],
    *,
    manifest: Path | None = None,
    columns: ColumnNames | None = None,
    out: Path | None = None,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> CurveLawsResult:
    """Fit the laws of the loss curves in tables of one run each, and the laws over these runs.

    Each curve has a power law of the step, the one-third law if the table holds learning rates, and
    the broken law of loss deceleration. Over runs there are Chinchilla's law, if the manifest gives
    sizes and tokens are known, with a forecast of the largest model from the smaller ones; and for
    each size the multi-power law of its shorter runs, with a forecast of its longest ones.

    Args:
        files: CSV or parquet files; may be empty with a manifest.
        manifest: file that gives names, sizes and tokens per step (`tables_of`).
        columns: names of columns; the rule of `find_columns` finds the others.
        out: folder that curve_laws.json is written to; None writes nothing.
        n_resamples: number of bootstrap resamples of each fit.
        seed: seed of the bootstrap.
        progress: receiver of the name of each stage; None for none.

    Raises:
        TokscaleError: a file cannot be read, has no steps or no losses, or as in `find_columns`;
            `out` is refused by `check_result`.
    """
    progress = progress or NoProgress()
    if out is not None:
        check_result(out, FILE_NAME)
    progress.stage("tables")
    facts = tables_of(files, manifest)
    tables = [CurveTable.read(each, columns or ColumnNames()) for each in facts]
    fits = _Fits(n_resamples, seed)
    progress.stage("laws of each curve")
    of_tables = tuple(fits.table(table) for table in tables)
    progress.stage("laws over runs")
    over = tuple(fits.over(tables, name) for name in _shared(tables))
    result = CurveLawsResult(n_resamples, seed, of_tables, over, _claims(of_tables, over))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TokscaleError(f"cannot make the folder {out}: {error.strerror}") from error
        write_typed_result(out / FILE_NAME, CURVE_LAWS_SCHEMA, result)
    return result


@dataclass(frozen=True)
class _Fits:
    """Fits of the laws with one number of resamples and one seed."""

    n_resamples: int
    seed: int

    def table(self, table: CurveTable) -> TableLaws:
        """Return the laws of each curve of a table."""
        return TableLaws(
            name=table.facts.name,
            file=str(table.facts.file),
            parameters=table.facts.parameters,
            step_column=table.columns.step,
            tokens_column=table.columns.tokens,
            learning_rate_column=table.columns.learning_rate,
            n_rows=table.n_rows,
            n_without_step=table.n_without_step,
            curves=tuple(self._curve(table, curve) for curve in table.curves),
        )

    def _curve(self, table: CurveTable, curve: Curve) -> CurveLaws:
        return CurveLaws(
            losses=curve.name,
            n_points=len(curve.step_K),
            n_missing=curve.n_missing,
            n_merged=curve.n_merged,
            last_step=float(curve.step_K[-1]),
            tokens=curve.tokens,
            last_loss=float(curve.loss_K[-1]),
            power_law=defined_or_reason(
                lambda: fit_power_law(
                    curve.step_K, curve.loss_K, n_resamples=self.n_resamples, seed=self.seed
                )
            ),
            one_third=defined_or_reason(lambda: _one_third(table, curve)),
            deceleration=defined_or_reason(lambda: self._deceleration(curve)),
        )

    def _deceleration(self, curve: Curve) -> Deceleration:
        """Average and thin the losses as Mircea et al. do, and fit their broken law."""
        smooth_K = log_window_mean(curve.step_K, curve.loss_K, WINDOW)
        rows = decimal_rows(curve.step_K)
        return fit_deceleration(
            curve.step_K[rows], smooth_K[rows], n_resamples=self.n_resamples, seed=self.seed
        )

    def over(self, tables: Sequence[CurveTable], name: str) -> LawsOverTables:
        """Return the laws over the runs whose tables have the column `name`."""
        pairs = [(table, curve) for table in tables for curve in table.curves if curve.name == name]
        rows = [_run_loss(table, curve) for table, curve in pairs]
        return LawsOverTables(
            losses=name,
            chinchilla=defined_or_reason(
                lambda: chinchilla_over_runs(rows, self.n_resamples, self.seed)
            ),
            chinchilla_forecast=defined_or_reason(
                lambda: forecast_chinchilla(rows, n_resamples=self.n_resamples, seed=self.seed)
            ),
            multi_power=defined_or_reason(lambda: _multi_power(pairs)),
        )


def _one_third(table: CurveTable, curve: Curve) -> OneThirdLaw:
    sum_T = np.concatenate([[0.0], np.cumsum(table.rates())])
    return fit_one_third(sum_T[curve.step_K.astype(np.int64)], curve.loss_K)


def _multi_power(pairs: Sequence[tuple[CurveTable, Curve]]) -> tuple[ModelForecast, ...]:
    """Return the forecasts of the longest runs of each model.

    Raises:
        UndefinedError: no size is known.
    """
    sizes = sorted({size for table, _ in pairs if (size := table.facts.parameters) is not None})
    if not sizes:
        raise UndefinedError(
            "no size of a model is known, so no two runs are known to be of one model; give a "
            "manifest with parameters"
        )

    return tuple(
        ModelForecast(
            size,
            defined_or_reason(
                partial(_forecasts, [pair for pair in pairs if pair[0].facts.parameters == size])
            ),
        )
        for size in sizes
    )


def _forecasts(pairs: Sequence[tuple[CurveTable, Curve]]) -> tuple[ScheduleForecast, ...]:
    """Return the forecasts of the longest of the runs of one model."""
    return forecast_longest(
        [
            NamedCurve.after_warmup(
                table.facts.name, table.rates(), curve.step_K.astype(np.int64), curve.loss_K
            )
            for table, curve in pairs
        ]
    )


def _run_loss(table: CurveTable, curve: Curve) -> RunLoss:
    return RunLoss(
        name=table.facts.name,
        parameters=None,
        non_embedding=table.facts.parameters,
        flops_per_token=None,
        tokens=None if curve.tokens is None else round(curve.tokens),
        loss=float(curve.loss_K[-1]),
    )


def _shared(tables: Sequence[CurveTable]) -> list[str]:
    """Return the columns of losses that two tables or more have, in their order."""
    names = [curve.name for table in tables for curve in table.curves]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _claims(tables: Sequence[TableLaws], over: Sequence[LawsOverTables]) -> tuple[CurveClaim, ...]:
    """Return all claims, corrected as one family."""
    found: list[tuple[str, str, ClaimRow]] = []
    for table in tables:
        for curve in table.curves:
            for row in (one_third_row(curve.one_third), deceleration_row(curve.deceleration)):
                found.append((table.name, curve.losses, row))
    for laws in over:
        found.append((ALL_RUNS, laws.losses, chinchilla_row(laws.chinchilla_forecast)))
        if isinstance(laws.multi_power, Undefined):
            rows = multi_power_rows(laws.multi_power)
            found += [(ALL_RUNS, laws.losses, row) for row in rows]
        else:
            for model in laws.multi_power:
                rows = multi_power_rows(model.forecasts)
                found += [(f"{model.parameters:,} parameters", laws.losses, row) for row in rows]
    rows_of = corrected([row for _, _, row in found])
    return tuple(
        CurveClaim(runs, losses, row) for (runs, losses, _), row in zip(found, rows_of, strict=True)
    )

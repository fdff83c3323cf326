"""The laws of tables of curves as a table for a terminal."""

from megatron_tokscale.core.words import counted
from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.laws.curves import (
    CurveClaim,
    CurveLaws,
    CurveLawsResult,
    LawsOverTables,
    TableLaws,
)


def describe_curves(laws: CurveLawsResult) -> str:
    """Return the columns that were read, the laws of every curve and over runs, and the claims."""
    lines = [line for table in laws.tables for line in _table(table)]
    for over in laws.over_tables:
        lines += _over(over)
    lines.append("  claims, their verdicts (Holm over all of them); predicted; measured")
    for claim in laws.claims:
        lines += _claim(claim)
    return "\n".join(lines)


def _table(table: TableLaws) -> list[str]:
    columns = (
        f"step: {table.step_column or 'from the tokens'}; "
        f"tokens: {table.tokens_column or 'no column'}; "
        f"learning rate: {table.learning_rate_column or 'no column'}"
    )
    rows = counted(table.n_rows, "row")
    if table.n_without_step:
        rows += f", {table.n_without_step:,} without a step left out"
    return [
        f"{table.name} ({rows}; {columns})",
        f"  {'losses':<28}{'points':>7}{'missing':>8}{'merged':>7}{'last loss':>10}"
        "  L = E + B t^-alpha: E, alpha [95%]",
        *(_curve(curve) for curve in table.curves),
    ]


def _curve(curve: CurveLaws) -> str:
    found = curve.power_law
    if isinstance(found, Undefined):
        law = found.undefined
    else:
        law = f"{format_estimate(found.floor)}, {format_estimate(found.exponent)}"
        law += "; residuals drift" if found.drifts else ""
    return (
        f"  {curve.losses:<28}{curve.n_points:>7,}{curve.n_missing:>8,}{curve.n_merged:>7,}"
        f"{curve.last_loss:>10.4f}  {law}"
    )


def _over(laws: LawsOverTables) -> list[str]:
    law, forecast = laws.chinchilla, laws.chinchilla_forecast
    lines = [f"over the runs, {laws.losses}"]
    if isinstance(law, Undefined):
        lines.append(f"  Chinchilla: {law.undefined}")
    else:
        lines.append(
            f"  Chinchilla: E {format_estimate(law.floor)}, alpha {format_estimate(law.alpha)}, "
            f"beta {format_estimate(law.beta)}, R^2 {law.r2:.4f}"
            + ("" if law.converged else ", not converged")
        )
    if not isinstance(forecast, Undefined):
        rows = zip(forecast.names, forecast.loss_S, forecast.predicted_S, strict=True)
        lines += [
            f"  {name}: {predicted:.4f} predicted from smaller models, {loss:.4f} measured "
            f"({predicted / loss - 1:+.2%})"
            for name, loss, predicted in rows
        ]
    return lines


def _claim(claim: CurveClaim) -> list[str]:
    row = claim.row
    return [
        f"  {row.verdict.value:<10}{row.explanation}: {row.claim} ({claim.runs}, {claim.losses})",
        f"  {'':<10}{row.outcome}",
    ]

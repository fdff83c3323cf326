"""A fit's summary as a table for a terminal."""

from collections.abc import Mapping
from typing import Any


def describe_fit(summary: Mapping[str, Any]) -> str:
    """Shares of the classes, in tokens and in what the loss fell, from the content of fit.json."""
    lines = [
        f"{summary['n_tokens']:,} tokens at {summary['n_probes']} probe steps "
        f"(time: {summary['time']}), {summary['tokens_per_second']:,.0f} tokens/s",
        f"  {'class':<16}{'tokens':>8}{'fall of the loss':>18}",
    ]
    for name, row in summary["classes"].items():
        fall = "-" if row["fall_share"] is None else f"{100 * row['fall_share']:.1f}%"
        lines.append(f"  {name:<16}{100 * row['share']:>7.1f}%{fall:>18}")
    n_tokens = max(summary["n_tokens"], 1)
    shares = {name: 100 * count / n_tokens for name, count in summary["status"].items()}
    lines.append(
        f"  midpoints of the one sigmoid: {shares['converged']:.1f}% with an error, "
        f"{shares['too-few-points']:.1f}% known to the probes' spacing, "
        f"{shares['undetermined']:.1f}% not determined, {shares['at-bound']:.1f}% at a bound"
    )
    if resumed := summary.get("resumed_tokens"):
        lines[0] += f"; {resumed:,} tokens were fitted before"
    non_finite = summary["non_finite"]
    if non_finite["tokens"]:
        lines.append(
            f"  {non_finite['losses']:,} losses of {non_finite['tokens']:,} tokens are NaN or "
            "infinite; they are left out"
        )
    return "\n".join(lines)

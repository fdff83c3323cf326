"""A fit's summary as a table for a terminal."""

import math

from megatron_tokscale.core.words import counted
from megatron_tokscale.fit.summary import FitSummary
from megatron_tokscale.fit.table import FitStatus


def describe_fit(summary: FitSummary) -> str:
    """Return the shares of the classes, in tokens and in the fall of the loss, as lines."""
    lines = [
        f"{counted(summary.n_tokens, 'token')} at {counted(summary.n_probes, 'probe')} "
        f"(time: {summary.identity.time_name}), {summary.tokens_per_second:,.0f} tokens/s",
        f"  {'class':<16}{'tokens':>8}{'fall of the loss':>18}",
    ]
    for name, row in summary.classes.items():
        fall = f"{100 * row.fall_share:z.1f}%" if math.isfinite(row.fall_share) else "-"
        lines.append(f"  {name:<16}{100 * row.share:>7.1f}%{fall:>18}")
    n_tokens = max(summary.n_tokens, 1)
    share = {status: 100 * summary.status[status.label] / n_tokens for status in FitStatus}
    lines.append(
        f"  midpoints of the one sigmoid: {share[FitStatus.CONVERGED]:.1f}% with an error, "
        f"{share[FitStatus.TOO_FEW_POINTS]:.1f}% known to the probes' spacing, "
        f"{share[FitStatus.UNDETERMINED]:.1f}% not determined, "
        f"{share[FitStatus.AT_BOUND]:.1f}% at a bound"
    )
    lines += [
        f"  common shifts taken out of {each.dataset}: {each.shared:.2g} nats, "
        f"{100 * each.share:.1f}% of the losses' departures from their neighbours"
        for each in summary.common_shifts or ()
    ]
    if summary.common_shifts is None:
        lines.append("  common shifts are kept (--keep-common-shifts)")
    if summary.resumed_tokens:
        lines[0] += f"; {summary.resumed_tokens:,} tokens were fitted before"
    if summary.non_finite.tokens:
        lines.append(
            f"  {summary.non_finite.losses:,} losses of {summary.non_finite.tokens:,} tokens are "
            "NaN or infinite; they are left out"
        )
    return "\n".join(lines)

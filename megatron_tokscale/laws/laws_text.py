"""The laws of a run as a table for a terminal."""

from megatron_tokscale.core.words import counted, time_text
from megatron_tokscale.results import non_finite_line
from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.laws import LawsResult, LossPowerLaw, MonogenicShare, ZeroSumResult


def describe_laws(laws: LawsResult) -> str:
    """Return the fitted laws with their intervals, the spectrum's tail, and all explanations."""
    kind = laws.fit.unit_kind
    lines = [
        f"  L = E + B t^-alpha, t = {laws.time} from {time_text(laws.settings.start)} on, 95% "
        "intervals of alpha",
        f"  over the scatter of the probes, and over {kind}",
        f"  {'':<16}{'E (nats)':<24}{'alpha (probes)':<24}{f'({kind})':<24}{'R^2':>6}  points",
        _power_law("all tokens", laws.overall),
        *(_power_law(dataset.name, dataset.power_law) for dataset in laws.datasets),
        *(
            _power_law(f"from {time_text(other.start)}", other.power_law)
            for other in laws.other_starts
        ),
        *non_finite_line(laws.non_finite),
        _tail(laws),
        _zero_sum(laws.zero_sum, laws.time),
        _monogenic(laws.quanta.monogenic),
        f"  {'explanation':<28}{'claim and verdict (Holm); predicted; measured'}",
    ]
    for row in laws.explanations:
        lines += [
            f"  {row.explanation:<28}{row.claim}: {row.verdict.value}",
            f"  {'':<28}{row.outcome}",
        ]
    return "\n".join(lines)


def _power_law(name: str, found: LossPowerLaw | Undefined) -> str:
    if isinstance(found, Undefined):
        return f"  {name:<16}{found.undefined}"
    law = found.law
    doubt = "" if law.converged else "  not converged"
    if law.drifts:
        doubt += f"  residuals drift (rho {law.autocorrelation:.2f}), so it is no power law"
    columns = (law.floor, law.exponent, found.exponent_documents)
    return (
        f"  {name:<16}{''.join(f'{format_estimate(column):<24}' for column in columns)}"
        f"{law.r2:>6.3f}{law.n_points:>8}{doubt}"
    )


def _tail(laws: LawsResult) -> str:
    tail, compared = laws.tail, laws.tail_minus_law
    if isinstance(tail, Undefined):
        return f"  tail exponent of the spectrum: undefined: {tail.undefined}"
    words = f"  tail exponent of the spectrum: {format_estimate(tail.exponent)}"
    if isinstance(compared, Undefined):
        return words
    return (
        f"{words}; minus alpha from {time_text(compared.law.law.from_time)} on: "
        f"{format_estimate(compared.difference)}"
    )


def _zero_sum(found: ZeroSumResult | Undefined, time: str) -> str:
    if isinstance(found, Undefined):
        return f"  zero-sum learning: undefined: {found.undefined}"
    last = found.pairs[-1]
    return (
        f"  from {time} {time_text(last.from_step)} to {time_text(last.to_step)} a token's loss "
        "moved by "
        f"{format_estimate(last.movement)} nats; a share of {format_estimate(last.interference)} "
        "of the movement cancels in the mean (zero-sum learning)"
    )


def _monogenic(found: MonogenicShare | Undefined) -> str:
    if isinstance(found, Undefined):
        return f"  tokens that fall from plateau to plateau: undefined: {found.undefined}"
    return (
        f"  {found.share:.2%} of {counted(found.n_tokens, 'token')} fall from plateau to plateau "
        f"in one step; under the null model {found.null_share:.2%}"
    )

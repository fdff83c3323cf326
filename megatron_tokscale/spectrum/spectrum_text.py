"""Results of the spectrum room as tables for a terminal."""

import numpy as np

from megatron_tokscale.results import non_finite_line
from megatron_tokscale.results.estimate import Estimate, Undefined, format_estimate
from megatron_tokscale.results.evidence import (
    RECONSTRUCTIONS,
    Evidence,
    ForwardPrediction,
    SlopeNoise,
)
from megatron_tokscale.results.spectrum import DatasetCounts, SpectrumSummary
from megatron_tokscale.spectrum.evidence_text import describe_locality


def describe_spectrum(evidence: Evidence, *, has_second_run: bool = False) -> str:
    """Return reconstructions, widths beside the null model's, and the forecast as lines.

    Args:
        evidence: the tests of one run.
        has_second_run: true if `describe_transfer` of a second run follows.
    """
    lines = [
        *non_finite_line(evidence.non_finite),
        f"  scored: {evidence.scored.describe(evidence.fit.time_name)}",
        *_reconstructions(evidence),
        *describe_locality(evidence.widths, has_second_run),
        *_forward(evidence.forward),
    ]
    return "\n".join(lines)


def _reconstructions(evidence: Evidence) -> list[str]:
    """Return the noise of the mean loss, and the table of the reconstructions."""
    noise, scores = evidence.slope_noise, evidence.same_tokens
    lines = [
        f"  noise of the mean loss in nats: {format_estimate(noise.noise, '.4f')}, shared by all "
        f"tokens {format_estimate(noise.shared, '.4f')}; lag-one correlation "
        f"{noise.lag_one_correlation:.2f}",
        *(f"    {name}: {_noise_of(each)}" for name, each in evidence.dataset_noise.items()),
        f"  R^2 of -dL/dx that a perfect model would reach: {_ceiling(noise.ceiling)}",
    ]
    reasons = {each.r2.undefined for each in scores.values() if isinstance(each.r2, Undefined)}
    lines += [f"  {reason}" for reason in sorted(reasons)]
    other_half = f"other {evidence.fit.unit_kind}"
    head = f"{'R^2 (95%)':<26}{other_half:<26}{'error of the loss, nats'}"
    lines.append(f"  {'-dL/dx reconstructed from':<28}{head}")
    for name, words in RECONSTRUCTIONS.items():
        same, other = scores[name], evidence.other_documents[name].r2
        lines.append(
            f"    {words:<26}{format_estimate(same.r2):<26}"
            f"{format_estimate(other):<26}{format_estimate(same.loss_error)}"
        )
    return lines + _twins(evidence)


def _twins(evidence: Evidence) -> list[str]:
    """Return each R² beside those of the planted twins; nothing where there is no R²."""
    twins = evidence.twins
    if all(isinstance(each.r2, Undefined) for each in evidence.same_tokens.values()):
        return []
    if isinstance(twins, Undefined):
        return [f"  planted twins: undefined: {twins.undefined}"]
    twin = f"R^2 beside planted twins of {twins.tokens:,} tokens"
    lines = [f"  {twin:<48}{'without steps':<16}{'the run':<10}with steps"]
    for name, words in RECONSTRUCTIONS.items():
        r2 = evidence.same_tokens[name].r2
        value = "-" if isinstance(r2, Undefined) else f"{r2.value:.2f}"
        lines.append(
            f"    {words:<46}{twins.without_steps[name].value:<16.2f}{value:<10}"
            f"{twins.with_steps[name].value:.2f}"
        )
    return lines


def describe_datasets(summary: SpectrumSummary) -> str:
    """Return the table of what became of the tokens of each dataset."""
    head = f"{'tokens':>11}{'learned':>9}{'censored':>10}{'known':>7}{'forgotten':>11}"
    scored = summary.scored.describe(summary.fit.time_name)
    lines = [
        f"  tokens by the end of the scored range: {scored}",
        f"    {'dataset':<22}{head}  {'median':<34}{'nats learned':<22}nats expected",
    ]
    rows = [summary.overall, *(summary.datasets if len(summary.datasets) > 1 else ())]
    return "\n".join([*lines, *(_dataset(each) for each in rows)])


def _dataset(each: DatasetCounts) -> str:
    counts = (each.n_events, each.censored, each.known, each.forgotten)
    share = [f"{100 * count / max(each.n_tokens, 1):.1f}%" for count in counts]
    median = "after the end"
    if isinstance(each.median_x, Estimate):
        ends = (each.median_x.value, each.median_x.low, each.median_x.high)
        median = format_estimate(Estimate(*np.exp(ends).tolist()), ".4g")
    return (
        f"    {each.name:<22}{each.n_tokens:>11,}{share[0]:>9}{share[1]:>10}{share[2]:>7}"
        f"{share[3]:>11}  {median:<34}{format_estimate(each.learned_nats):<22}"
        f"{format_estimate(each.expected_nats)}"
    )


def _noise_of(noise: SlopeNoise | Undefined) -> str:
    if isinstance(noise, Undefined):
        return f"undefined: {noise.undefined}"
    ceiling = _ceiling(Estimate(noise.ceiling.value))
    return f"shared {format_estimate(noise.shared, '.4f')}, ceiling {ceiling}"


def _ceiling(ceiling: Estimate) -> str:
    """Return an R² that a perfect model would reach; below 0, its size says nothing."""
    return format_estimate(ceiling) if ceiling.value >= 0 else "below 0"


def _forward(forward: ForwardPrediction | Undefined) -> list[str]:
    if isinstance(forward, Undefined):
        return [f"  forward in time: undefined: {forward.undefined}"]
    forecasts = {
        "the tokens' fits": forward.tokens,
        "a power law of the mean loss": forward.power_law,
        "a uniform spectrum: the slope stays": forward.uniform,
    }
    return [
        f"  the last factor of two in time: the loss fell by {format_estimate(forward.fall)} nats",
        "  mean error of forecasts from the first half, in nats:",
        *(f"    {name:<42}{format_estimate(each.error)}" for name, each in forecasts.items()),
        "  error of the best rival minus error of the tokens' fits: "
        + format_estimate(forward.gain_over_best_rival),
        *(
            f"    which {name} falls, skill minus skill of permuted times: "
            f"{format_estimate(each.gain_over_permuted)}"
            for name, each in forward.groups.items()
        ),
    ]

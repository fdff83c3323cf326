"""Results of the spectrum room as tables for a terminal."""

from megatron_tokscale.results import non_finite_line
from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.evidence import Evidence, ForwardPrediction
from megatron_tokscale.spectrum.evidence_text import describe_locality

_RECONSTRUCTIONS = {
    "full": "every token's own transition",
    "kernel": "drop-weighted spectrum, one kernel",
    "spectrum": "learning times alone",
}


def describe_spectrum(evidence: Evidence) -> str:
    """Return reconstructions, widths beside the null model's, and the forecast as lines."""
    lines = [
        *non_finite_line(evidence.non_finite),
        *_reconstructions(evidence),
        *describe_locality(evidence.widths),
        *_forward(evidence.forward),
    ]
    return "\n".join(lines)


def _reconstructions(evidence: Evidence) -> list[str]:
    lines = [f"  {'-dL/dx reconstructed from':<46}{'R^2 (95%)':<26}{'other documents'}"]
    for name, meaning in _RECONSTRUCTIONS.items():
        same = format_estimate(evidence.same_tokens[name])
        other = format_estimate(evidence.other_documents[name])
        lines.append(f"  {name + ': ' + meaning:<46}{same:<26}{other}")
    return lines


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

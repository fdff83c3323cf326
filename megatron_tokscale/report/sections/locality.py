"""The section on locality: the widths of the transitions beside those of mean-curve tokens."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report import figures
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import estimate, figure, number, paragraph, section, table
from megatron_tokscale.report.verdicts import Verdict, outcome
from megatron_tokscale.spectrum.evidence.locality import LOCAL_BELOW

_UNITS = ("width_decades", "width_of_range")
_REASONS = {
    True: "The transitions are narrower than if every token followed the mean curve.",
    False: f"The interval of the ratio is not below {LOCAL_BELOW}: transitions as wide as those "
    "of tokens that follow the mean curve are not excluded.",
    None: "There are too few falling tokens, or documents, for a ratio with an interval.",
}


def locality(analysis: Analysis) -> str:
    """Widths of the transitions beside those of tokens that follow the mean curve."""
    widths = analysis.reconstruction["widths"]
    return section(
        "locality",
        "How local learning is",
        paragraph(
            "The time from 10% to 90% of a token's transition, in decades of time. Beside it the "
            "same fit on tokens that each follow the mean curve, with their own level, amplitude "
            "and noise: what would be seen if no token had a learning time of its own."
        ),
        paragraph(_verdict(widths), "verdict"),
        figure(
            figures.widths(analysis),
            "Falling tokens with a trusted midpoint, weighted by their drop; two-step and gradual "
            "tokens are in neither histogram. Widths below the spacing of the probes are known "
            "only as small.",
        ),
        table(
            "A window is a token's own 10–90% window; a perfect sigmoid has 80% of its fall there. "
            "95% intervals over documents.",
            ["", "observed", "mean-curve null"],
            _rows(widths["observed"], widths["mean_curve_null"]),
        ),
    )


def locality_verdict(analysis: Analysis) -> Verdict:
    """Whether the transitions are narrower than those of the null."""
    widths = analysis.reconstruction["widths"]
    return Verdict(
        "locality",
        "Tokens are learned in narrow windows of time",
        widths["local"],
        estimate(widths, "median_over_null"),
        f"median width over that of mean-curve tokens; its whole interval below {LOCAL_BELOW}",
    )


def _verdict(widths: Mapping[str, Any]) -> str:
    half = [
        number(widths[name]["width_decades"]["p50"], ".2f")
        for name in ("observed", "mean_curve_null")
    ]
    return (
        f"Local learning: {outcome(widths['local'])}. Half of the falling tokens' drop is in "
        f"transitions narrower than {half[0]} decades; for mean-curve tokens it is {half[1]}. "
        f"Ratio of the two: {estimate(widths, 'median_over_null')}. {_REASONS[widths['local']]}"
    )


def _rows(observed: Mapping[str, Any], null: Mapping[str, Any]) -> list[list[str]]:
    both = (observed, null)
    decades, of_range = ([each[unit] for each in both] for unit in _UNITS)
    quartiles = (("p25", "a quarter"), ("p50", "half"), ("p75", "three quarters"))
    return [
        ["fitted tokens in the comparison", *(number(each["tokens"], ",") for each in both)],
        ["of these falling, and counted", *(number(each["falling"], ",") for each in both)],
        *(
            [f"{name} of the drop is narrower than (decades)"]
            + [estimate(each, quartile) for each in decades]
            for quartile, name in quartiles
        ),
        [
            "median width over the probed range",
            *(estimate(each, "p50", ".1%") for each in of_range),
        ],
        [
            "share of the fall inside the tokens' own windows",
            *(estimate(each, "fall_in_windows", ".1%") for each in both),
        ],
    ]

"""Parts on two runs of the same tokens: the covariance of their falls, and the surface."""

import math
from typing import Final

from megatron_tokscale.report.charts import short, time_unit
from megatron_tokscale.report.html import escape, estimate, number, paragraph, table
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.primary import COVARIANCE
from megatron_tokscale.results.transfer import FallCovariance, Surface, Transfer
from megatron_tokscale.results.verdict import ClaimTest

_COVARIANCE: Final = (
    "mean covariance of falls in octaves far apart, over that in the same octave; without steps it "
    "is positive"
)
_SKILL: Final = "share of the misfit of the null model that the prediction leaves out"


def two_run_rows(anchor: str, transfer: Transfer) -> list[VerdictRow]:
    """Return the verdicts on the covariance of falls and on the surface."""
    falls, surface = transfer.falls, transfer.surface
    test = ClaimTest.of(COVARIANCE, falls) if isinstance(falls, Undefined) else falls.test
    meaning = f"{_COVARIANCE} ({escape(transfer.source)})"
    rows = [VerdictRow.of(anchor, test, meaning, primary=True)]
    if not isinstance(surface, Undefined):
        rows += [
            VerdictRow.of(
                anchor,
                each,
                _SKILL,
                claim=f"Falls of learning-time bins, predicted from {escape(transfer.source)}: "
                f"{escape(each.claim.name)}",
            )
            for each in surface.tests.values()
        ]
    return rows


def falls_parts(falls: FallCovariance | Undefined, clock: str) -> list[str]:
    """Return the text and the table of the covariance of falls, or why it is undefined."""
    title = "<h4>Falls of a token in two octaves of time</h4>"
    if isinstance(falls, Undefined):
        return [title, paragraph(f"Covariance of falls: undefined: {escape(falls.undefined)}.")]
    first, last = (short(math.exp(x)) for x in (falls.edges[0], falls.edges[-1]))
    octaves = len(falls.edges) - 1
    return [
        title,
        paragraph(
            "A token's fall in an octave of time in one run, and its fall in another octave in "
            "the other run, each less the mean fall of its group: without steps the two have a "
            "positive covariance, as large tokens fall more everywhere. With steps it is negative "
            "for octaves far apart, since a token that has fallen has nothing left to fall. No fit "
            "is needed, and the noise of the runs is independent."
        ),
        paragraph(
            f"Octaves far apart: {outcome(falls.test.verdict)}. Their covariance, over that in "
            f"one octave, is {_shown(falls.test)}; without steps it is positive, near 1. Of the "
            "variance of a token's fall in an octave, "
            f"{estimate(falls.reproducible, '.1%')} are the same in both runs.",
            "verdict",
        ),
        table(
            f"Mean covariance of falls by the distance of the octaves, over that at distance 0: "
            f"{octaves} octaves from {first} to {last} {time_unit(clock)}, "
            f"{number(falls.tokens, ',')} tokens in {number(falls.groups, ',')} groups. Far is a "
            f"distance of {falls.far_octaves} or more.",
            ["distance (octaves)", "covariance"],
            [[str(lag), estimate(each, ",.2f")] for lag, each in enumerate(falls.profile)],
        ),
    ]


def surface_parts(surface: Surface | Undefined) -> list[str]:
    """Return the text and the table of the surface, or why it is undefined."""
    title = "<h4>Falls of learning-time bins</h4>"
    if isinstance(surface, Undefined):
        return [title, paragraph(f"Surface: undefined: {escape(surface.undefined)}.")]
    return [
        title,
        paragraph(
            f"The tokens are cut into {number(surface.bins, ',')} bins by their learning time in "
            "the other run, the tokens without one being the last bin. How much each bin falls in "
            f"each of {number(surface.intervals, ',')} intervals of this run, beyond the mean fall "
            "of its groups, is predicted from the other run. The null model gives every token the "
            "mean curve of its group, scaled to its total fall in the other run; it explains "
            f"{number(surface.null, '.1%')} of the variance between the bins."
        ),
        table(
            "Skill: the share of the null model's misfit that a prediction leaves out; below 0, "
            "the null model leaves out that share of the prediction's. A is the other run.",
            ["prediction", "skill", "verdict"],
            [
                [escape(name), _shown(test), outcome(test.verdict)]
                for name, test in surface.tests.items()
            ],
        ),
    ]


def _shown(test: ClaimTest) -> str:
    return "–" if isinstance(test.estimate, Undefined) else estimate(test.estimate)

"""Verdicts on claims that the data could have refuted, and their table at the head of the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_tokscale.report.html import escape, estimate, paragraph, table
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.verdict import ClaimTest, Verdict


@dataclass(frozen=True)
class VerdictRow:
    """One claim and its verdict; the texts are HTML.

    Attributes:
        anchor: id of the section, or part of it, that shows the test.
        claim: the claim that was tested.
        verdict: the verdict.
        number: the number that determines it, with its interval; why there is none.
        rule: meaning of that number, and the condition under which the claim holds.
        primary: true for a primary test, which stands first and is not corrected for others.
    """

    anchor: str
    claim: str
    verdict: Verdict
    number: str
    rule: str
    primary: bool = False

    @classmethod
    def of(
        cls,
        anchor: str,
        test: ClaimTest,
        meaning: str,
        *,
        claim: str = "",
        pattern: str = ",.3f",
        primary: bool = False,
    ) -> Self:
        """Return the row of a test.

        Args:
            anchor: id of the section that shows the test.
            test: the test.
            meaning: meaning of its number, as HTML.
            claim: the claim as HTML; by default the test's own words.
            pattern: format of the number.
            primary: whether the test is a primary one.
        """
        found = test.estimate
        undefined = isinstance(found, Undefined)
        return cls(
            anchor,
            claim or _sentence(test.claim.name),
            test.verdict,
            escape(found.undefined) if isinstance(found, Undefined) else estimate(found, pattern),
            meaning if undefined else f"{meaning}; holds {test.claim.rule}",
            primary,
        )


def outcome(verdict: Verdict | None) -> str:
    """Return the verdict in words as HTML; "undefined" for None, a number that there is not."""
    word = "undefined" if verdict is None else str(verdict)
    return f'<span class="outcome {word}">{word}</span>'


def summary(rows: Sequence[VerdictRow], units: str) -> list[str]:
    """Return the text and the table of all verdicts, the primary tests first.

    Args:
        rows: the verdicts.
        units: what the intervals resample: documents, samples or blocks.
    """
    ordered = sorted(rows, key=lambda row: not row.primary)
    return [
        paragraph(
            "The table lists every claim that the data of this run could have refuted: first the "
            "three primary tests of steps of single tokens, then claims about learning times, and "
            "claims of rival explanations. A claim <strong>holds</strong> if the whole 95% "
            "interval of its number is where the rule says, and <strong>fails</strong> if the "
            "whole interval is elsewhere. "
            "An interval on both sides excludes nothing: the claim is <strong>undecided</strong>."
        ),
        paragraph(
            "The primary tests are not corrected for each other. All others are corrected within "
            "their family (Holm), so an interval that excludes something alone may be undecided. "
            "One claim is not tested: that the fits add up to the run's own loss "
            'is <a href="#spectrum">nearly algebra</a>.'
        ),
        table(
            f"All intervals are 95%. They are from a bootstrap over {units} unless the text names "
            "another source: they cover other text, not other seeds of the training. A number with "
            "such an interval, and the interval, are corrected for the bias that the bootstrap "
            "shows.",
            ["claim", "verdict", "number", "meaning of the number, and rule of the verdict"],
            [_cells(row) for row in ordered],
            "words",
        ),
    ]


def _cells(row: VerdictRow) -> list[str]:
    claim = f'<a href="#{row.anchor}">{row.claim}</a>'
    return [
        f"<strong>{claim}</strong>" if row.primary else claim,
        outcome(row.verdict),
        row.number,
        row.rule,
    ]


def _sentence(words: str) -> str:
    """Return words from a claim as HTML that begins with a capital letter."""
    return escape(words[:1].upper() + words[1:])

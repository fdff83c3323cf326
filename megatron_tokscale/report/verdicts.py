"""Verdicts on claims that the data could have refuted, and their table at the head of the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from megatron_tokscale.report.html import paragraph, table

Outcome = bool | Sequence[bool | None] | None


class Words(NamedTuple):
    """Words for the outcomes True, False and None of a test."""

    passed: str
    failed: str
    undefined: str


TESTED: Final = Words("passed", "not shown", "undefined")
"""Words for a test whose passing is evidence."""
CLAIMED: Final = Words("holds", "fails", "undecided")
"""Words for a prediction: that it is not refuted is no evidence."""


@dataclass(frozen=True)
class Verdict:
    """One test and its outcome; the texts are HTML.

    Attributes:
        anchor: id of the section, or part of it, that shows the test.
        question: the claim that was tested.
        passed: the outcome, or one for each grouping of the tokens; None where it is undefined.
        estimate: the number that determines the verdict, with its interval.
        meaning: meaning of that number, and the condition for passing.
        words: `TESTED` or `CLAIMED`.
    """

    anchor: str
    question: str
    passed: Outcome
    estimate: str
    meaning: str
    words: Words = TESTED


def outcome(passed: Outcome, words: Words = TESTED) -> str:
    """Return the verdict in words; for several tests that differ, how many are passed."""
    if isinstance(passed, Sequence):
        return _several_outcomes(passed, words)
    word = words.undefined if passed is None else words.passed if passed else words.failed
    return f'<span class="outcome {word.replace(" ", "-")}">{word}</span>'


def _several_outcomes(results: Sequence[bool | None], words: Words) -> str:
    count = results.count(True)
    if 0 < count < len(results):
        return f'<span class="outcome">{words.passed} for {count} of {len(results)}</span>'
    if count:
        return outcome(True, words)
    return outcome(False if False in results else None, words)


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the text and the table of all verdicts, as parts of a section."""
    rows = [
        [
            f'<a href="#{each.anchor}">{each.question}</a>',
            outcome(each.passed, each.words),
            each.estimate,
            each.meaning,
        ]
        for each in verdicts
    ]
    return [
        paragraph(
            "The table lists every claim that the data of this run could have refuted: claims "
            "about learning times, and claims of rival explanations. “Not shown” means that a test "
            "was not passed; the null model is shown to be better only if the whole interval is on "
            "its side. “Holds” means that the data do not refute a prediction; a wide interval "
            "refutes little. One claim is not tested: that the fits add up to the run's own loss "
            'is <a href="#spectrum">nearly algebra</a>.'
        ),
        table(
            "All intervals are 95%. They are from a bootstrap over documents unless the text names "
            "another source: they cover other text, not other seeds of the training. A number with "
            "such an interval, and the interval, are corrected for the bias that the bootstrap "
            "shows.",
            ["claim", "verdict", "number", "meaning of the number, and rule of the verdict"],
            rows,
            "words",
        ),
    ]

"""What was tested on this run, and how it came out: the table at the head of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_tokscale.report.markup import paragraph, section, table

Outcome = bool | Sequence[bool | None] | None
Words = Mapping[bool | None, str]
TESTED: Words = {True: "passed", False: "not shown", None: "undefined"}
CLAIMED: Words = {True: "holds", False: "does not hold", None: "undecided"}


@dataclass(frozen=True)
class Verdict:
    """One test and its outcome; the texts are HTML.

    Attributes:
        anchor: id of the section that shows it.
        question: what was tested.
        passed: the outcome, or one for each grouping of the tokens; None where it is not defined.
        estimate: the number that decides, with its interval.
        meaning: what that number is, and when the test is passed.
        words: for the outcome: `TESTED`, or `CLAIMED` where nothing is shown by not being refuted.
    """

    anchor: str
    question: str
    passed: Outcome
    estimate: str
    meaning: str
    words: Words = field(default_factory=lambda: TESTED)


def outcome(passed: Outcome, words: Words = TESTED) -> str:
    """The verdict in words; for several tests that differ, how many are passed."""
    if isinstance(passed, Sequence):
        return _of_several(passed, words)
    word = words[passed]
    return f'<span class="outcome {word.replace(" ", "-")}">{word}</span>'


def _of_several(results: Sequence[bool | None], words: Words) -> str:
    count = results.count(True)
    if 0 < count < len(results):
        return f'<span class="outcome">{words[True]} for {count} of {len(results)}</span>'
    if count:
        return outcome(True, words)
    return outcome(False if False in results else None, words)


def summary(verdicts: Sequence[Verdict]) -> str:
    """The section with the table of all verdicts."""
    rows = [
        [
            f'<a href="#{each.anchor}">{each.question}</a>',
            outcome(each.passed, each.words),
            each.estimate,
            each.meaning,
        ]
        for each in verdicts
    ]
    return section(
        "verdicts",
        "Verdicts",
        paragraph(
            "Claims about learning times, and of their rivals, that could have been refuted here. "
            "“Not shown” says that a test was not passed; the null is shown to be better only "
            "where the whole interval is on its side. “Holds” says that a prediction was not "
            "refuted: a wide interval refutes little. That the fits rebuild the run's own loss is "
            'not among the tests: it is <a href="#spectrum">nearly algebra</a>.'
        ),
        table(
            "Intervals are 95%, by a bootstrap over documents unless another is named: they hold "
            "for other text, not for other seeds of the training. A number with an interval over "
            "documents is corrected, as its interval is, for the bias that the bootstrap shows.",
            ["tested", "verdict", "number", "which number, and when it passes"],
            rows,
            "words",
        ),
    )

"""The section on transfer: do the learning times of other runs say when this run learns what?

The table of skills per grouping of the tokens serves the forecast and the axes, too.
"""

import math
from collections.abc import Mapping
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import draw
from megatron_tokscale.report.html import (
    MEASURED,
    escape,
    estimate,
    figure,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.two_runs import falls_parts, surface_parts, two_run_rows
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.primary import COVARIANCE, NEEDS_SECOND_RUN, ORDER
from megatron_tokscale.results.skill import GroupSkill, GroupTest, GroupTests
from megatron_tokscale.results.transfer import LearningOrder, Transfer, TransferSettings
from megatron_tokscale.results.verdict import LEVEL, ClaimTest, Verdict

_AT_TIME: Final = "at the same time"
_AT_LOSS: Final = "at the same mean loss"
_DOTS: Final = {_AT_TIME: (MEASURED, "o"), _AT_LOSS: ("#0072b2", "s")}
_OFFSET: Final = 0.16  # rows between the dots of the two alignments
_PREDICTORS: Final = {
    "unigram": "ln of the token's frequency",
    "bigram": "ln of the frequency of the token and the one before",
    "position": "ln of the position",
}

SKILL: Final = (
    "Skill is the share of the variance between the groups' curves that a prediction explains: 1 "
    "is all of it, 0 is a prediction that is the same for every group, below 0 is worse than that."
)
PERMUTED: Final = (
    "The null model permutes the learning times among tokens of about the same drop, and every "
    "token keeps its drop: only the link between a token and its learning time is destroyed."
)
PASSES: Final = (
    "The claim for a grouping holds if the skill of the learning times, and their gain over the "
    "null model, are above zero with their whole 95% intervals, and if at most "
    f"{LEVEL:.0%} of the permutations, in a sample of the tokens, have as high a skill; p is their "
    "share. Frequency has no verdict: where rare tokens are learned later without any steps, its "
    "skill and its gain are the same."
)
_GAIN: Final = f"skill gained over permuted learning times, with the skill and p &le; {LEVEL:.0%}"
_RIVALS_MEANING: Final = (
    "The other columns are for comparison. “All models” uses the other run's models of all "
    "classes. “Curves of the other run” uses its measured losses, without any fit. “Own learning "
    "times” uses those of this run: it shows how far learning times can go."
)
_GAINS: Final = (
    "Skill gained over permuted learning times, with its 95% interval. Filled dots: "
    "the claim holds. Hollow dots: it fails, is undecided, or is none."
)


def transfer_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with the tests between this run and every other run that was tested."""
    title = ("transfer", "Two runs", "Do two runs learn the same tokens at the same time?")
    if not inputs.transfers:
        reason = escape(NEEDS_SECOND_RUN.undefined)
        return [Section(*title, [paragraph(f"Not tested: it {reason}.")], _without_second_run())]
    parts = [
        paragraph(
            "Another run was trained on the same tokens. This section compares the two, token by "
            "token and group of tokens by group."
        ),
        *(part for n, transfer in enumerate(inputs.transfers) for part in _from_run(n, transfer)),
    ]
    rows = [
        row
        for n, transfer in enumerate(inputs.transfers)
        for row in (
            _order_row(_anchor(n), transfer),
            *two_run_rows(_anchor(n), transfer),
            *(row for each in _alignments(transfer) for row in _rows(_anchor(n), transfer, *each)),
        )
    ]
    return [Section(*title, parts, rows)]


def _without_second_run() -> list[VerdictRow]:
    return [
        VerdictRow.of("transfer", ClaimTest.of(claim, NEEDS_SECOND_RUN), "–", primary=True)
        for claim in (ORDER, COVARIANCE)
    ]


def _anchor(n: int) -> str:
    return f"transfer-{n + 1}"


def _rows(anchor: str, transfer: Transfer, aligned: str, tests: GroupTests) -> list[VerdictRow]:
    """Return a verdict per grouping: do the source run's times predict which groups of tokens fall?

    An alignment that is undefined has one row.
    """
    claim = (
        f"Learning times of {escape(transfer.source)} predict which {{}} falls when in this run, "
        f"compared {aligned}"
    )
    if isinstance(tests, Undefined):
        reason = escape(tests.undefined)
        return [VerdictRow(anchor, claim.format("group"), Verdict.UNDECIDED, reason, "–")]
    return [
        VerdictRow.of(anchor, each.test, _GAIN, claim=claim.format(escape(name)), pattern="+,.3f")
        for name, each in tests.items()
        if each.test is not None
    ]


def _from_run(n: int, transfer: Transfer) -> list[str]:
    """Return the parts on one other run: its gains, its skills, and the learning order."""
    source, run_id = escape(transfer.source), escape(transfer.source_run_id)
    steps = transfer.source_steps
    picture = _gains_figure(_anchor(n), transfer)
    return [
        f'<h3 id="{_anchor(n)}">Learning times of {source} (id {run_id})</h3>',
        paragraph(
            f"The learning times are from {number(len(steps), ',')} probes, the last at step "
            f"{number(steps[-1], ',')}. The clock of both runs is {escape(transfer.clock)}."
        ),
        *_learning_order(transfer.order),
        *falls_parts(transfer.falls, transfer.clock),
        *surface_parts(transfer.surface),
        paragraph(f"Which groups of tokens fall when? {SKILL}"),
        paragraph(f"{PERMUTED} {PASSES}{least_p(transfer.settings)}"),
        paragraph(_RIVALS_MEANING, "soft"),
        figure(picture, _GAINS) if picture else "",
        *(_aligned(transfer, *each) for each in _alignments(transfer)),
    ]


def _alignments(transfer: Transfer) -> list[tuple[str, GroupTests]]:
    return [(_AT_TIME, transfer.absolute), (_AT_LOSS, transfer.by_loss)]


def _aligned(transfer: Transfer, aligned: str, tests: GroupTests) -> str:
    if isinstance(tests, Undefined):
        return paragraph(f"Compared {aligned}: {outcome(None)}: {escape(tests.undefined)}.")
    return groupings_table(
        f"Skill of the learning times of {escape(transfer.source)} in this run, compared "
        f"{aligned}; the intervals are over {number(transfer.n_units, ',')} "
        f"{transfer.fit.unit_kind}.",
        tests,
    )


def _gains_figure(anchor: str, transfer: Transfer) -> str:
    """Draw the gain over the null per grouping and alignment; nothing if no gain is defined."""
    defined = [
        (aligned, tests)
        for aligned, tests in _alignments(transfer)
        if not isinstance(tests, Undefined)
    ]
    groupings = list(dict.fromkeys(grouping for _, tests in defined for grouping in tests))
    if not groupings:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color="#999999", lw=0.8)
        for n, (aligned, tests) in enumerate(defined):
            colour, marker = _DOTS[aligned]
            for grouping, each in tests.items():
                place = groupings.index(grouping) + (2 * n - 1) * _OFFSET
                _gain(axes, place, each, colour, marker)
            axes.plot([], [], marker, ls="-", lw=1.4, ms=5, color=colour, label=aligned)
        axes.set_yticks(range(len(groupings)), groupings)
        axes.set_ylim(len(groupings) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("skill gained over permuted learning times")
        figure.legend(loc="outside upper left", ncols=2)

    alt = f"Gain over permuted learning times of {transfer.source} for each grouping of the tokens"
    return draw(anchor, alt, 0.9 + 0.36 * len(groupings), paint)


def _gain(axes: Axes, place: float, test: GroupTest, colour: str, marker: str) -> None:
    gain = test.gain_over_permuted
    if math.isnan(gain.value):
        return
    if gain.has_interval:
        axes.plot([gain.low, gain.high], [place, place], color=colour, lw=1.4)
    holds = test.test is not None and test.test.verdict is Verdict.HOLDS
    face = colour if holds else "white"
    axes.plot([gain.value], [place], marker, ms=5, mec=colour, mfc=face)


def _order_row(anchor: str, transfer: Transfer) -> VerdictRow:
    """Return the verdict: do learning times predict the order beyond the baseline predictors?"""
    order = transfer.order
    test = ClaimTest.of(ORDER, order) if isinstance(order, Undefined) else order.test
    meaning = (
        f"correlation of the ranks with those of {escape(transfer.source)}, beyond the baseline "
        "predictors"
    )
    return VerdictRow.of(anchor, test, meaning, primary=True)


def _learning_order(order: LearningOrder | Undefined) -> list[str]:
    """Return the correlations of the ranks, or the reason why they are undefined."""
    if isinstance(order, Undefined):
        return [paragraph(f"Learning order: {outcome(None)}: {escape(order.undefined)}.")]
    rows = [
        [escape(_PREDICTORS.get(name, name)), estimate(value)]
        for name, value in order.spearman.items()
    ]
    return [
        paragraph(
            f"Learning order beyond the baseline predictors: {outcome(order.test.verdict)}. The "
            "correlation of the two runs' ranks, without the part that the baseline predictors "
            f"explain, is {_shown(order.test)}; the claim is {ORDER.rule}."
        ),
        table(
            f"Spearman's ρ between the learning times in this run and each predictor, over the "
            f"{number(order.tokens, ',')} tokens with a learning time in both runs.",
            ["predictor", "ρ"],
            rows,
        ),
        table(
            "Share of the variance of these ranks that a linear regression explains. Another "
            "predictor never explains less, so the gain is a size and no test.",
            ["predictors", "explained"],
            [
                ["all but the learning time", estimate(order.explained_by_baseline)],
                ["with the learning time", estimate(order.explained_with_time)],
                ["gain", estimate(order.gain)],
            ],
        ),
    ]


def least_p(settings: TransferSettings) -> str:
    """Return a sentence on the smallest p that this number of permutations can give."""
    return (
        f" With {number(settings.permutations, ',')} permutations and the tokens' own order, p is "
        f"at least {number(1 / (settings.permutations + 1))}."
    )


def groupings_table(caption: str, skills: Mapping[str, GroupSkill]) -> str:
    """Return a table with a row per grouping: skill, null, gain, p, verdict, and tested rivals.

    Skills without verdicts have no column of verdicts, and a rival without a skill has no column.
    """
    has_verdicts = any(isinstance(each, GroupTest) for each in skills.values())
    header = ["grouping (groups)", "learning times", "permuted (null)", "gain", "p"]
    header += ["verdict"] if has_verdicts else []
    rows = [
        [
            f"{escape(grouping)} ({number(each.groups, ',')})",
            estimate(each.events, ",.2f"),
            estimate(each.permuted, ",.2f"),
            estimate(each.gain_over_permuted, "+,.3f"),
            number(each.p_value),
            *([_group_outcome(each)] if isinstance(each, GroupTest) else []),
        ]
        for grouping, each in skills.items()
    ]
    rivals: dict[str, list[Estimate | None]] = {
        "all models": [each.full for each in skills.values()],
        "curves of the other run": [each.source for each in skills.values()],
        "own learning times": [each.own for each in skills.values()],
    }
    for name, values in rivals.items():
        if any(value is not None for value in values):
            header.append(name)
            for row, value in zip(rows, values, strict=True):
                row.append("–" if value is None else estimate(value, ",.2f"))
    return table(caption, header, rows, "dense")


def _group_outcome(each: GroupTest) -> str:
    return "–" if each.test is None else outcome(each.test.verdict)


def _shown(test: ClaimTest) -> str:
    return "–" if isinstance(test.estimate, Undefined) else estimate(test.estimate)

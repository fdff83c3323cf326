"""The section on transfer: do the learning times of other runs say when this run learns what?

The table of skills per grouping of the tokens serves the forecast and the axes, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import draw
from megatron_tokscale.report.html import (
    MEASURED,
    escape,
    figure,
    json_estimate,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.verdicts import Verdict, outcome
from megatron_tokscale.spectrum.evidence.transfer import LEVEL

ALIGNED: Final = {"absolute": "at the same time", "by loss": "at the same mean loss"}
_ALIGNMENTS: Final = {"absolute": (MEASURED, "o"), "by loss": ("#0072b2", "s")}
_OFFSET: Final = 0.16  # rows between the dots of the two alignments
_RIVAL_NAMES: Final = {
    "full": "all models",
    "source": "curves of the other run",
    "own": "own learning times",
}
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
    "A grouping of the tokens passes if two conditions hold. First, the skill of the learning "
    "times and their gain over the null model are above zero with their whole 95% intervals over "
    f"documents. Second, at most {LEVEL:.0%} of the permutations, in a sample of the tokens, have "
    "as high a skill; p is their share."
)
LEAST: Final = (
    "skill gained over permuted learning times, in the weakest grouping; passed if its whole "
    f"interval and that of the skill are above zero, and p is at most {LEVEL:.0%}"
)
_RIVALS_MEANING: Final = (
    "The other columns are for comparison. “All models” uses the other run's models of all "
    "classes. “Curves of the other run” uses its measured losses, without any fit. “Own learning "
    "times” uses those of this run: it shows how far learning times can go."
)
_GAINS: Final = (
    "Skill gained over permuted learning times, with its 95% interval over documents. Filled dots: "
    "passed. Hollow dots: not passed."
)


def transfer_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with skills and learning order for every other run that was tested."""
    if not inputs.transfer:
        return []
    parts = [
        paragraph(
            "Another run gave learning times to the same tokens. This section compares them with "
            f"the losses of this run, group of tokens by group. {SKILL}"
        ),
        paragraph(f"{PERMUTED} {PASSES}"),
        paragraph(_RIVALS_MEANING, "soft"),
        *(part for n, entry in enumerate(inputs.transfer) for part in _from_run(n, entry)),
    ]
    verdicts = [
        verdict
        for n, entry in enumerate(inputs.transfer)
        for verdict in (
            *(_skill_verdict(_anchor(n), entry, alignment) for alignment in ALIGNED),
            _order_verdict(_anchor(n), entry),
        )
    ]
    return [Section("transfer", "Transfer", "Do learning times transfer?", parts, verdicts)]


def _anchor(n: int) -> str:
    return f"transfer-{n + 1}"


def _skill_verdict(anchor: str, entry: Mapping[str, Any], alignment: str) -> Verdict:
    """Return the verdict: do the source run's learning times tell groups of tokens apart?"""
    result = entry[alignment]
    question = (
        f"Learning times of {escape(entry['source'])} predict which groups of tokens fall in this "
        f"run, compared {ALIGNED[alignment]}"
    )
    if "undefined" in result:
        return Verdict(anchor, question, None, "–", escape(result["undefined"]))
    return Verdict(anchor, question, passed(result), weakest(result), LEAST)


def _from_run(n: int, entry: Mapping[str, Any]) -> list[str]:
    """Return the parts on one other run: its gains, its skills, and the learning order."""
    source, run_id = escape(entry["source"]), escape(str(entry["source_run_id"]))
    steps = entry["source_steps"]
    picture = gains_figure(_anchor(n), entry)
    return [
        f'<h3 id="{_anchor(n)}">Learning times of {source} (id {run_id})</h3>',
        paragraph(
            f"They are from {number(len(steps), ',')} probes of that run, the last at step "
            f"{number(steps[-1], ',')}." + least_p(entry["settings"])
        ),
        figure(picture, _GAINS) if picture else "",
        *(_aligned(entry, alignment) for alignment in ALIGNED),
        *_learning_order(entry["order"]),
    ]


def _aligned(entry: Mapping[str, Any], alignment: str) -> str:
    result = entry[alignment]
    if "undefined" in result:
        reason = escape(result["undefined"])
        return paragraph(f"Compared {ALIGNED[alignment]}: {outcome(None)}: {reason}.")
    return groupings_table(
        f"Skill of the learning times of {escape(entry['source'])} in this run, compared "
        f"{ALIGNED[alignment]}; the intervals are over {number(entry['documents'], ',')} "
        "documents.",
        result,
    )


def gains_figure(anchor: str, entry: Mapping[str, Any]) -> str:
    """Draw the gain over the null per grouping and alignment; nothing if no gain is defined."""
    defined = {
        alignment: entry[alignment]
        for alignment in _ALIGNMENTS
        if "undefined" not in entry[alignment]
    }
    groupings = list(dict.fromkeys(grouping for result in defined.values() for grouping in result))
    if not groupings:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color="#999999", lw=0.8)
        for n, (alignment, result) in enumerate(defined.items()):
            for grouping, each in result.items():
                place = groupings.index(grouping) + (2 * n - 1) * _OFFSET
                _gain(axes, place, each, *_ALIGNMENTS[alignment])
            colour, marker = _ALIGNMENTS[alignment]
            axes.plot([], [], marker, ls="-", lw=1.4, ms=5, color=colour, label=ALIGNED[alignment])
        axes.set_yticks(range(len(groupings)), groupings)
        axes.set_ylim(len(groupings) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("skill gained over permuted learning times")
        figure.legend(loc="outside upper left", ncols=2)

    alt = f"Gain over permuted learning times of {entry['source']} for each grouping of the tokens"
    return draw(anchor, alt, 0.9 + 0.36 * len(groupings), paint)


def _gain(axes: Axes, place: float, each: Mapping[str, Any], colour: str, marker: str) -> None:
    gain, interval = each["gain_over_permuted"], each["gain_over_permuted_interval"]
    if gain is None:
        return
    if interval is not None:
        axes.plot(interval, [place, place], color=colour, lw=1.4)
    face = colour if each["passes"] else "white"
    axes.plot([gain], [place], marker, ms=5, mec=colour, mfc=face)


def _order_verdict(anchor: str, entry: Mapping[str, Any]) -> Verdict:
    """Return the verdict: do learning times predict the order beyond the baseline predictors?"""
    order = entry["order"]
    question = (
        f"Learning times of {escape(entry['source'])} predict the order of learning in this run, "
        "beyond frequency, position and mean loss"
    )
    if order["spearman"] is None:
        return Verdict(anchor, question, None, "–", _few(order))
    return Verdict(
        anchor,
        question,
        order["passes"],
        json_estimate(order, "partial"),
        "correlation of the two runs' ranks beyond the baseline predictors; passed if its whole "
        "interval is above zero",
    )


def _learning_order(order: Mapping[str, Any]) -> list[str]:
    """Return the correlations of the ranks, or the reason why they are undefined."""
    if order["spearman"] is None:
        return [paragraph(f"Learning order: {outcome(None)}: {_few(order)}.")]
    rows = [
        [escape(_PREDICTORS.get(name, name)), json_estimate(value, "value")]
        for name, value in order["spearman"].items()
    ]
    return [
        paragraph(
            f"Learning order beyond the baseline predictors: {outcome(order['passes'])}. The "
            "correlation of the two runs' ranks, without the part that the baseline predictors "
            f"explain, is {json_estimate(order, 'partial')}."
        ),
        table(
            f"Spearman's ρ between the learning times in this run and each predictor, over the "
            f"{number(order['tokens'], ',')} tokens with a learning time in both runs.",
            ["predictor", "ρ"],
            rows,
        ),
        table(
            "Share of the variance of these ranks that a linear regression explains. Another "
            "predictor never explains less, so the gain is a size and no test.",
            ["predictors", "explained"],
            [
                ["all but the learning time", json_estimate(order, "explained_by_plain")],
                ["with the learning time", json_estimate(order, "explained_with_time")],
                ["gain", json_estimate(order, "gain")],
            ],
        ),
    ]


def _few(order: Mapping[str, Any]) -> str:
    return f"only {number(order['tokens'], ',')} tokens have a learning time in both runs"


def least_p(settings: Mapping[str, Any]) -> str:
    """Return a sentence on the smallest p; nothing where the number of permutations is unknown."""
    permutations = settings.get("permutations")
    if permutations is None:
        return ""
    return (
        f" With {number(permutations, ',')} permutations and the tokens' own order, p is at "
        f"least {number(1 / (permutations + 1))}."
    )


def groupings_table(caption: str, result: Mapping[str, Any]) -> str:
    """Return a table with a row per grouping: skill, null, gain, p, verdict, and tested rivals.

    There is no column of verdicts where the result has none.
    """
    rivals = [name for name in _RIVAL_NAMES if any(name in each for each in result.values())]
    has_verdicts = any("passes" in each for each in result.values())
    rows = [
        [
            f"{escape(grouping)} ({number(each['groups'], ',')})",
            _skill(each, "events"),
            _skill(each, "permuted"),
            json_estimate(each, "gain_over_permuted", "+,.3f"),
            number(each["p_value"]),
            *([outcome(each["passes"])] if has_verdicts else []),
            *(_skill(each, name) for name in rivals),
        ]
        for grouping, each in result.items()
    ]
    header = ["grouping (groups)", "learning times", "permuted (null)", "gain", "p"]
    header += ["verdict"] if has_verdicts else []
    return table(caption, [*header, *(_RIVAL_NAMES[name] for name in rivals)], rows, "dense")


def _skill(each: Mapping[str, Any], name: str) -> str:
    return json_estimate(each[name], "skill", ",.2f") if name in each else "–"


def passed(result: Mapping[str, Any]) -> Sequence[bool | None]:
    """Return the outcome of each grouping."""
    return [each["passes"] for each in result.values()]


def weakest(result: Mapping[str, Any]) -> str:
    """Return the grouping with the smallest gain as HTML; one that is not passed comes first."""
    known = {name: each for name, each in result.items() if each["gain_over_permuted"] is not None}
    if not known:
        return "–"
    name, least = min(
        known.items(), key=lambda item: (item[1]["passes"] is True, item[1]["gain_over_permuted"])
    )
    return f"{escape(name)}: {json_estimate(least, 'gain_over_permuted', '+,.3f')}"

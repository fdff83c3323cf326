"""The learning order: a token's rank in another run beside what is known without learning times."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.markup import escape, estimate, number, paragraph, table
from megatron_tokscale.report.verdicts import Verdict, outcome

_PREDICTORS = {
    "unigram": "ln of the token's frequency",
    "bigram": "ln of the frequency of the token and the one before",
    "position": "ln of the position",
}


def order_verdict(anchor: str, entry: Mapping[str, Any]) -> Verdict:
    """Whether the other run's learning times order the tokens beyond what is plain."""
    order = entry["order"]
    question = (
        f"Learning times of {escape(entry['source'])} order the tokens' learning here, beyond "
        "frequency, position and mean loss"
    )
    if order["spearman"] is None:
        return Verdict(anchor, question, None, "–", _few(order))
    return Verdict(
        anchor,
        question,
        order["passes"],
        estimate(order, "partial"),
        "correlation of the two runs' ranks beyond the plain predictors; its whole interval above "
        "zero",
    )


def learning_order(order: Mapping[str, Any]) -> list[str]:
    """The correlations of the ranks, and the verdict; why, if there are too few tokens."""
    if order["spearman"] is None:
        return [paragraph(f"Learning order: {outcome(None)}: {_few(order)}.")]
    rows = [
        [escape(_PREDICTORS.get(name, name)), estimate(value, "value")]
        for name, value in order["spearman"].items()
    ]
    return [
        paragraph(
            f"Learning order beyond what is plain: {outcome(order['passes'])}. Correlation of the "
            "two runs' ranks, once what the plain predictors say of either is taken away: "
            f"{estimate(order, 'partial')}."
        ),
        table(
            f"The learning order of the {number(order['tokens'], ',')} tokens with a learning time "
            "in both runs: Spearman's ρ of their times here with what is known of them beforehand.",
            ["known beforehand", "ρ"],
            rows,
        ),
        table(
            "Share of the variance of these ranks that a linear regression explains. One predictor "
            "more never explains less: the gain is a size, not a test.",
            ["predictors", "explained"],
            [
                ["all but the learning time", estimate(order, "explained_by_plain")],
                ["with the learning time", estimate(order, "explained_with_time")],
                ["gain", estimate(order, "gain")],
            ],
        ),
    ]


def _few(order: Mapping[str, Any]) -> str:
    return f"only {number(order['tokens'], ',')} tokens have a learning time in both runs"

"""Tables of the study in markdown, from its ledger alone."""

from collections.abc import Mapping
from typing import Any, Final

from quanta_corpus.corpus import World
from reweighting.arms import UNIFORM
from reweighting.chain import Training
from reweighting.ledger import Ledger
from reweighting.speed import describe, percent_faster
from reweighting.tables import Results, number, setting, table, versions

FIGURES: Final = "reference"
LEARNED: Final = "learned"
"""Names of two results in the ledger: on the scores and plans, and on the learning times."""
_PACKAGES: Final = ("megatron-tokscale", "megatron-core", "torch", "numpy", "scipy")


def report(training: Training, world: World, ledger: Ledger) -> str:
    """Return all tables of the results that the ledger has."""
    results, mix = Results(training, ledger), world.mix
    corpus = (
        f"{mix.documents:,} documents, {mix.junk:.0%} junk, {mix.boilerplate:.0%} boilerplate, "
        f"{mix.topics} topics of {mix.facts} facts"
    )
    parts = [
        "# A corpus of known quanta",
        "`python examples/quanta_corpus/study.py --folder DIR --ledger FILE`",
        versions(_PACKAGES),
        setting(training, corpus),
        results.missing(),
        *results.speeds(),
        *results.losses({"loss": "all tokens", "object": "objects"}),
        *(_figures(ledger[FIGURES], results) if FIGURES in ledger else []),
        *(_learned(ledger[LEARNED]) if LEARNED in ledger else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figures(figures: Mapping[str, Any], results: Results) -> list[str]:
    rho, cv2, reliability = (figures[k] for k in ("rank_correlation", "cv2", "reliability"))
    rows = [
        ["rank correlation with the true fall of a document's kind", number(rho["documents"])],
        ["the same of the mean scores of kinds", number(rho["kinds"])],
        ["reliability of the score of a watched document", number(reliability["watched"])],
        ["reliability of a predicted score", number(reliability["predicted"])],
        *([f"CV² of the {name}", number(value)] for name, value in cv2.items()),
    ]
    chain = [
        [name, f"{value:.3f}", f"{percent_faster(value):.1f}"]
        for name, value in figures["links"].items()
    ]
    if speed := results.against(UNIFORM, "fall"):
        chain.append(["saturation and upkeep: measured [95%]", "", describe(speed.faster_S)])
    return [
        "**The scores, beside the true falls**",
        table(["", ""], rows),
        "**Gain of `fall` to first order, with one link more in each row**",
        table(["weights", "ln speed-up", "X% faster"], chain),
        "**Gain of the plans: printed, to first order with the true falls, and measured**",
        table(
            ["arm", "`plan build`: at most X%", "first order, true falls", "measured [95%]"],
            _gains(figures, results),
        ),
        "To first order the documents that are drawn more often teach as much as before, and none "
        "are forgotten. What is measured below it is saturation, and the upkeep of what is drawn "
        "less often. `fall-live`: of its plan, before any decision.",
    ]


def _gains(figures: Mapping[str, Any], results: Results) -> list[list[str]]:
    rows = []
    for arm, value in figures["expected"].items():
        speed = results.against(UNIFORM, arm)
        printed = figures["at_most"][arm]
        rows.append(
            [
                arm,
                "-" if printed is None else f"{printed:.1f}",
                f"{percent_faster(value):.1f}",
                describe(speed.faster_S) if speed else "-",
            ]
        )
    return rows


def _learned(learned: Mapping[str, Any]) -> list[str]:
    law, of_ids, order = learned["law"], learned["law_of_ids"], learned["order"]
    tests = [
        [f"learning order against rarity, {order['facts']} facts", number(order["rho"])],
        [f"the same of {order['bins']} bins of facts", number(order["rho_of_bins"])],
        ["known objects without a learning time", f"{order['without_event']:,}"],
        ["locality against group curves", learned["locality"]],
        ["learning order of two seeds", learned.get("order_of_runs", "-")],
        ["covariance of falls of two seeds", learned.get("covariance", "-")],
        ["b of known frequencies, onset fitted", law["b"]],
        ["onset in steps; exposures of a fact", _two(law.get("onset"), law.get("exposures"))],
        ["b without an onset", law.get("without_onset", "-")],
        ["b of `laws`, by frequencies of token ids", of_ids["b"]],
        ["exponent of the tail", learned["tail"]],
        ["tail less loss", learned["tail_minus_law"]],
        ["nats that censored tokens still hold, by `spectrum`", learned["ahead"]["expected"]],
        ["nats that facts still hold at the end, known", f"{learned['ahead']['known']:.3f}"],
        *([f"forecast of the last octave: {k}", str(v)] for k, v in learned["forecast"].items()),
    ]
    rows = [
        [
            f"{row['at_least']:g}",
            f"{row['facts']:,}",
            f"{row['tokens']:,}",
            f"{row['censored']:.0%}",
            number(row["step"], ".0f"),
            number(row["exposures"], ".0f"),
            f"{row['last_loss']:.2f}",
        ]
        for row in learned["by_exposures"]
    ]
    columns = ["exposures a step, at least", "facts", "watched tokens", "censored"]
    columns += ["median step", "exposures by then", "last loss"]
    return [
        "**What the verbs find in a run of `uniform`**",
        f"scored: {learned['scored']}",
        table(["", ""], tests),
        "**Facts by their known frequency**",
        table(columns, rows),
    ]


def _two(first: float | None, second: float | None) -> str:
    return f"{number(first, '.0f')}; {number(second, '.1f')}"

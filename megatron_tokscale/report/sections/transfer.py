"""The section on transfer: do the learning times of other runs say when this run learns what?"""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import (
    escape,
    figure,
    number,
    paragraph,
    section,
)
from megatron_tokscale.report.sections.gains import ALIGNED, gains
from megatron_tokscale.report.sections.order import learning_order, order_verdict
from megatron_tokscale.report.sections.skills import (
    LEAST,
    PASSES,
    PERMUTED,
    SKILL,
    groupings_table,
    least_p,
    passed,
    weakest,
)
from megatron_tokscale.report.verdicts import Verdict, outcome

_RIVALS = (
    "All models: the other run's models of all classes. Curves of the other run: its measured "
    "losses, without any fit. Own learning times: this run's, as far as learning times can go."
)
_GAINS = (
    "Skill gained over permuted learning times, and its 95% interval over documents. Filled: "
    "passed; hollow: not."
)


def transfer(analysis: Analysis) -> str:
    """Skills and learning order for every other run; nothing if none was tested."""
    if not analysis.transfer:
        return ""
    return section(
        "transfer",
        "Do learning times transfer?",
        paragraph(
            "The learning times that another run gave the same tokens, held against what this run "
            f"measured, group by group. {SKILL}"
        ),
        paragraph(f"{PERMUTED} {PASSES}"),
        paragraph(_RIVALS, "soft"),
        *(part for n, entry in enumerate(analysis.transfer) for part in _from_run(n, entry)),
    )


def transfer_verdicts(analysis: Analysis) -> list[Verdict]:
    """For every other run whether its learning times tell groups apart, and order the tokens."""
    return [
        verdict
        for n, entry in enumerate(analysis.transfer)
        for verdict in (
            *(_verdict(_anchor(n), entry, alignment) for alignment in ALIGNED),
            order_verdict(_anchor(n), entry),
        )
    ]


def _anchor(n: int) -> str:
    return f"transfer-{n + 1}"


def _verdict(anchor: str, entry: Mapping[str, Any], alignment: str) -> Verdict:
    result = entry[alignment]
    question = (
        f"Learning times of {escape(entry['source'])} tell which groups of tokens fall here, "
        f"{ALIGNED[alignment]}"
    )
    if "undefined" in result:
        return Verdict(anchor, question, None, "–", escape(result["undefined"]))
    return Verdict(anchor, question, passed(result), weakest(result), LEAST)


def _from_run(n: int, entry: Mapping[str, Any]) -> list[str]:
    source, run_id = escape(entry["source"]), escape(str(entry["source_run_id"]))
    steps = entry["source_steps"]
    picture = gains(_anchor(n), entry)
    return [
        f'<h3 id="{_anchor(n)}">Learning times of {source} (id {run_id})</h3>',
        paragraph(
            f"From its {number(len(steps), ',')} probes, the last at step {number(steps[-1], ',')}."
            + least_p(entry["settings"])
        ),
        figure(picture, _GAINS) if picture else "",
        *(_aligned(entry, alignment) for alignment in ALIGNED),
        *learning_order(entry["order"]),
    ]


def _aligned(entry: Mapping[str, Any], alignment: str) -> str:
    result = entry[alignment]
    if "undefined" in result:
        reason = escape(result["undefined"])
        return paragraph(f"Compared {ALIGNED[alignment]}: {outcome(None)}: {reason}.")
    return groupings_table(
        f"Skill of {escape(entry['source'])}'s learning times here, compared {ALIGNED[alignment]}; "
        f"{number(entry['documents'], ',')} documents.",
        result,
    )

"""Which groups of tokens fall when: the skill of learning times beside its rivals, per grouping."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tokscale.report.markup import escape, estimate, number, table
from megatron_tokscale.report.verdicts import outcome
from megatron_tokscale.spectrum.evidence.transfer import LEVEL

_RIVALS = {
    "full": "all models",
    "source": "curves of the other run",
    "own": "own learning times",
}
SKILL = (
    "Skill is the share of what sets the groups' curves apart from the mean curve that a "
    "prediction tells: 1 is all of it, 0 is knowing no group from another, below 0 is worse."
)
PERMUTED = (
    "The null permutes the learning times over tokens of about the same drop, and every token "
    "keeps its drop: it destroys that a time belongs to its token, and only that."
)
PASSES = (
    "A grouping passes if the skill of the learning times and their gain over the null are above "
    "zero with their whole 95% intervals over documents, and of permutations in a sample of the "
    f"tokens at most {LEVEL:.0%} do as well (their share is p)."
)
LEAST = (
    "skill gained over permuted times in the weakest grouping; its whole interval and that of the "
    f"skill above zero, p at most {LEVEL:.0%}"
)


def least_p(settings: Mapping[str, Any]) -> str:
    """The smallest p that so many permutations can give; nothing where their number is unknown."""
    permutations = settings.get("permutations")
    if permutations is None:
        return ""
    return (
        f" With {number(permutations, ',')} permutations beside the tokens' own order, p is at "
        f"least {number(1 / (permutations + 1))}."
    )


def groupings_table(caption: str, result: Mapping[str, Any]) -> str:
    """Return a row per grouping: skill, null, gain, p, verdict, and the rivals that were tried.

    There is no column of verdicts where the result has none.
    """
    rivals = [name for name in _RIVALS if any(name in each for each in result.values())]
    has_verdicts = any("passes" in each for each in result.values())
    rows = [
        [
            f"{escape(grouping)} ({number(each['groups'], ',')})",
            _skill(each, "events"),
            _skill(each, "permuted"),
            estimate(each, "gain_over_permuted", "+,.3f"),
            number(each["p_value"]),
            *([outcome(each["passes"])] if has_verdicts else []),
            *(_skill(each, name) for name in rivals),
        ]
        for grouping, each in result.items()
    ]
    header = ["grouping (groups)", "learning times", "permuted (null)", "gain", "p"]
    header += ["verdict"] if has_verdicts else []
    return table(caption, [*header, *(_RIVALS[name] for name in rivals)], rows, "dense")


def _skill(each: Mapping[str, Any], name: str) -> str:
    return estimate(each[name], "skill", ",.2f") if name in each else "–"


def passed(result: Mapping[str, Any]) -> Sequence[bool | None]:
    """The outcome of each grouping."""
    return [each["passes"] for each in result.values()]


def weakest(result: Mapping[str, Any]) -> str:
    """The grouping with the smallest gain, those that are not passed first; HTML."""
    known = {name: each for name, each in result.items() if each["gain_over_permuted"] is not None}
    if not known:
        return "–"
    name, least = min(
        known.items(), key=lambda item: (item[1]["passes"] is True, item[1]["gain_over_permuted"])
    )
    return f"{escape(name)}: {estimate(least, 'gain_over_permuted', '+,.3f')}"

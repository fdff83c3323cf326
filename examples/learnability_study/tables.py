"""Tables of the study in markdown, from its ledger alone."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from learnability_study.corpora import DATASETS, KINDS, TARGET
from reweighting.arms import UNIFORM
from reweighting.chain import Training
from reweighting.ledger import Ledger
from reweighting.speed import describe
from reweighting.tables import Results, number, setting, table

from megatron_tokscale.reweight.gain import seeds_needed

POOL: Final = "pool"
"""Name of the counts of the pool in the ledger."""
MEASURED: Final = "measured"
"""Name of what was known before any arm was trained."""
_FLAGS: Final = {"fall": "", "target": " --target"}
_VALIDATION: Final = {
    "fall": "validation on held-out documents of the pool",
    "target": "validation on speeches that are neither in the pool nor tuned on",
}
GAINS: Final = (2.0, 5.0, 10.0)
"""Gains in percent for which the seeds that show them are given."""


def report(training: Training, policy: str, ledger: Ledger) -> str:
    """Return all tables of the results that the ledger has.

    Args:
        training: model, data and training.
        policy: name of the policy that the study is about: "fall" or "target".
        ledger: the results.
    """
    results = Results(training, ledger)
    known = {name: ledger[name] for name in (POOL, MEASURED) if name in ledger}
    pool, measured = known.get(POOL), known.get(MEASURED)
    parts = [
        f"# Does a plan by `{policy}` train faster on a raw pool?",
        f"`python examples/learnability_study/study.py{_FLAGS[policy]}`",
        *(_versions(pool) if pool else []),
        setting(training, *(_pool_words(pool) if pool else []), _VALIDATION[policy]),
        results.missing(),
        *(_measured(measured, policy) if measured else []),
        *results.speeds(),
        *(_forecast(results, measured, policy) if measured else []),
        *_power(results),
        *results.losses({"loss": "all tokens"}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _versions(pool: Mapping[str, Any]) -> list[str]:
    found = ", ".join(f"{name} {number}" for name, number in pool["versions"].items())
    return [f"Pool {pool['digest']}, of the files of {found}."]


def _pool_words(pool: Mapping[str, Any]) -> list[str]:
    counts = pool["datasets"]
    tokens = sum(counts[name]["tokens"] for name in DATASETS)
    each = ", ".join(f"{name} {counts[name]['tokens'] / tokens:.1%}" for name in DATASETS)
    return [
        f"{sum(counts[name]['documents'] for name in DATASETS):,} documents with {tokens:,} tokens",
        each,
        f"{counts[TARGET]['tokens']:,} tokens of speeches kept out",
    ]


def _measured(measured: Mapping[str, Any], policy: str) -> list[str]:
    """Return the tables of what was known before any arm was trained."""
    tokens = sum(found["tokens"] for found in measured["kinds"].values())
    of_kinds = [
        [
            kind.name,
            kind.dataset,
            f"{found['documents']:,}",
            f"{found['tokens'] / tokens:.1%}",
            f"{found['watched']:,}",
            number(found["score"]),
            number(found["weight"], ".2f"),
        ]
        for kind in KINDS
        if (found := measured["kinds"].get(kind.name))
    ]
    of_datasets = [
        [
            name,
            f"{found['documents']:,}",
            number(found["mean"]),
            number(found["signal_variance"], ".4f"),
            number(found["watched"], ".2f"),
            number(found["predicted"], ".2f"),
        ]
        for name, found in measured["reliability"].items()
    ]
    columns = [
        "kind",
        "dataset",
        "documents",
        "tokens",
        "watched",
        f"{policy}, nats",
        "weight/share",
    ]
    scores = ["dataset", "documents watched", "mean, nats", "variance without noise"]
    scores += ["reliability, watched", "reliability, predicted"]
    return [
        "**Before any arm: the scores of kinds, and how often the plan draws them**",
        table(columns, of_kinds),
        _gain(measured["gain"], measured["scored_tokens"], policy),
        f"**Scores by `{policy}`**",
        table(scores, of_datasets),
    ]


def _gain(gain: Mapping[str, Any] | None, scored_tokens: int, policy: str) -> str:
    """Return what the falls of documents tell, and what a plan by them gains at most."""
    words = [f"Scores from {scored_tokens:,} watched tokens."]
    if gain:
        words += [
            f"CV² of the falls of documents: {number(gain['spread'])}, of which the strata keep "
            f"{number(gain['kept'], '.0%')}.",
            f"Reliability of all falls: {number(gain['reliability'], '.2f')}.",
            f"Cost of the reference and the scores: {number(gain['cost'], '.0%')} of a run.",
        ]
    if gain and policy == "fall":
        words.append(f"Gain of the plan to first order: at most {gain['at_most']:.1f}%.")
    return " ".join(words)


def _forecast(results: Results, measured: Mapping[str, Any], policy: str) -> list[str]:
    """Return how far the gain that was printed before the training was off.

    A plan by a target has none: its gain on the target does not follow from falls on the pool.
    """
    speed = results.against(UNIFORM, policy)
    if speed is None or policy != "fall":
        return []
    printed = measured["gain"]["at_most"]
    over = printed - float(np.mean(speed.faster_S))
    return [
        "**The forecast**",
        table(
            ["arm", "`plan build`: at most X%", "measured X% [95%]", "forecast less measured"],
            [[policy, f"{printed:.1f}", describe(speed.faster_S), f"{over:.1f}"]],
        ),
    ]


def _power(results: Results) -> list[str]:
    """Return the seeds that would show a gain, from the measured spread of paired differences."""
    rows = []
    for arm in results.training.arms:
        speed = results.against(UNIFORM, arm) if arm != UNIFORM else None
        if speed is None or len(speed.faster_S) < 2:
            continue
        sd = float(np.std(speed.faster_S, ddof=1))
        rows.append([arm, f"{sd:.2f}", *(_seeds(gain, sd) for gain in GAINS)])
    if not rows:
        return []
    columns = ["arm", "sd over seeds, points", *(f"{gain:g}% faster" for gain in GAINS)]
    return [
        "**Seeds needed to see a gain (paired t, two-sided 5%, power 80%)**",
        table(columns, rows),
    ]


def _seeds(gain: float, sd: float) -> str:
    needed = seeds_needed(gain, sd) if sd > 0 else 2
    return "more than 10,000" if needed is None else f"{needed:,}"

"""A comparison as a table for a terminal."""

from typing import Final

from megatron_tokscale.probe.text import marked
from megatron_tokscale.results.comparison import (
    Change,
    ChangedToken,
    Comparison,
    GroupComparison,
    Sooner,
    SpectraTest,
    undetermined,
)
from megatron_tokscale.results.estimate import Undefined, format_estimate

_SHOWN: Final = 5
"""Tokens shown of each kind; compare.json has more."""
_SIDE: Final = 48
"""Characters of text shown before a token; after it, a third of that."""


def describe_comparison(comparison: Comparison) -> str:
    """Return the comparison as lines: runs, table of groups, spectra, strongest tokens."""
    return "\n".join(
        [
            *_head(comparison),
            *_table(comparison),
            *_spectra(comparison.spectra, comparison),
            *_tokens("gained", comparison.gained, comparison),
            *_tokens("lost", comparison.lost, comparison),
        ]
    )


def _head(comparison: Comparison) -> list[str]:
    a, b, noise = comparison.a, comparison.b, comparison.noise
    seeds = ", ".join(each.name for each in noise) or "none"
    return [
        f"A: {a.name}; B: {b.name}; further seeds of A: {seeds}",
        f"  at {comparison.clock_name} {comparison.end:,.6g}; {comparison.compared:,} of "
        f"{comparison.n_tokens:,} tokens, {comparison.n_units:,} {comparison.unit_kind}",
        *(f"  note: {note}" for note in comparison.notes),
    ]


def _table(comparison: Comparison) -> list[str]:
    """Return one line per group, and the totals in words."""
    lines = [
        f"  {'':<20}{'tokens':>9}{'learned by':>14}{'late loss':>25}{'gained':>8}{'lost':>7}"
        f"{'net':>7}{'B sooner by the factor':>26}{'at the':>8}",
        f"  {'':<20}{'':>9}{'A':>7}{'B':>7}{'of A less of B, nats':>25}{'':>15}"
        f"{'gain':>7}{'learning times':>26}{'loss':>8}",
        _row(comparison.overall),
    ]
    for name, rows in comparison.groups.items():
        lines += [f"  {name}", *(_row(row, indent="  ") for row in rows)]
    overall = comparison.overall
    return [
        *lines,
        f"  gained: {_calls(overall.gained, 'B', 'A', comparison)}",
        f"  lost: {_calls(overall.lost, 'A', 'B', comparison)}",
        f"  learning times: {_sooner(overall.learning_times, comparison)}",
        f"  at the late loss: {_sooner(overall.late_loss, comparison)}",
    ]


def _row(row: GroupComparison, indent: str = "") -> str:
    name = (indent + row.name)[:20]
    at_loss = row.late_loss.factor
    shown = "-" if isinstance(at_loss, Undefined) else f"{at_loss.value:.2f}"
    return (
        f"  {name:<20}{row.tokens:>9,}{row.learned_a:>7.1%}{row.learned_b:>7.1%}"
        f"{format_estimate(row.lower, '+.3f'):>25}{_count(row.gained):>8}{_count(row.lost):>7}"
        f"{_net(row):>7}{format_estimate(row.learning_times.factor, '.2f'):>26}{shown:>8}"
    )


def _net(row: GroupComparison) -> str:
    """Return the excess of the gained tokens less that of the lost ones; "-" without seeds."""
    gained, lost = row.gained.excess, row.lost.excess
    if isinstance(gained, Undefined) or isinstance(lost, Undefined):
        return "-"
    return f"{gained.value - lost.value:+,.0f}"


def _count(change: Change) -> str:
    return "-" if isinstance(change.called, Undefined) else f"{change.called:,}"


def _calls(change: Change, learner: str, other: str, comparison: Comparison) -> str:
    """Return the candidates, those of the noise runs, the excess and the calls in words."""
    text = (
        f"{change.tokens:,} tokens that {learner} has learned and {other} has not, with the lower "
        f"late loss in {learner}"
    )
    if isinstance(change.called, Undefined):
        return f"{text}; {change.called.undefined}"
    assert not isinstance(change.seed, Undefined)
    digits = 0 if change.seed.is_integer() else 1  # a mean over several noise runs
    excess = format_estimate(change.excess, f"+,.{digits}f")
    return (
        f"{text}, with another seed of A in the place of B {change.seed:,.{digits}f}: excess "
        f"{excess}; beyond the noise between seeds at a false "
        f"discovery rate of {comparison.settings.rate:.0%}: {change.called:,}"
    )


def _sooner(sooner: Sooner, comparison: Comparison) -> str:
    """Return the factor over units, those of the seeds, and the factor over seeds in words."""
    units = comparison.unit_kind
    if isinstance(sooner.factor, Undefined):
        return undetermined(sooner.factor)
    text = f"B {format_estimate(sooner.factor, '.3f')} times, over {units}"
    seeds = ", ".join(f"{each:.3f}" for each in sooner.seeds)
    seeds = f"; other seeds of A {seeds}" if seeds else ""
    if isinstance(sooner.recipe, Undefined):
        return f"{text}{seeds}; over {units} and seeds {undetermined(sooner.recipe)}"
    verdict = "undecided"
    if sooner.recipe.has_interval and not sooner.recipe.low <= 1 <= sooner.recipe.high:
        verdict = "sooner" if sooner.recipe.low > 1 else "later"
    return (
        f"{text}{seeds}; over {units} and seeds {format_estimate(sooner.recipe, '.3f')}: {verdict}"
    )


def _spectra(test: SpectraTest | Undefined, comparison: Comparison) -> list[str]:
    if isinstance(test, Undefined):
        return [f"  spectra: undefined: {test.undefined}"]
    text = (
        f"  spectra: distance {format_estimate(test.distance)} nats per token; swapped by "
        f"{comparison.unit_kind} p = {test.p_documents:.3f}"
    )
    if isinstance(test.p_seeds, Undefined):
        return [f"{text}; {test.p_seeds.undefined}"]
    seeds = ", ".join(f"{each:.3f}" for each in test.seeds)
    return [f"{text}; other seeds of A {seeds}, p = {test.p_seeds:.3f}: {test.outcome}"]


def _tokens(kind: str, tokens: tuple[ChangedToken, ...], comparison: Comparison) -> list[str]:
    """Return the strongest changed tokens, a line each."""
    if not tokens:
        return [] if comparison.noise else [f"  no token is {kind}"]
    undecided = "" if comparison.noise else " (undecided: no second seed)"
    lines = [f"  {kind}, the strongest{undecided}: loss in A, in B, states, z"]
    for each in tokens[:_SHOWN]:
        text = f"{each.dataset}"
        if each.passage is not None:
            before, after = marked(each.passage.before), marked(each.passage.after)
            text += f": {before[-_SIDE:]}[{each.passage.target}]{after[: _SIDE // 3]}"
        lines.append(
            f"    {each.late_loss_a:6.2f} {each.late_loss_b:6.2f}  "
            f"{each.state_a:>9} > {each.state_b:<9} {each.z:5.1f}  {text}"
        )
    return lines

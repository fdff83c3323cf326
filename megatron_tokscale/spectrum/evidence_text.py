"""The evidence tests as lines for a terminal: locality, and the tests between two runs."""

from megatron_tokscale.results import Transfer
from megatron_tokscale.results.estimate import Estimate, Undefined, format_estimate
from megatron_tokscale.results.evidence import Locality
from megatron_tokscale.results.primary import COVARIANCE, NEEDS_SECOND_RUN, ORDER
from megatron_tokscale.results.skill import GroupTests
from megatron_tokscale.results.transfer import FallCovariance, LearningOrder, Surface
from megatron_tokscale.results.verdict import Claim, ClaimTest


def describe_locality(widths: Locality, has_second_run: bool = False) -> list[str]:
    """Return the lines on locality, and on the primary tests that wait for a second run."""
    observed, null = widths.observed.width_decades.p50, widths.group_null.width_decades.p50
    return [
        f"  10-90% width, median, in decades of time:   {format_estimate(observed)}",
        f"  if every token followed its group's curve:  {format_estimate(null)}",
        "  primary tests",
        *_primary(widths.test),
        *(
            line
            for claim in (() if has_second_run else (ORDER, COVARIANCE))
            for line in _primary(ClaimTest.of(claim, NEEDS_SECOND_RUN))
        ),
    ]


def describe_transfer(transfer: Transfer) -> str:
    """Return the tests between two runs as lines."""
    return "\n".join(
        [
            f"  learning times of {transfer.source}; 95% intervals over {transfer.n_units:,} "
            f"{transfer.fit.unit_kind}; the clock of both runs is {transfer.clock}",
            "  primary tests",
            *_primary(_test(ORDER, transfer.order)),
            *_primary(_test(COVARIANCE, transfer.falls)),
            *_order(transfer.order),
            *_falls(transfer.falls),
            *_surface(transfer.surface),
            *describe_groups("absolute", transfer.absolute),
            *describe_groups("by loss", transfer.by_loss),
        ]
    )


def describe_groups(name: str, tests: GroupTests) -> list[str]:
    """Return the skills by grouping of one alignment, and the verdicts, as lines."""
    if isinstance(tests, Undefined):
        return [f"  aligned {name}: undefined: {tests.undefined}"]
    rows = tests.values()
    skills: dict[str, list[Estimate | None]] = {
        "events": [each.events for each in rows],
        "permuted": [each.permuted for each in rows],
        "full": [each.full for each in rows],
        "source": [each.source for each in rows],
        "own": [each.own for each in rows],
    }
    columns = {name: values for name, values in skills.items() if any(values)}
    head = "".join(f"{column:>10}" for column in columns)
    lines = [f"  {'aligned ' + name:<24}{head}   gain of events over permuted"]
    for row, (grouping, each) in enumerate(tests.items()):
        cells = "".join(f"{_value(values[row]):>10}" for values in columns.values())
        gain = format_estimate(each.gain_over_permuted)
        verdict = "no test" if each.test is None else str(each.test.verdict)
        lines.append(f"    {grouping:<22}{cells}   {gain}: {verdict}")
    return lines


def _test(claim: Claim, found: LearningOrder | FallCovariance | Undefined) -> ClaimTest:
    return ClaimTest.of(claim, found) if isinstance(found, Undefined) else found.test


def _primary(test: ClaimTest) -> list[str]:
    """Return a claim and, below it, its verdict, its number and its rule."""
    found = test.estimate
    undefined = isinstance(found, Undefined)
    shown = found.undefined if isinstance(found, Undefined) else format_estimate(found)
    verdict = "" if undefined else f"{test.verdict}: "
    return [f"    {test.claim.name}", f"      {verdict}{shown} ({test.claim.rule})"]


def _order(order: LearningOrder | Undefined) -> list[str]:
    if isinstance(order, Undefined):
        return []
    return [
        f"  rank in the learning order of {order.tokens:,} tokens, Spearman's rho with",
        *(f"    {name:<40}{format_estimate(rho)}" for name, rho in order.spearman.items()),
        "  variance of the ranks explained by the baseline predictors "
        f"{format_estimate(order.explained_by_baseline)}, with the learning time "
        f"{format_estimate(order.explained_with_time)}",
    ]


def _falls(falls: FallCovariance | Undefined) -> list[str]:
    if isinstance(falls, Undefined):
        return []
    profile = ", ".join(f"{each.value:.2f}" for each in falls.profile)
    return [
        f"  covariance of falls at a distance of 0, 1, ... octaves: {profile}",
        f"    far is {falls.far_octaves} octaves or more; without steps it is positive, near 1",
        "    variance of a token's fall in an octave that both runs share: "
        + format_estimate(falls.reproducible),
    ]


def _surface(surface: Surface | Undefined) -> list[str]:
    if isinstance(surface, Undefined):
        return [f"  falls of learning-time bins: undefined: {surface.undefined}"]
    return [
        f"  falls of {surface.bins} learning-time bins: each token's group and total fall "
        f"explain {surface.null:.3f}; of the rest",
        *(
            f"    {name:<40}{format_estimate(test.estimate)}: {test.verdict}"
            for name, test in surface.tests.items()
        ),
    ]


def _value(skill: Estimate | None) -> str:
    """Return a skill without its interval; an empty text if it was not tested."""
    return "" if skill is None else format_estimate(Estimate(skill.value))

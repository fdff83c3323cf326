"""A run's laws as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.fit.summary import NonFiniteLosses
from megatron_tokscale.laws.explain import spread
from megatron_tokscale.results import non_finite_line

DRIFT = 0.7  # our choice: n of 40 probes is then 7, for three parameters
_HOLDS = {True: "holds", False: "does not hold", None: "undecided"}


def describe_laws(result: Mapping[str, Any]) -> str:
    """The fitted laws with their intervals, the spectrum's tail, and the table of explanations."""
    start, time = result["settings"]["from"], result["time"]
    lines = [
        f"  L = E + B t^-alpha, t = {time} from {start:,.0f} on, 95% intervals of alpha over the",
        "  scatter of the probes, and over documents",
        f"  {'':<16}{'E (nats)':<24}{'alpha (probes)':<24}{'(documents)':<24}{'R^2':>6}  points",
        *_law("all tokens", result["overall"]),
    ]
    for dataset in result["datasets"]:
        lines += _law(dataset["name"], dataset)
    for other in result["other_starts"]:
        lines += _law(f"from {other['from']:,.0f}", other)
    lines += non_finite_line(NonFiniteLosses(**result["non_finite"]))
    lines += [_tail(result), *_zero_sum(result["zero_sum"])]
    lines.append(f"  {'explanation':<28}{'claim; predicted; measured'}")
    for row in result["explanations"]:
        lines += [
            f"  {row['explanation']:<28}{row['claim']}: {_HOLDS[row['holds']]}",
            f"  {'':<28}predicted {row['predicted']}; measured {row['measured']}",
        ]
    return "\n".join(lines)


def _law(name: str, law: Mapping[str, Any]) -> list[str]:
    if "undefined" in law:
        return [f"  {name:<16}{law['undefined']}"]
    documents = spread(law, "exponent_documents")
    doubt = "" if law["converged"] else "  not converged"
    if law["autocorrelation"] > DRIFT:
        doubt += f"  residuals drift (rho {law['autocorrelation']:.2f}): no power law here"
    return [
        f"  {name:<16}{spread(law, 'floor'):<24}{spread(law, 'exponent'):<24}{documents:<24}"
        f"{law['r2']:>6.3f}{law['n_points']:>8}{doubt}"
    ]


def _tail(result: Mapping[str, Any]) -> str:
    tail, difference = result["tail"], result["tail_minus_law"]
    if "undefined" in tail:
        return f"  no tail of the spectrum: {tail['undefined']}"
    words = f"  tail exponent of the spectrum: {spread(tail, 'exponent')}"
    if "undefined" in difference:
        return words
    agree = "they agree" if difference["agree"] else "they do not agree"
    return f"{words}; less alpha: {spread(difference, 'difference')}: {agree}"


def _zero_sum(sums: Mapping[str, Any]) -> list[str]:
    if "undefined" in sums:
        return [f"  zero-sum learning: {sums['undefined']}"]
    movement, interference = (
        spread({"it": sums[name][-1], "it_interval": [row[-1] for row in sums[bounds]]}, "it")
        for name, bounds in (
            ("movement", "movement_interval_2P"),
            ("interference", "interference_interval_2P"),
        )
    )
    return [
        f"  from step {sums['from_step'][-1]:,.0f} to {sums['to_step'][-1]:,.0f} a token's loss "
        f"moved by {movement} nats, a share of {interference} of which cancelled (zero-sum "
        "learning)"
    ]

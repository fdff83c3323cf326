"""A run's laws as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

_DRIFT = 0.7  # our choice: n of 40 probes is then 7, for three parameters


def describe_laws(result: Mapping[str, Any]) -> str:
    """The fitted laws with their intervals and the spectrum's tail, from laws.json."""
    start, time = result["settings"]["from"], result["time"]
    lines = [
        f"  L = E + B t^-alpha, t = {time} from {start:,.0f} on, 95% intervals",
        f"  {'':<16}{'E (nats)':<24}{'alpha':<24}{'R^2':>6}{'points':>8}",
        *_law("all tokens", result["overall"]),
    ]
    for dataset in result["datasets"]:
        lines += _law(dataset["name"], dataset)
    for other in result["other_starts"]:
        lines += _law(f"from {other['from']:,.0f}", other)
    tail, difference = result["spectrum"]["tail"], result["tail_minus_law"]
    if tail is None:
        lines.append(f"  no tail of the spectrum: {result['spectrum']['undefined']}")
    else:
        lines.append(
            f"  tail exponent of the spectrum: {_with(tail['exponent'], tail['interval'])}"
        )
    if difference is not None:
        lines.append(
            f"  tail less alpha: {difference['difference']:.3f} +- {1.96 * difference['se']:.3f}"
        )
    return "\n".join(lines)


def _law(name: str, result: Mapping[str, Any]) -> list[str]:
    law = result["power_law"]
    if law is None:
        return [f"  {name:<16}{result['undefined']}"]
    floor = _with(law["floor"], law["floor_interval"])
    exponent = _with(law["exponent"], law["exponent_interval"])
    doubt = "" if law["converged"] else "  not converged"
    if law["autocorrelation"] > _DRIFT:
        doubt += f"  residuals drift (rho {law['autocorrelation']:.2f}): no power law here"
    return [f"  {name:<16}{floor:<24}{exponent:<24}{law['r2']:>6.3f}{law['n_points']:>8}{doubt}"]


def _with(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"

"""Laws over several runs: their table, Chinchilla's law, and the multi-power law of a schedule."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.markup import escape, estimate, facts, number, paragraph, table
from megatron_tokscale.report.verdicts import CLAIMED, outcome

_PARAMETERS = {
    "floor": "E (nats)",
    "A": "A",
    "alpha": "α, of the parameters",
    "B": "B",
    "beta": "β, of the tokens",
    "a": "a = β / (α + β): the best size grows as FLOPs<sup>a</sup>",
}


def several(result: Mapping[str, Any] | None) -> list[str]:
    """The runs, and what the two laws say of them; nothing if there was one run."""
    if result is None:
        return []
    rows = [
        [
            escape(each["name"]),
            number(each["parameters"], ","),
            number(each["non_embedding"], ","),
            number(each["tokens"], ","),
            number(each["loss"]),
        ]
        for each in result["runs"]
    ]
    header = ["run", "parameters", "without embeddings", "training tokens", "last loss (nats)"]
    return [
        "<h3>Laws over runs</h3>",
        table("Mean loss of the watched tokens at each run's last probe.", header, rows),
        _chinchilla(result["chinchilla"]),
        *_multi_power(result["multi_power"]),
    ]


def _chinchilla(law: Mapping[str, Any]) -> str:
    if "undefined" in law:
        return _undefined("Chinchilla's law", law)
    return table(
        f"Chinchilla's law, L = E + A N<sup>−α</sup> + B D<sup>−β</sup>, of "
        f"{number(law['n_runs'], ',')} runs; N without embeddings. R² of the log losses: "
        f"{number(law['r2'])}.{_not_converged(law)}",
        ["", "fitted [95%]"],
        [[name, estimate(law, key, ",.4g")] for key, name in _PARAMETERS.items()],
    )


def _multi_power(result: Mapping[str, Any]) -> list[str]:
    if "undefined" in result:
        return [_undefined("Multi-power law", result)]
    law, score = result["law"], result["score"]
    fitted = ", ".join(escape(name) for name in result["fitted_on"])
    return [
        paragraph(
            f"Multi-power law: fitted to the losses and learning rates of {fitted}, held against "
            f"{escape(result['held_out'])}, which it has not seen.{_not_converged(law)}"
        ),
        facts(
            [
                ["R² of the losses", number(score["r2"])],
                ["Mean error", f"{number(score['mae'], '.4f')} nats"],
                [
                    "Last loss",
                    f"{number(result['last_loss_predicted'])} nats predicted, "
                    f"{number(result['last_loss'])} measured",
                ],
            ]
        ),
    ]


def _not_converged(law: Mapping[str, Any]) -> str:
    return "" if law["converged"] else " The fit has not converged."


def _undefined(name: str, law: Mapping[str, Any]) -> str:
    return paragraph(f"{name}: {outcome(None, CLAIMED)}: {escape(law['undefined'])}.")

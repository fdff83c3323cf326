"""Tables of the study in markdown, from its ledger alone."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from quanta_corpus.corpus import World
from reweighting.arms import UNIFORM
from reweighting.chain import Chain, Training
from reweighting.ledger import Ledger
from reweighting.speed import (
    Curve,
    Speed,
    at_end,
    compare,
    describe,
    describe_passage,
    percent_faster,
    pooled_slope,
)

_PACKAGES: Final = ("megatron-tokscale", "megatron-core", "torch", "numpy", "scipy")
_NOTES: Final = """\
Loss: mean over the watched tokens of held-out documents in their natural mix, nats per token. Each
run's loss at T = {steps} is that of a quadratic in ln t, fitted to its probes in [0.6 T, T]. "X%
faster" = 100 (1 - exp(D / s)), with D the arm's loss at T less that of `uniform` with the same
seed, and s the mean slope -dL/d ln t of `uniform` at T, {slope:.3f} nats. First passage: the step
at which the running median of three probes reaches the loss of `uniform` at T; a run that has not
arrived by step {last} counts as {least:.0f}%, and a mean with such a run is a bound. Intervals:
95%, Student's t over seeds. The training of the reference run is not counted."""


def report(training: Training, world: World, ledger: Ledger) -> str:
    """Return all tables of the results that the ledger has."""
    found = _Found(training, ledger)
    parts = [
        "# A corpus of known quanta",
        ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in _PACKAGES)]
        ),
        _setting(training, world),
        found.missing(),
        *found.speed(),
        *found.losses(),
        *(_figures(ledger["reference"], found) if "reference" in ledger else []),
        *(_learned(ledger["learned"]) if "learned" in ledger else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Found:
    """The runs of a ledger.

    Args:
        training: model, data and training.
        ledger: the results.
    """

    def __init__(self, training: Training, ledger: Ledger):
        self.training = training
        self.runs: dict[tuple[str, int], Mapping[str, Any]] = {
            (arm, seed): ledger[name]
            for arm in training.arms
            for seed in training.seeds
            if (name := Chain.result_name(arm, seed)) in ledger
        }

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds for which all of `arms` are finished."""
        return [
            seed for seed in self.training.seeds if all((arm, seed) in self.runs for arm in arms)
        ]

    def curves(self, arm: str, seeds: Iterable[int]) -> list[Curve]:
        """Return the loss curves of an arm."""
        runs = [self.runs[arm, seed] for seed in seeds]
        return [Curve(np.array(run["step"]), np.array(run["loss"])) for run in runs]

    @property
    def slope(self) -> float:
        """The pooled slope of the uniform arm at T."""
        return pooled_slope(self.curves(UNIFORM, self.seeds(UNIFORM)), self.training.steps)

    def against_uniform(self, arm: str) -> Speed | None:
        """Return the speed of an arm, over the seeds that it shares with `uniform`."""
        seeds = self.seeds(UNIFORM, arm)
        if not seeds:
            return None
        runs, uniform = self.curves(arm, seeds), self.curves(UNIFORM, seeds)
        return compare(runs, uniform, self.training.steps, self.slope)

    def missing(self) -> str:
        """Return a sentence that names the unfinished runs; empty if there are none."""
        size = self.training
        runs = [
            f"{arm} seed {seed}"
            for arm in size.arms
            for seed in size.seeds
            if (arm, seed) not in self.runs
        ]
        return f"**Not finished: {', '.join(runs)}.**" if runs else ""

    def speed(self) -> list[str]:
        """Return the tables of how much faster the arms are than `uniform`, and than `permuted`."""
        if not self.seeds(UNIFORM):
            return []
        size = self.training
        least = 100 * (1 - size.last_step / size.steps)
        rows = [
            [
                arm,
                ", ".join(f"{x:.1f}" for x in speed.faster_S),
                describe(speed.faster_S),
                describe(speed.difference_S, 4),
                describe_passage(speed.passage_S, least),
            ]
            for arm in size.arms
            if arm != UNIFORM and (speed := self.against_uniform(arm))
        ]
        columns = ["arm", "each seed", "X% faster [95%]", "loss at T, nats [95%]", "first passage"]
        notes = _NOTES.format(steps=size.steps, last=size.last_step, slope=self.slope, least=least)
        return [
            "**Against `uniform`, paired by seed**",
            _table(columns, rows),
            *self._over_permuted(),
            notes,
        ]

    def _over_permuted(self) -> list[str]:
        rows = []
        for arm in self.training.arms:
            seeds = self.seeds(UNIFORM, "permuted", arm)
            if arm in {UNIFORM, "permuted"} or not seeds:
                continue
            runs, control = self.curves(arm, seeds), self.curves("permuted", seeds)
            speed = compare(runs, control, self.training.steps, self.slope)
            rows.append([arm, describe(speed.faster_S), describe(speed.difference_S, 4)])
        if not rows:
            return []
        columns = ["arm", "X% faster [95%]", "loss at T, nats [95%]"]
        return ["**Against `permuted`, paired by seed**", _table(columns, rows)]

    def losses(self) -> list[str]:
        """Return the table of the arms' losses at T."""
        arms = [arm for arm in self.training.arms if self.seeds(arm)]
        if not arms:
            return []
        groups = list(next(iter(self.runs.values()))["groups"])
        rows = []
        for arm in arms:
            runs = [self.runs[arm, seed] for seed in self.seeds(arm)]
            at_T = {
                name: [
                    at_end(np.array(run["step"]), np.array(run[name]), self.training.steps).loss
                    for run in runs
                ]
                for name in ("loss", "object")
            }
            of_groups = [np.mean([run["groups"][name] for run in runs]) for name in groups]
            rows.append(
                [arm, *(describe(x, 3) for x in at_T.values()), *(f"{x:.3f}" for x in of_groups)]
            )
        return [
            "**Loss at T, nats per token**",
            _table(["arm", "all tokens [95%]", "objects [95%]", *groups], rows),
        ]


def _installed(package: str) -> str:
    return f"{package} {version(package)}"


def _setting(training: Training, world: World) -> str:
    size, mix = training, world.mix
    words = [
        f"{size.layers} layers, hidden {size.hidden}, {size.seq_length} tokens a sample",
        f"{size.batch} samples a step, vocabulary {size.vocab_size}",
        f"constant learning rate {size.learning_rate:g} after {size.warmup} steps",
        f"T = {size.steps} steps = {size.steps * size.batch * size.seq_length:,} tokens",
        f"{mix.documents:,} documents, {mix.junk:.0%} junk, {mix.boilerplate:.0%} boilerplate",
        f"{mix.topics} topics of {mix.facts} facts",
        f"seeds {', '.join(map(str, size.seeds))}, of the reference run {size.reference_seed}",
    ]
    return "; ".join(words) + "."


def _figures(figures: Mapping[str, Any], found: _Found) -> list[str]:
    rho, cv2, reliability = (figures[k] for k in ("rank_correlation", "cv2", "reliability"))
    rows = [
        ["rank correlation with the true fall of a document's kind", _number(rho["documents"])],
        ["the same of the mean scores of kinds", _number(rho["kinds"])],
        ["reliability of the score of a watched document", _number(reliability["watched"])],
        ["reliability of a predicted score", _number(reliability["predicted"])],
        *([f"CV² of {name}", _number(value)] for name, value in cv2.items()),
    ]
    chain = [
        [name, f"{value:.3f}", f"{percent_faster(value):.1f}"]
        for name, value in figures["links"].items()
    ]
    return [
        "**The scores, beside the true falls**",
        _table(["", ""], rows),
        "**Gain of `fall` to first order, with one link more in each row**",
        _table(["weights", "ln speed-up", "X% faster"], chain),
        "**Gain of the plans: printed, to first order with the true falls, and measured**",
        _table(
            ["arm", "`plan build`: at most X%", "first order, true falls", "measured [95%]"],
            _gains(figures, found),
        ),
        "What is measured less than the first order is what that formula does not see: saturation "
        "of what is drawn more often, and forgetting of what is drawn less often.",
    ]


def _gains(figures: Mapping[str, Any], found: _Found) -> list[list[str]]:
    rows = []
    for arm, value in figures["expected"].items():
        speed = found.against_uniform(arm)
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
        [
            "learning order of facts against their rarity",
            f"{order['rho']:.3f}, {order['facts']} facts",
        ],
        ["locality against group curves", learned["locality"]],
        ["learning order of two seeds", learned.get("order_of_runs", "-")],
        ["covariance of falls of two seeds", learned.get("covariance", "-")],
        ["b of known frequencies, onset fitted", law["b"]],
        ["onset in steps; exposures of a fact", _two(law.get("onset"), law.get("exposures"))],
        ["b without an onset", law.get("without_onset", "-")],
        ["b of `laws`, by frequencies of token ids", of_ids["b"]],
        ["exponent of the tail", learned["tail"]],
        ["tail less loss", learned["tail_minus_law"]],
        ["nats of censored tokens, expected by `spectrum`", learned["ahead"]["expected"]],
        ["nats of censored facts, known", f"{learned['ahead']['known']:.3f}"],
        *([f"forecast of the last octave: {k}", str(v)] for k, v in learned["forecast"].items()),
    ]
    rows = [
        [
            f"{row['at_least']:g}",
            f"{row['facts']:,}",
            f"{row['tokens']:,}",
            f"{row['censored']:.0%}",
            _number(row["step"], ".0f"),
            _number(row["exposures"], ".0f"),
            f"{row['last_loss']:.2f}",
        ]
        for row in learned["by_exposures"]
    ]
    columns = ["exposures a step, at least", "facts", "watched tokens", "censored"]
    columns += ["median step", "exposures by then", "last loss"]
    return [
        "**What the verbs find in a run of `uniform`**",
        f"scored: {learned['scored']}",
        _table(["", ""], tests),
        "**Facts by their known frequency**",
        _table(columns, rows),
    ]


def _number(value: float | None, pattern: str = ".3f") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{pattern}}"


def _two(first: float | None, second: float | None) -> str:
    return f"{_number(first, '.0f')}; {_number(second, '.1f')}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

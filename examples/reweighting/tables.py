"""Tables in markdown of the runs that the ledger of a study has."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import numpy as np
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
    pooled_slope,
)

_PERMUTED: Final = "permuted"
_NOTES: Final = """\
Loss: mean over the watched tokens of held-out documents in their natural mix, nats per token. Each
run's loss at T = {steps} is that of a quadratic in ln t, fitted to its probes in [0.6 T, T]. "X%
faster" = 100 (1 - exp(D / s)), with D the arm's loss at T less that of `uniform` with the same
seed, and s the mean slope -dL/d ln t of `uniform` at T, {slope:.3f} nats. First passage: the step
at which the running median of three probes reaches the loss of `uniform` at T; a run that has not
arrived by step {last} counts as {least:.0f}%, and a mean with such a run is a bound. Intervals:
95%, Student's t over seeds. The training of the reference run is not counted."""


class Results:
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

    def against(self, other: str, arm: str) -> Speed | None:
        """Return the speed of an arm against another; None without a seed that both have.

        Both need the slope of `uniform`, so that seeds without it do not count.
        """
        seeds = self.seeds(UNIFORM, other, arm)
        if not seeds:
            return None
        runs, others = self.curves(arm, seeds), self.curves(other, seeds)
        return compare(runs, others, self.training.steps, self.slope)

    # Tables

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

    def speeds(self) -> list[str]:
        """Return how much faster the arms are than `uniform` and than `permuted`, and notes."""
        if not self.seeds(UNIFORM):
            return []
        size = self.training
        least = 100 * (1 - size.last_step / size.steps)
        notes = _NOTES.format(steps=size.steps, last=size.last_step, slope=self.slope, least=least)
        return [
            *self._speeds_against(UNIFORM, least),
            *self._speeds_against(_PERMUTED, least),
            notes,
        ]

    def _speeds_against(self, other: str, least: float) -> list[str]:
        rows = [
            [
                arm,
                ", ".join(f"{x:.1f}" for x in speed.faster_S),
                describe(speed.faster_S),
                describe(speed.difference_S, 4),
                describe_passage(speed.passage_S, least),
            ]
            for arm in self.training.arms
            if arm not in {UNIFORM, other} and (speed := self.against(other, arm))
        ]
        columns = ["arm", "each seed", "X% faster [95%]", "loss at T, nats [95%]", "first passage"]
        return [f"**Against `{other}`, paired by seed**", table(columns, rows)] if rows else []

    def losses(self, curves: Mapping[str, str]) -> list[str]:
        """Return the table of the arms' losses at T.

        Args:
            curves: header of the table by name of a curve in the results. The groups of the
                results, whose losses are those at T, follow.
        """
        arms = [arm for arm in self.training.arms if self.seeds(arm)]
        if not arms:
            return []
        groups = list(next(iter(self.runs.values()))["groups"])
        rows = []
        for arm in arms:
            runs = [self.runs[arm, seed] for seed in self.seeds(arm)]
            at_T = [describe([self._at_end(run, name) for run in runs], 3) for name in curves]
            of_groups = [np.mean([run["groups"][name] for run in runs]) for name in groups]
            rows.append([arm, *at_T, *(f"{loss:.3f}" for loss in of_groups)])
        columns = ["arm", *(f"{header} [95%]" for header in curves.values()), *groups]
        return ["**Loss at T, nats per token**", table(columns, rows)]

    def _at_end(self, run: Mapping[str, Any], name: str) -> float:
        return at_end(np.array(run["step"]), np.array(run[name]), self.training.steps).loss


def setting(training: Training, *words: str) -> str:
    """Describe model, training and seeds in one line, after other words."""
    size = training
    parts = [
        *words,
        f"{size.layers} layers, hidden {size.hidden}, {size.seq_length} tokens a sample",
        f"{size.batch} samples a step, vocabulary {size.vocab_size}",
        f"constant learning rate {size.learning_rate:g} after {size.warmup} steps",
        f"T = {size.steps} steps = {size.steps * size.batch * size.seq_length:,} tokens",
        f"{size.quantiles} strata of documents by {size.by}, {size.held_out} of each held out",
        f"seeds {', '.join(map(str, size.seeds))}, of the reference run {size.reference_seed} "
        "(Megatron's --seed is one more, the plan's the same)",
    ]
    return "; ".join(parts) + "."


def versions(packages: Sequence[str]) -> str:
    """Return the versions of Python and of packages in one line."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    )


def number(value: float | None, pattern: str = ".3f") -> str:
    """Format a number; "-" for one that is not known."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{pattern}}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

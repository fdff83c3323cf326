"""The chain of a study, by the verbs of the README: from data to jobs under the plans of its arms.

    data -> probe set of the valid part -> reference run -> probe set of training documents that it
    has not seen -> replay of its checkpoints -> fit -> scores -> a plan per arm and seed -> probe
    sets of the documents that the plans keep out -> jobs

A step whose result exists is skipped, and a job that was stopped resumes from its checkpoint. The
curve of a finished job goes into the ledger; a run of the ledger is not trained again.
"""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from reweighting.arms import ARMS, Arm
from reweighting.ledger import Ledger
from reweighting.steps import Step, run_logged, run_steps

from megatron_tokscale.core.files import write_text
from megatron_tokscale.demo.job import is_trained
from megatron_tokscale.store.paths import RunPaths

type Word = str | int | float | Path

_SEED: Final = 0  # of the draws of probe sets
_CHECKPOINTS: Final = 4  # of a run, from which it resumes if it is stopped


@dataclass(frozen=True, kw_only=True)
class Training:
    """Model, data and training of all runs of a study.

    Attributes:
        layers: layers of the model.
        hidden: width of a layer.
        heads: attention heads.
        seq_length: tokens of a sample.
        vocab_size: tokens of the vocabulary.
        eod: end-of-document token, which no probe set watches; None if documents have none.
        split: Megatron's --split.
        batch: samples of a step.
        steps: T, the step at which arms are compared.
        last_step: step at which all runs end, after T, so that slower ones can arrive too.
        learning_rate: constant after the warm-up.
        warmup: steps of the warm-up.
        save_every: steps between checkpoints of the reference run, all of which are replayed. It
            divides T / 4, the first of the two steps between which documents are scored.
        valid_tokens: held-out tokens that every run watches, about.
        schedule: schedule of the probes of every run but the replay.
        scored_tokens: training tokens that the replay watches, about.
        by: the score that divides documents into strata.
        quantiles: strata of documents of a dataset.
        held_out: documents of each stratum that no plan draws, and that `fall-live` watches.
        replan_every: steps between the decisions of `fall-live`.
        arms: names of the arms, in the order of the tables.
        seeds: seeds of every arm; a seed changes the first weights and the order of the data.
        reference_seed: seed of the reference run, which ends at T.
    """

    layers: int
    hidden: int
    heads: int
    seq_length: int
    vocab_size: int
    eod: int | None
    split: str
    batch: int
    steps: int
    last_step: int
    learning_rate: float
    warmup: int
    save_every: int
    valid_tokens: int
    schedule: str
    scored_tokens: int
    by: Literal["fall", "target"]
    quantiles: int
    held_out: int
    replan_every: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    reference_seed: int

    @property
    def train_samples(self) -> int:
        """Samples of a run."""
        return self.last_step * self.batch


@dataclass(frozen=True)
class Chain(ABC):
    """The files of a study, and the steps that make them.

    A study derives from it, and gives its data, its curves, and arms of its own.

    Attributes:
        folder: folder of all files.
        training: model, data and training.
        ledger: the results.
    """

    folder: Path
    training: Training
    ledger: Ledger

    @property
    @abstractmethod
    def data_path(self) -> list[str]:
        """Words of Megatron's --data-path."""

    @abstractmethod
    def write_data(self) -> None:
        """Write the datasets, and `data_done` at the end."""

    @abstractmethod
    def result_of(self, run: Path) -> Mapping[str, object]:
        """Return the ledger's entry of a finished run: steps, losses and what the study adds."""

    @property
    def arms(self) -> Mapping[str, Arm]:
        """The arms by name."""
        return ARMS

    # Files

    @property
    def data_done(self) -> Path:
        """The file that says that the datasets are whole."""
        return self.folder / "data" / "data.json"

    @property
    def valid(self) -> Path:
        """The probe set of the valid part, which every run watches."""
        return self.folder / "valid.safetensors"

    @property
    def unseen(self) -> Path:
        """The probe set of training documents that the reference run has not seen."""
        return self.folder / "unseen.safetensors"

    @property
    def reference(self) -> Path:
        """The reference run, with its checkpoints."""
        return self.folder / "reference"

    @property
    def replay(self) -> Path:
        """The replay of the reference's checkpoints on the unseen documents."""
        return self.folder / "replay"

    @property
    def scores(self) -> Path:
        """The folder of the scores of the datasets' documents."""
        return self.folder / "scores"

    def scores_of(self, arm: str) -> Path:
        """Return the folder of the scores that an arm's plan is made from."""
        return self.folder / self.arms[arm].scores

    def plan(self, arm: str, seed: int) -> Path:
        """Return the plan of an arm."""
        return self.folder / "plans" / f"{arm}-{seed}.json"

    def strata(self, arm: str, seed: int) -> Path:
        """Return the probe set of the documents that an arm's plan keeps out."""
        return self.folder / "plans" / f"{arm}-{seed}.strata.safetensors"

    def run(self, arm: str, seed: int) -> Path:
        """Return the run of an arm."""
        return self.folder / f"{arm}-{seed}"

    @staticmethod
    def result_name(arm: str, seed: int) -> str:
        """Return the name of a run in the ledger."""
        return f"{arm}/{seed}"

    # Steps

    def missing(self) -> list[tuple[str, int]]:
        """Return the runs that the ledger misses, all arms of a seed before the next seed."""
        runs = [(arm, seed) for seed in self.training.seeds for arm in self.training.arms]
        return [run for run in runs if self.result_name(*run) not in self.ledger]

    def planned(self) -> list[tuple[str, int]]:
        """Return the runs whose plans are needed: those that the ledger misses."""
        return self.missing()

    def is_complete(self) -> bool:
        """Return whether the ledger has all results, so that no step is needed."""
        return not self.missing()

    def phases(self) -> dict[str, list[Step]]:
        """Return the steps by phase, in order; a step needs earlier phases alone."""
        planned = self.planned()
        live = [run for run in planned if self.arms[run[0]].is_live]
        return {
            "data": [Step("data", self.data_done.exists, self.write_data)],
            "valid": [Step("probe set of the valid part", self.valid.exists, self.build_valid)],
            "reference": [Step("reference run", self._has_reference, self.train_reference)],
            "unseen": [Step("unseen documents", self.unseen.exists, self.build_unseen)],
            "replay": [self.replay_step("replay", self.reference, self.unseen, self.replay)],
            "fit": [Step("fit of the replay", RunPaths(self.replay).fit.exists, self.fit)],
            "scores": [Step("scores", self._scored.exists, self.score)],
            "plans": [self._plan_step(*run) for run in planned],
            "strata": [self._strata_step(*run) for run in live],
            "jobs": [self._job_step(*run) for run in self.missing()],
        }

    def replay_step(
        self, name: str, run: Path, probe_set: Path, replay: Path, *flags: Word
    ) -> Step:
        """Return the step that probes the checkpoints of a run of T steps on a probe set."""
        size = self.training
        flags = ("--tokscale-probe-set", probe_set, "--tokscale-dir", replay, *flags)
        return Step(
            name,
            lambda: self._has_replay(replay),
            lambda: self._megatron(
                replay, size.reference_seed, size.steps, "--tokscale-replay", run, *flags
            ),
        )

    def training_step(self, arm: str, seed: int) -> Step:
        """Return the step that trains an arm, whether or not the ledger has its result."""
        run = self.run(arm, seed)
        return Step(
            f"{arm}, seed {seed}",
            lambda: is_trained(run, self.training.last_step),
            lambda: self._train_arm(arm, seed),
        )

    def _plan_step(self, arm: str, seed: int) -> Step:
        return Step(
            f"plan of {arm}, seed {seed}",
            self.plan(arm, seed).exists,
            lambda: self._build_plan(arm, seed),
        )

    def _strata_step(self, arm: str, seed: int) -> Step:
        out = self.strata(arm, seed)
        words: list[Word] = ["--plan", self.plan(arm, seed), "--scores-dir", self.scores_of(arm)]
        words += self._eod()
        return Step(
            f"probe set of the strata of {arm}, seed {seed}",
            out.exists,
            lambda: self.tokscale(out.stem, "probe", "build", *words, "--out", out),
        )

    def _job_step(self, arm: str, seed: int) -> Step:
        training, name = self.training_step(arm, seed), self.result_name(arm, seed)

        def train() -> None:
            if not training.is_done():
                training.do()
            if training.is_done():
                self.ledger.add(name, self.result_of(self.run(arm, seed)))

        return Step(training.name, lambda: name in self.ledger, train)

    def _has_reference(self) -> bool:
        return self._has_replay(self.reference)

    def _has_replay(self, run: Path) -> bool:
        return is_trained(run, self.training.steps)

    @property
    def _scored(self) -> Path:
        return self.scores / "done"

    # The verbs

    def tokscale(self, log: str, *words: Word) -> None:
        """Run a verb, and append what it prints to a log of the folder.

        Raises:
            TokscaleError: the verb failed.
        """
        command = [sys.executable, "-m", "megatron_tokscale.cli", *map(str, words)]
        run_logged(command, self.log(log))

    def at_most(self, arm: str, seed: int) -> float | None:
        """Return the last "at most X%" that `plan build` has printed; None if it printed none."""
        text = self.log(f"plan-{arm}-{seed}").read_text(encoding="utf-8")
        found = re.findall(r"at most ([\d.]+)%", text)
        return float(found[-1]) if found else None

    def log(self, name: str) -> Path:
        """Return the file of what a verb printed."""
        return self.folder / "logs" / f"{name}.log"

    def _build_plan(self, arm: str, seed: int) -> None:
        """Make the plan of an arm, on the document strata of all arms."""
        size, own = self.training, self.arms[arm]
        self.tokscale(
            f"plan-{arm}-{seed}",
            *("plan", "build", *own.build, *self._data_of_samples()),
            *("--by", size.by, "--quantiles", own.quantiles or size.quantiles),
            *(("--held-out", size.held_out) if size.held_out else ()),
            *("--scores", self.scores_of(arm)),
            *("--train-samples", size.train_samples, "--seed", seed),
            *("--out", self.plan(arm, seed)),
        )

    def build_probe_set(self, part: str, tokens: int, out: Path, *flags: Word) -> None:
        """Draw a probe set of about `tokens` tokens from a part of the data."""
        size = self.training
        self.tokscale(
            out.stem,
            *("probe", "build", *self._data_of_samples(), "--part", part),
            *("--per-dataset", "proportional", "--vocab-size", size.vocab_size),
            *("--tokens", tokens, "--seed", _SEED, *self._eod(), *flags, "--out", out),
        )

    def build_valid(self) -> None:
        """Draw the probe set of the valid part."""
        self.build_probe_set("valid", self.training.valid_tokens, self.valid)

    def build_unseen(self) -> None:
        """Draw the probe set of training documents that the reference run has not seen."""
        flags = ("--unseen-by", self.reference)
        self.build_probe_set("train", self.training.scored_tokens, self.unseen, *flags)

    def fit(self) -> None:
        """Fit the replay."""
        self.tokscale("fit", "fit", self.replay)

    def score(self, *flags: Word) -> None:
        """Score the documents by the replay, with further flags of the verb."""
        self.scores.mkdir(parents=True, exist_ok=True)
        # A step that was stopped between two datasets has left scores of the first one.
        words: list[Word] = [*self._data(), "--out", self.scores, "--force", *flags]
        self.tokscale("score", "score", self.replay, *words)
        write_text(self._scored, "")

    def _eod(self) -> list[Word]:
        return [] if self.training.eod is None else ["--eod", self.training.eod]

    def _data(self) -> list[str]:
        return ["--data-path", *self.data_path, "--split", self.training.split]

    def _data_of_samples(self) -> list[str]:
        return [*self._data(), "--seq-length", str(self.training.seq_length)]

    # The jobs

    def train_reference(self) -> None:
        """Train the reference run, and save its checkpoints."""
        size, run = self.training, self.reference
        flags = [*_saving(run, size.save_every), *self._watch(self.valid)]
        self._megatron(run, size.reference_seed, size.steps, *flags)

    def _train_arm(self, arm: str, seed: int) -> None:
        size, run = self.training, self.run(arm, seed)
        flags: list[Word] = ["--tokscale-plan", self.plan(arm, seed)]
        flags += ["--tokscale-scores-dir", self.scores_of(arm)]
        watched = [self.valid]
        if self.arms[arm].is_live:
            flags += ["--tokscale-replan-interval", size.replan_every]
            watched.append(self.strata(arm, seed))
        flags += [*_saving(run, max(size.last_step // _CHECKPOINTS, 1)), *self._watch(*watched)]
        self._megatron(run, seed, size.last_step, *flags)

    def _watch(self, *probe_sets: Path) -> list[Word]:
        schedule = self.training.schedule
        return ["--tokscale-probe-set", *probe_sets, "--tokscale-probe-schedule", schedule]

    def _megatron(self, run: Path, seed: int, last_step: int, *flags: Word) -> None:
        command = [
            *(sys.executable, "-m", "megatron_tokscale.pretrain", "--tokscale-cpu"),
            *self._megatron_flags(seed, last_step),
            # Jobs at the same time would write the same index files of a common cache.
            *("--data-cache-path", str(run / "cache")),
            *map(str, flags),
        ]
        run_logged(command, run / "train.log")

    def _megatron_flags(self, seed: int, last_step: int) -> list[str]:
        size = self.training
        model = {
            "--num-layers": size.layers,
            "--hidden-size": size.hidden,
            "--num-attention-heads": size.heads,
            "--seq-length": size.seq_length,
            "--max-position-embeddings": size.seq_length,
            "--position-embedding-type": "rope",
            "--normalization": "RMSNorm",
            "--init-method-std": 0.02,
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
        }
        training = {
            "--micro-batch-size": size.batch,
            "--global-batch-size": size.batch,
            "--train-iters": last_step,
            "--lr": size.learning_rate,
            "--lr-decay-style": "constant",
            "--lr-warmup-iters": size.warmup,
            "--weight-decay": 0.1,
            "--clip-grad": 1.0,
            "--adam-beta2": 0.95,
            "--seed": seed + 1,  # Megatron requires a positive seed
        }
        data = {
            "--tokenizer-type": "NullTokenizer",
            "--vocab-size": size.vocab_size,
            "--num-workers": 0,
            "--eval-interval": last_step,
            "--eval-iters": 1,
            "--log-interval": 20,
            "--ckpt-format": "torch",
        }
        words = [str(word) for pair in (model | training | data).items() for word in pair]
        switches = ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
        return [*words, *switches, *self._data()]


def run_phases(chain: Chain, until: str, at_once: int) -> None:
    """Run the steps of a chain up to a phase, or none if the ledger has all results.

    Args:
        chain: the chain.
        until: name of the last phase; "none" runs nothing.
        at_once: jobs at the same time.
    """
    if until == "none" or chain.is_complete():
        return
    phases = chain.phases()
    names = list(phases)
    run_steps([phases[name] for name in names[: names.index(until) + 1]], at_once)


def _saving(run: Path, every: int) -> list[Word]:
    """Return the flags by which a job saves checkpoints in `run`, and resumes from the last."""
    return ["--save", run, "--load", run, "--save-interval", every]

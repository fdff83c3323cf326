"""Study on a raw pool: does a plan by falls train faster than the plain blend?

    python examples/learnability_study/study.py [--target] [--folder study-run] [--ledger FILE]

The pool is files of installed packages as they are (`corpora.py`). The whole chain of the README's
verbs runs on it, with Megatron on the CPU. The phase `measure` comes before any arm is trained: it
says how much the falls of documents differ, and what a plan can gain at most. The study ends there
if that is too little, unless --anyway is given. `--until measure` takes a quarter of an hour, and
30 runs of all arms an hour on two cores.

With --target the validation is not the pool but speeches, of which the pool has 6%: the reference
is tuned on other speeches, and the policy `target` weighs documents by what the tuning gains there.

A step whose result exists is skipped, and what comes out goes into the ledger: a run that is in it
is not trained again, on whatever machine. All settings are in settings.json and target.json. The
tables are made from the ledger alone; `--until none` trains nothing and writes them.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from learnability_study.corpora import DATASETS, TARGET, write_pool
from learnability_study.kinds import Kinds, what_is_drawn
from learnability_study.tables import MEASURED, POOL, report
from reweighting.arms import UNIFORM, Arm
from reweighting.chain import Chain, Word
from reweighting.command import StudySettings, run_study, study_parser
from reweighting.speed import at_end
from reweighting.steps import Step

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.core.files import read_json
from megatron_tokscale.data import DocumentScores, Plan
from megatron_tokscale.demo.job import is_trained
from megatron_tokscale.results.gain import MIN_SPREAD, Gain, gain_in
from megatron_tokscale.store import Run

HERE: Final = Path(__file__).parent
PHASES: Final = (
    *("data", "valid", "reference", "unseen", "replay", "fit", "tuned", "replay of the tuned"),
    *("scores", "first plan", "measure", "plans", "strata", "jobs"),
)
TARGET_ARMS: Final = {
    UNIFORM: Arm(("target", "--control", "uniform")),
    "target": Arm(("target",)),
    "fall": Arm(("fall",)),
    "permuted": Arm(("target", "--control", "permuted")),
}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Size of the pool.

    Attributes:
        characters: characters of the pool, about.
        target_characters: characters of the speeches that are kept out of it, about.
    """

    characters: int
    target_characters: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tuning of the reference on a sample of the target.

    Attributes:
        split: Megatron's --split of the target: what is tuned on, and what arms are measured on.
        steps: steps of the tuning.
        learning_rate: constant after a tenth of the steps.
    """

    split: str
    steps: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Settings of a study.

    Attributes:
        pool: size of the pool.
        tuning: tuning of the reference; None where the pool itself is the target.
    """

    pool: Pool
    tuning: Tuning | None = None


@dataclass(frozen=True)
class PoolStudy(Chain):
    """A study whose validation is a held-out part of the pool.

    Attributes:
        settings: settings of the study.
        anyway: whether arms are trained where a plan can gain next to nothing.
    """

    settings: Settings
    anyway: bool

    policy = "fall"
    """The policy that the study is about, which is the name of its arm and of its score too."""

    # Data

    @property
    def data_path(self) -> list[str]:
        """Words of --data-path: each dataset weighs as much as it has tokens."""
        counts = read_json(self.data_done)["datasets"]
        return [
            word
            for name in DATASETS
            for word in (str(counts[name]["tokens"]), str(self.prefix(name)))
        ]

    def prefix(self, dataset: str) -> Path:
        """Return the prefix of a dataset."""
        return self.data_done.parent / dataset

    def write_data(self) -> None:
        """Write the pool, and compare it with the one that the ledger's runs were trained on.

        Raises:
            TokscaleError: it is another pool.
        """
        if not self.data_done.exists():
            size = self.settings.pool
            write_pool(
                *(self.data_done.parent, self.folder / "tokenizer.json"),
                *(self.training.vocab_size, size.characters, size.target_characters),
            )
        written = read_json(self.data_done)
        if POOL not in self.ledger:
            self.ledger.add(POOL, written)
        elif written["digest"] != (known := self.ledger[POOL])["digest"]:
            raise TokscaleError(
                f"the pool has the digest {written['digest']}; expected {known['digest']}, that of "
                f"the runs in {self.ledger.path}; install the versions that its second line lists, "
                "or give another --ledger and another --folder"
            )

    @cached_property
    def kinds(self) -> Kinds:
        """The kind of each document."""
        return Kinds.load(self.prefix("kinds.json"))

    # Steps

    def phases(self) -> dict[str, list[Step]]:
        """Return the steps by phase, in order; a step needs earlier phases alone."""
        first = [] if MEASURED in self.ledger else [self._plan_step(*self._first)]
        steps = {
            **super().phases(),
            "data": [Step("data", self._has_pool, self.write_data)],
            "first plan": first,
            "measure": [Step("measure", self._may_go_on, self._measure)],
        }
        return {name: steps[name] for name in PHASES if name in steps}

    @property
    def _first(self) -> tuple[str, int]:
        """The run whose plan tells what the policy can gain."""
        return self.policy, self.training.seeds[0]

    def _has_pool(self) -> bool:
        return self.data_done.exists() and POOL in self.ledger

    # What a plan can gain

    @property
    def variation(self) -> float:
        """CV^2 of the falls of documents, as it was measured; NaN if they do not tell."""
        gain = self.ledger[MEASURED]["gain"]
        spread = gain and gain["spread"]
        return math.nan if spread is None else float(spread)

    def _may_go_on(self) -> bool:
        return MEASURED in self.ledger and (self.anyway or self.variation >= MIN_SPREAD)

    def _measure(self) -> None:
        """Add to the ledger what the scores and the first plan tell.

        Raises:
            TokscaleError: the falls of documents differ too little.
        """
        if MEASURED not in self.ledger:
            self.ledger.add(MEASURED, self._measured())
        if not self._may_go_on():
            raise TokscaleError(
                f"CV² of falls is {self.variation:.3f}; expected {MIN_SPREAD:g} or more; change "
                "the pool, or train the arms all the same with --anyway"
            )

    def _measured(self) -> dict[str, object]:
        plan = Plan.load(self.plan(*self._first))
        gain = gain_in(plan, Gain)
        scores = {
            name: DocumentScores.load(self.scores / f"{name}.tokscale.safetensors")
            for name in DATASETS
        }
        samples = self.training.steps * self.training.batch
        return {
            "gain": gain and {**vars(gain), **vars(gain.scores), "at_most": 100 * gain.at_most},
            "reliability": {
                name: found.details.reliability[self.training.by] for name, found in scores.items()
            },
            "scored_tokens": sum(int(found.watched_Q.sum()) for found in scores.values()),
            "kinds": what_is_drawn(plan, list(scores.values()), self.kinds, samples),
        }

    # Results

    def result_of(self, run: Path) -> dict[str, object]:
        found, end = Run.open(run), self.training.steps
        loss_NK = found.read_losses().astype(np.float64)
        kind_N = np.array(self.kinds.names)[self.kinds.of(found.probe_set)]
        groups = {
            str(name): at_end(found.step_K, loss_NK[kind_N == name].mean(axis=0), end).loss
            for name in np.unique(kind_N)
        }
        return {"step": found.step_K, "loss": loss_NK.mean(axis=0), "groups": groups}


@dataclass(frozen=True)
class TargetStudy(PoolStudy):
    """A study whose validation is a small domain of the pool."""

    policy = "target"

    @property
    def arms(self) -> Mapping[str, Arm]:
        return TARGET_ARMS

    @property
    def tuning(self) -> Tuning:
        """The tuning of the reference."""
        assert self.settings.tuning is not None
        return self.settings.tuning

    @property
    def tuned(self) -> Path:
        """The reference run, tuned on a sample of the target."""
        return self.folder / "tuned"

    @property
    def replay_of_tuned(self) -> Path:
        """The replay of the tuned run on the unseen documents."""
        return self.folder / "replay-tuned"

    def phases(self) -> dict[str, list[Step]]:
        steps = {
            **super().phases(),
            "tuned": [Step("tuned reference", self._is_tuned, self._tune)],
            "replay of the tuned": [
                Step("replay of the tuned", self._has_replay_of_tuned, self._replay_tuned)
            ],
        }
        return {name: steps[name] for name in PHASES}

    def _may_go_on(self) -> bool:
        """Return whether the plan is measured: the spread of falls is no bound for a target."""
        return MEASURED in self.ledger

    def build_valid(self) -> None:
        """Draw the probe set from the part of the target that nothing is tuned on."""
        size = self.training
        self.tokscale(
            self.valid.stem,
            *("probe", "build", *self._target_data, "--part", "valid"),
            *("--seq-length", size.seq_length, "--vocab-size", size.vocab_size),
            *("--eod", 0, "--tokens", size.valid_tokens, "--seed", 0, "--out", self.valid),
        )

    def score(self, *flags: Word) -> None:
        """Score the documents by the replays of the reference and of the tuned reference."""
        super().score("--tuned", self.replay_of_tuned, *flags)

    @property
    def _target_data(self) -> list[str]:
        return ["--data-path", str(self.prefix(TARGET)), "--split", self.tuning.split]

    def _is_tuned(self) -> bool:
        latest = self.tuned / "latest_checkpointed_iteration.txt"
        return latest.exists() and latest.read_text().strip() == str(self.tuning.steps)

    def _tune(self) -> None:
        """Train the reference on the target's sample, with Megatron's own flags for it."""
        size = self.tuning
        self._megatron(
            *(self.tuned, self.training.reference_seed, size.steps),
            *("--load", self.reference, "--finetune", "--save", self.tuned),
            *("--save-interval", size.steps, "--lr", size.learning_rate),
            *("--lr-warmup-iters", size.steps // 10, *self._target_data),
        )

    def _has_replay_of_tuned(self) -> bool:
        return is_trained(self.replay_of_tuned, self.tuning.steps)

    def _replay_tuned(self) -> None:
        self._megatron(
            *(self.replay_of_tuned, self.training.reference_seed, self.tuning.steps),
            *("--tokscale-probe-set", self.unseen, "--tokscale-replay", self.tuned),
            *("--tokscale-dir", self.replay_of_tuned),
        )


def open_study(folder: Path, settings: Settings, ledger: Path, anyway: bool) -> PoolStudy:
    """Begin a study in `folder`, or resume the one that it holds.

    Raises:
        TokscaleError: `folder` or `ledger` is of other settings.
    """
    study = TargetStudy if settings.tuning else PoolStudy
    return study(folder, settings.training, settings.open(folder, ledger), settings, anyway)


def main(words: Sequence[str] | None = None) -> None:
    about = __doc__.splitlines()[0]
    defaults = "study-run, or target-run", "settings.json, or target.json"
    parser = study_parser(about, *defaults, PHASES)
    parser.add_argument("--target", action="store_true", help="the study with a target")
    parser.add_argument("--anyway", action="store_true", help="train arms however small the gain")
    given = parser.parse_args(words)
    folder = given.folder or Path("target-run" if given.target else "study-run")
    settings = given.settings or HERE / ("target.json" if given.target else "settings.json")
    with exit_with_one_line():
        ledger = given.ledger or folder / "ledger.jsonl"
        study = open_study(folder, Settings.load(settings), ledger, given.anyway)
        run_study(study, given, lambda: report(study.training, study.policy, study.ledger))


if __name__ == "__main__":
    main()

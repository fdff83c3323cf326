"""Study on a corpus of known quanta: does a plan by falls train faster, and what loses the rest?

    python examples/quanta_corpus/study.py [--folder quanta-run] [--ledger FILE] [--out FILE]

The corpus (`corpus.py`) has facts whose frequencies are known, junk that nobody can learn, and
boilerplate that is soon known. The whole chain of the README's verbs runs on it, with Megatron on
the CPU: a reference run, scores of documents by what falls in them, and per seed a plan and a job
of every arm. An arm that one has in no real corpus, `ideal`, is planned by the true falls of the
kinds of documents. All settings are in settings.json; clean.json is the same corpus without junk
and boilerplate, where there is little to gain: `--settings examples/quanta_corpus/clean.json`.

A step whose result exists is skipped, and what comes out goes into the ledger: a run that is in it
is not trained again, on whatever machine. The tables are made from the ledger alone; `--until none`
trains nothing and writes them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from quanta_corpus.corpus import Mix, Truth, World, write_corpus
from quanta_corpus.learned import what_was_learned
from quanta_corpus.links import Drawn, TrueFalls, links, log_speedup, true_falls
from quanta_corpus.tables import FIGURES, LEARNED, report
from reweighting.arms import ARMS, UNIFORM, Arm
from reweighting.chain import Chain, Word
from reweighting.command import StudySettings, run_study, study_parser
from reweighting.speed import at_end
from reweighting.steps import Step
from scipy.stats import spearmanr

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.core.files import write_json
from megatron_tokscale.data import DocumentScores, Plan
from megatron_tokscale.store import Run, RunPaths

HERE: Final = Path(__file__).parent
IDEAL: Final = "ideal"
PHASES: Final = (
    *("data", "valid", "reference", "unseen", "replay", "fit", "scores"),
    *("watch", "truth", "ideal", "plans", "figures", "strata", "jobs"),
    *("analysed", "spectra", "learned"),
)
_EVERY_VALUE: Final = 4096
"""Quantiles of the true falls in `ideal`: so many that every kind of document is a stratum."""


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Settings of the study.

    Attributes:
        corpus: the corpus.
        watched_of_kind: documents of each kind from which the true falls are measured.
    """

    corpus: Mix
    watched_of_kind: int


@dataclass(frozen=True)
class QuantaStudy(Chain):
    """The study's files, and the steps that make them.

    Attributes:
        settings: settings of the study.
    """

    settings: Settings

    @classmethod
    def open(cls, folder: Path, settings: Settings, ledger: Path) -> "QuantaStudy":
        """Begin a study in `folder`, or resume the one that it holds.

        Raises:
            TokscaleError: `folder` or `ledger` is of other settings, or the settings do not fit
                together.
        """
        world, training = World(settings.corpus), settings.training
        found, expected = (
            (training.vocab_size, training.seq_length),
            (world.vocab_size, world.length),
        )
        if found != expected:
            raise TokscaleError(
                f"vocab_size and seq_length are {found}; expected {expected}, those of the corpus; "
                "correct the settings"
            )
        return cls(folder, training, settings.open(folder, ledger), settings)

    @cached_property
    def world(self) -> World:
        """The corpus's facts."""
        return World(self.settings.corpus)

    # Data

    @property
    def prefix(self) -> Path:
        """Prefix of the corpus."""
        return self.folder / "data" / "quanta"

    @property
    def kinds_prefix(self) -> Path:
        """Prefix of documents of every kind, from which the true falls are measured."""
        return self.folder / "data" / "kinds"

    @property
    def data_path(self) -> list[str]:
        return ["1", str(self.prefix)]

    def write_data(self) -> None:
        world, counts = self.world, {}
        every_kind = np.repeat(np.arange(world.n_kinds), self.settings.watched_of_kind)
        kinds = {self.prefix: world.natural_kinds(), self.kinds_prefix: every_kind}
        for seed, (prefix, kind_Q) in enumerate(kinds.items(), 2):
            n_tokens = write_corpus(world.documents(kind_Q, seed), prefix)
            counts[prefix.name] = {"documents": len(kind_Q), "tokens": n_tokens}
        write_json(self.data_done, counts)

    # Steps

    def is_complete(self) -> bool:
        return super().is_complete() and FIGURES in self.ledger and LEARNED in self.ledger

    def planned(self) -> list[tuple[str, int]]:
        runs = self.missing()
        if FIGURES not in self.ledger:
            runs += [(arm, self.training.seeds[0]) for arm in self.training.arms]
        if LEARNED not in self.ledger:
            runs += self._analysed
        return list(dict.fromkeys(runs))

    @property
    def _analysed(self) -> list[tuple[str, int]]:
        """The runs whose learning times are analysed: two seeds of the uniform arm."""
        return [(UNIFORM, seed) for seed in self.training.seeds[:2]]

    def phases(self) -> dict[str, list[Step]]:
        """Return the steps by phase, in order; a step needs earlier phases alone."""
        watched, analysed = self.kinds_prefix.with_suffix(".safetensors"), self._analysed
        schedule = f"list:{self.training.steps // 4},{self.training.steps}"
        steps = {
            **super().phases(),
            "watch": [
                Step("probe set of every kind", watched.exists, lambda: self._watch_kinds(watched))
            ],
            "truth": [
                self.replay_step(
                    *("true falls of every kind", self.reference, watched, self.truth),
                    *("--tokscale-probe-schedule", schedule),
                )
            ],
            "ideal": [
                Step("ideal scores", self._scores_file(IDEAL).exists, self._write_ideal_scores)
            ],
            "figures": [Step("figures of scores and plans", self._has(FIGURES), self._add_figures)],
            "analysed": [self.training_step(*run) for run in analysed],
            "spectra": [self._fit_step(*run) for run in analysed],
            "learned": [Step("learning times", self._has(LEARNED), self._add_learned)],
        }
        if LEARNED in self.ledger:
            steps |= {"analysed": [], "spectra": []}
        return {name: steps[name] for name in PHASES}

    def _has(self, name: str) -> Callable[[], bool]:
        return lambda: name in self.ledger

    # The truth

    @property
    def truth(self) -> Path:
        """The replay of the reference's checkpoints on documents of every kind."""
        return self.folder / "truth"

    def _watch_kinds(self, out: Path) -> None:
        n_documents = self.world.n_kinds * self.settings.watched_of_kind
        self.tokscale(
            out.stem,
            *("probe", "build", "--data-path", self.kinds_prefix, "--split", "0,100,0"),
            *("--seq-length", self.training.seq_length, "--vocab-size", self.world.vocab_size),
            *("--sequences", n_documents, "--out", out),
        )

    @cached_property
    def falls(self) -> TrueFalls:
        """The true falls from T / 4 to T, of the reference run."""
        run = Run.open(self.truth)
        first, last = (run.read_losses_at(int(step)) for step in run.step_K[[0, -1]])
        watched = Truth.load(self.kinds_prefix).of(run.probe_set)
        fall_N = (first - last).astype(np.float64)
        return true_falls(self.world, watched, fall_N, self._truth)

    @property
    def arms(self) -> Mapping[str, Arm]:
        return {IDEAL: Arm(("fall",), scores="scores-ideal", quantiles=_EVERY_VALUE), **ARMS}

    def _write_ideal_scores(self) -> None:
        """Write scores in which every document has the true fall of its kind."""
        fall_Q = self.falls.kind_G[self._truth.kind_Q].astype(np.float32)
        self._scores_file(IDEAL).parent.mkdir(parents=True, exist_ok=True)
        replace(self._scores(UNIFORM), fall_Q=fall_Q).save(self._scores_file(IDEAL))

    def _scores_file(self, arm: str) -> Path:
        return self.scores_of(arm) / f"{self.prefix.name}.tokscale.safetensors"

    def _scores(self, arm: str) -> DocumentScores:
        return DocumentScores.load(self._scores_file(arm))

    # Results

    def result_of(self, run: Path) -> dict[str, object]:
        found, end = Run.open(run), self.training.steps
        watched = self._truth.of(found.probe_set)
        loss_NK = found.read_losses().astype(np.float64)
        group_N = np.array(self.world.groups)[watched.kind_N]
        groups = {
            str(name): at_end(found.step_K, loss_NK[group_N == name].mean(axis=0), end).loss
            for name in np.unique(group_N)
        }
        return {
            "step": found.step_K,
            "loss": loss_NK.mean(axis=0),
            "object": loss_NK[watched.object_N].mean(axis=0),
            "groups": groups,
        }

    def _add_figures(self) -> None:
        """Add to the ledger how good the scores are, and what each plan gains to first order."""
        falls, kind_Q, scores = self.falls, self._truth.kind_Q, self._scores(UNIFORM)
        assert scores.fall_Q is not None
        fall_Q = scores.fall_Q.astype(np.float64)
        expected, printed = {}, {}
        for arm in self.training.arms:
            drawn = self._drawn(arm)
            expected[arm] = log_speedup(drawn.weight_Q, falls.document_Q[drawn.document_Q])
            printed[arm] = self.at_most(arm, self.training.seeds[0])
        reliability = scores.details.reliability["fall"]
        used = slice(*Plan.load(self.plan(UNIFORM, self.training.seeds[0])).documents[0])
        score_Q, of_kind_Q = fall_Q[used], falls.kind_G[kind_Q[used]]
        kinds, index_Q = np.unique(kind_Q[used], return_inverse=True)
        score_of_kind = np.bincount(index_Q, score_Q) / np.bincount(index_Q)
        self.ledger.add(
            FIGURES,
            {
                "fall_of_kind": falls.kind_G,
                "score_of_kind": dict(zip(map(str, kinds), score_of_kind, strict=True)),
                "rank_correlation": {
                    "documents": spearmanr(score_Q, of_kind_Q).statistic,
                    "kinds": spearmanr(score_of_kind, falls.kind_G[kinds]).statistic,
                },
                "reliability": reliability,
                "cv2": {
                    "true falls of documents": squared_variation(falls.document_Q[used]),
                    "true falls of kinds": squared_variation(of_kind_Q),
                    "scores": squared_variation(score_Q),
                    "true falls, by `score`": reliability.signal_variance / reliability.mean**2,
                },
                "links": links(self._drawn("fall"), falls, kind_Q, fall_Q),
                "expected": expected,
                "at_most": printed,
            },
        )

    def _drawn(self, arm: str) -> Drawn:
        plan = Plan.load(self.plan(arm, self.training.seeds[0]))
        samples = self.training.steps * self.training.batch
        return Drawn.by(plan, self._scores(arm), self.prefix, samples)

    def _fit_step(self, arm: str, seed: int) -> Step:
        run = self.run(arm, seed)
        done = RunPaths(run).fit.exists
        return Step(
            f"fit of {run.name}", done, lambda: self.tokscale(f"fit-{run.name}", "fit", run)
        )

    def _add_learned(self) -> None:
        """Run the verbs on a uniform run and a second seed, and add what they find."""
        run, *others = [self.run(*each) for each in self._analysed]
        source: list[Word] = ["--source", *others] if others else []
        self.tokscale("spectrum", "spectrum", run, *source)
        self.tokscale("laws", "laws", run)
        facts_a_step = float(self.training.batch * self.settings.corpus.triples)
        other = others[0] if others else None
        self.ledger.add(
            LEARNED, what_was_learned(run, other, self._truth, self.world, facts_a_step)
        )

    @cached_property
    def _truth(self) -> Truth:
        return Truth.load(self.prefix)


def squared_variation(value_Q: Floats) -> float:
    """Return CV^2: the variance over the squared mean."""
    return float(np.var(value_Q) / np.mean(value_Q) ** 2)


def main(words: Sequence[str] | None = None) -> None:
    about = __doc__.splitlines()[0]
    parser = study_parser(about, "quanta-run", "settings.json", PHASES)
    for name in ("junk", "boilerplate"):
        parser.add_argument(f"--{name}", type=float, help="share of the documents")
    given = parser.parse_args(words)
    with exit_with_one_line():
        folder = given.folder or Path("quanta-run")
        settings = Settings.load(given.settings or HERE / "settings.json")
        knobs = {name: getattr(given, name) for name in ("junk", "boilerplate")}
        knobs = {name: share for name, share in knobs.items() if share is not None}
        settings = replace(settings, corpus=replace(settings.corpus, **knobs))
        study = QuantaStudy.open(folder, settings, given.ledger or folder / "ledger.jsonl")
        run_study(study, given, lambda: report(settings.training, study.world, study.ledger))


if __name__ == "__main__":
    main()

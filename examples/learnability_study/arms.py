"""The study's steps: data, probe sets, a reference run, scores, plans, and a run per arm and seed.

A step whose result exists is skipped; a run that was killed resumes from its checkpoint.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from corpora import WEIGHTS, write_data

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, write_json
from megatron_tokscale.demo.job import is_trained
from megatron_tokscale.store.paths import RunPaths

SPLIT = "90,10,0"
METHOD = "frontier"
CONTROLS = ("uniform", "easy-first", "frequency")
# Variants of the method that were tried after the results of the arms above.
TRIED = {
    "strong": ("--strength", "4", "--floor", "0.1", "--max-change", "2"),
    "moved": ("--move-shares",),
}
ARMS = ("baseline", METHOD, *CONTROLS, *TRIED)
PHASES = ("none", "data", "probes", "baselines", "fit", "scores", "plans", "arms", "tried")
REFERENCE_SEED = 999
_LENGTH_OVER_T = 1.25  # all runs continue after T, so that slower ones can arrive too


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, data and training of all runs. All sizes are our choice, for two cores and an hour.

    Attributes:
        layers: layers of the model.
        hidden: width of a layer.
        seq_length: tokens of a sample.
        batch: samples of a step.
        steps: T, the step at which the baseline's loss is the target.
        learning_rate: constant after the warm-up.
        warmup: steps of the warm-up.
        vocab_size: tokens of the tokenizer that is trained on the text.
        characters: characters of each kind of text, of noise a fifth.
        probe_tokens: tokens that the arms' runs watch, about.
        probe_every: steps between their probes.
        reference_tokens: training tokens that the reference run watches, about.
        seeds: seeds of each arm.
    """

    layers: int = 2
    hidden: int = 96
    seq_length: int = 128
    batch: int = 16
    steps: int = 800
    learning_rate: float = 1.5e-3
    warmup: int = 40
    vocab_size: int = 1024
    characters: int = 6_000_000
    probe_tokens: int = 20_000
    probe_every: int = 20
    reference_tokens: int = 300_000
    seeds: int = 3

    @property
    def last_step(self) -> int:
        """Step at which all runs end."""
        return round(_LENGTH_OVER_T * self.steps)

    @property
    def train_samples(self) -> int:
        """Samples of a run."""
        return self.last_step * self.batch


@dataclass(frozen=True)
class Step:
    """A piece of work that is done once."""

    name: str
    is_done: Callable[[], bool]
    do: Callable[[], None]


@dataclass(frozen=True)
class Study:
    """The study's files, and the steps that make them."""

    folder: Path
    settings: Settings

    @classmethod
    def open(cls, folder: Path, settings: Settings) -> Self:
        """Begin a study in `folder`, or resume the one that it holds.

        Raises:
            TokscaleError: `folder` holds a study with other settings.
        """
        known = folder / "study.json"
        if not known.exists():
            write_json(known, asdict(settings))
        elif read_json(known) != asdict(settings):
            raise TokscaleError(
                f"{folder} holds a study with other settings; give another --folder"
            )
        return cls(folder, settings)

    @property
    def data(self) -> Path:
        """Folder of the datasets."""
        return self.folder / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all datasets."""
        return self.folder / "tokenizer.json"

    @property
    def reference(self) -> Path:
        """The reference run, which gives the learning times."""
        return self.folder / "reference"

    @property
    def data_path(self) -> list[str]:
        """Words of Megatron's --data-path."""
        return [word for name, w in WEIGHTS.items() for word in (str(w), str(self.data / name))]

    @property
    def scores(self) -> list[Path]:
        """The scores of each dataset's documents."""
        return [self.data / f"{name}.tokscale.safetensors" for name in WEIGHTS]

    def probe_set(self, part: str) -> Path:
        """Return the path of the probe set of the "train" or "valid" part."""
        return self.folder / f"probe-{part}.safetensors"

    def run_folder(self, arm: str, seed: int) -> Path:
        """Return the path of an arm's run."""
        return self.folder / f"{arm}-{seed}"

    def plan(self, arm: str, seed: int) -> Path:
        """Return the path of an arm's plan."""
        return self.folder / "plans" / f"{arm}-{seed}.json"

    def phases(self, until: str = PHASES[-1]) -> list[list[Step]]:
        """Return the steps up to a phase, phase by phase; a step needs earlier phases alone."""
        seeds = range(self.settings.seeds)
        planned = [(arm, seed) for seed in seeds for arm in (METHOD, *CONTROLS)]
        tried = [(arm, seed) for seed in seeds for arm in TRIED]
        data = Step("data", (self.data / "data.json").exists, self._write_data)
        score = Step("scores", lambda: all(map(Path.exists, self.scores)), self._score)
        fit = Step("fit of the reference", self._is_fitted, self._fit)
        baselines = [self._run_step("baseline", seed) for seed in seeds]
        phases = {
            "none": [],
            "data": [data],
            "probes": [self._probe_step("train"), self._probe_step("valid")],
            "baselines": [self._reference_step(), *baselines],
            "fit": [fit],
            "scores": [score],
            "plans": [self._plan_step(arm, seed) for arm, seed in [*planned, *tried]],
            "arms": [self._run_step(arm, seed) for arm, seed in planned],
            "tried": [self._run_step(arm, seed) for arm, seed in tried],
        }
        return [phases[name] for name in PHASES[: PHASES.index(until) + 1]]

    def _write_data(self) -> None:
        size = self.settings
        write_data(self.data, self.tokenizer, size.characters, size.vocab_size)

    def _probe_step(self, part: str) -> Step:
        size, out = self.settings, self.probe_set(part)
        tokens = size.reference_tokens if part == "train" else size.probe_tokens
        words = ["probe", "build", *self._data_flags(), "--vocab-size", size.vocab_size]
        words += ["--per-dataset", "proportional", "--eod", 0, "--tokens", tokens]
        words += ["--part", part, "--seed", 0, "--out", out]
        return Step(f"probe set of the {part} part", out.exists, lambda: self._tokscale(*words))

    def _reference_step(self) -> Step:
        run = self.reference
        schedule = "log:per-octave=6+last"
        flags = self._probe_flags("train", schedule)
        return Step(
            "reference run",
            lambda: is_trained(run, self.settings.last_step),
            lambda: self._train(run, REFERENCE_SEED, flags),
        )

    def _run_step(self, arm: str, seed: int) -> Step:
        run = self.run_folder(arm, seed)
        flags = self._probe_flags("valid", f"linear:{self.settings.probe_every}+last")
        if arm != "baseline":
            flags += ["--tokscale-plan", str(self.plan(arm, seed))]
        return Step(
            f"{arm}, seed {seed}",
            lambda: is_trained(run, self.settings.last_step),
            lambda: self._train(run, seed, flags),
        )

    def _is_fitted(self) -> bool:
        return is_trained(self.reference, self.settings.last_step) and (
            RunPaths(self.reference).fits.exists()
        )

    # The verbs of the loop

    def _fit(self) -> None:
        self._tokscale("fit", self.reference)

    def _score(self) -> None:
        data = ["--data-path", *self.data_path, "--split", SPLIT]
        # A step that was stopped between two datasets has left scores of the first one.
        self._tokscale("score", self.reference, *data, "--force")

    def _plan_step(self, arm: str, seed: int) -> Step:
        out = self.plan(arm, seed)
        flags = TRIED.get(arm, () if arm == METHOD else ("--control", arm))
        words = ["plan", "build", METHOD, *flags, *self._data_flags()]
        words += ["--train-samples", self.settings.train_samples, "--seed", seed, "--out", out]
        return Step(f"plan of {arm}, seed {seed}", out.exists, lambda: self._tokscale(*words))

    def _data_flags(self) -> list[str | int]:
        seq_length = self.settings.seq_length
        return ["--data-path", *self.data_path, "--split", SPLIT, "--seq-length", seq_length]

    def _tokscale(self, *words: str | int | Path) -> None:
        command = [sys.executable, "-m", "megatron_tokscale.cli", *map(str, words)]
        run_logged(command, self.folder / "verbs.log")

    # Training

    def _probe_flags(self, part: str, schedule: str) -> list[str]:
        probe_set = str(self.probe_set(part))
        return ["--tokscale-probe-set", probe_set, "--tokscale-probe-schedule", schedule]

    def _train(self, run: Path, seed: int, extra: Sequence[str]) -> None:
        command = [
            *(sys.executable, "-m", "megatron_tokscale.pretrain", "--tokscale-cpu"),
            *self._megatron_flags(seed),
            *("--save", str(run), "--load", str(run)),
            *extra,
        ]
        run_logged(command, run / "train.log")

    def _megatron_flags(self, seed: int) -> list[str]:
        size = self.settings
        model = {
            "--num-layers": size.layers,
            "--hidden-size": size.hidden,
            "--num-attention-heads": 4,
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
            "--train-iters": size.last_step,
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
            "--split": SPLIT,
            "--data-cache-path": self.folder / "cache",
            "--num-workers": 0,
            "--eval-interval": size.last_step,
            "--eval-iters": 1,
            "--log-interval": 20,
            "--save-interval": max(size.last_step // 4, 1),
            "--ckpt-format": "torch",
        }
        words = [str(word) for pair in (model | training | data).items() for word in pair]
        switches = ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
        return [*words, *switches, "--data-path", *self.data_path]


def run_logged(command: Sequence[str], log: Path) -> None:
    """Run a command in one process on one core, and append its output to `log`.

    Raises:
        TokscaleError: the command failed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        job = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if job.returncode:
        raise TokscaleError(f"exit code {job.returncode}; see the end of {log}")


def run_steps(phases: Iterable[Sequence[Step]], at_once: int) -> None:
    """Run the unfinished steps, phase by phase, `at_once` steps of a phase at a time.

    A step that fails does not stop the others of its phase.

    Raises:
        TokscaleError: naming the steps that failed; later phases are not begun.
    """
    for phase in phases:
        failed: list[str] = []

        def do(step: Step, failed: list[str] = failed) -> None:
            print(f"{step.name} ...", flush=True)
            try:
                step.do()
            except (TokscaleError, OSError) as error:
                failed.append(f"{step.name}: {error}")
            else:
                if not step.is_done():
                    failed.append(f"{step.name}: ended early")

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(do, [step for step in phase if not step.is_done()]))
        if failed:
            raise TokscaleError("; ".join(failed))

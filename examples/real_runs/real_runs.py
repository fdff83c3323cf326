"""Run the verbs on public losses of real models: Gemstone's items, and loss curves of others.

    python examples/real_runs/real_runs.py --data DIR --out FOLDER

DIR is a folder that `convert.py` beside this script writes; the repositories and commits are named
there. A part of DIR that is missing is left out. It takes three minutes of one core:

- gemstone_items: losses of the items of four tasks in 22 models. Each model and task becomes a run
  along T, so that a task has curves, noise and common shifts of its own. Four models are fitted;
  their spectra say what is measured and what is not, and their learning times are tested on each
  other. The ceiling of this test is one model's even checkpoints against its odd ones. All 22
  models together give the axis M; their last losses, imported as one matrix along M, give falls by
  task without a fit.
- olmo_ladder, multi_power_law: the laws of loss curves.
- zsl: loss deceleration.

The answers are printed, kept in FOLDER/logs, and summed up in FOLDER/tables.txt. A step with a log
is not run again: a script that was stopped resumes.

Shapes: N items, M models, K checkpoints.
"""

import argparse
import contextlib
import csv
import io
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tables import write_tables

from megatron_tokscale.cli.entry import main as verb
from megatron_tokscale.core.arrays import AnyArray
from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.core.files import write_text

REFERENCE = "2048x27"
"""The largest model but for one with more layers: the one whose items are predicted."""
SOURCES = ("1536x50", "3072x12", "512x16")
"""Models whose learning times are tested on the reference: two of about its size, a small one."""
HALVES = ("even", "odd")
OF_ITEMS = ("--documents", "item")
THRESHOLD = 3.0
"""Loss in nats at which an item of the matrix along M counts as learned: about the mean of
hellaswag in the middle models (our choice)."""
LADDER_SIZES = {"190M": 190_354_176, "370M": 371_262_464, "760M": 758_220_288, "1B": 1_279_395_840}
"""Parameters of the OLMo ladder's models, without embeddings."""
LADDER_LOSSES = ("c4_en", "pile")
CURVE_RESAMPLES = 50  # of the laws' intervals: a quarter of the default's minutes
MANIFEST = ["file", "name", "parameters"]  # columns of a manifest of curves


@dataclass(frozen=True)
class Steps:
    """The steps of this script.

    Attributes:
        out: folder of the results.
    """

    out: Path

    def log(self, name: str) -> Path:
        """Return the file of what a step printed."""
        return self.out / "logs" / f"{name}.txt"

    def run(self, name: str, *words: str | Path) -> None:
        """Run a verb, print and keep what it prints; do nothing if the step has a log.

        The result of a step that was stopped is removed before.
        """
        if self.log(name).is_file():
            return
        if "--out" in words:
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        print("\n$ megatron-tokscale", *words, flush=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            verb([*map(str, words)])
        print(printed.getvalue(), flush=True)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.log(name), printed.getvalue())


@dataclass(frozen=True)
class Items:
    """The item losses of one task.

    Attributes:
        task: name of the task.
        models: names of the models.
        size_M: their parameters without embeddings, 12 width^2 depth.
        tokens_K: training tokens at the checkpoints.
        loss_NMK: losses of the right answers, in nats.
    """

    task: str
    models: tuple[str, ...]
    size_M: AnyArray
    tokens_K: AnyArray
    loss_NMK: AnyArray

    @classmethod
    def read(cls, path: Path) -> "list[Items]":
        """Read the tasks of a gemstone_items.npz."""
        with np.load(path) as file:
            size_M = 12 * file["width_M"].astype(np.int64) ** 2 * file["depth_M"]
            models = tuple(str(name) for name in file["models"])
            tokens_K, task_N, loss_NMK = file["tokens_K"], file["task_N"], file["loss_NMK"]
            return [
                cls(str(name), models, size_M, tokens_K, loss_NMK[task_N == task])
                for task, name in enumerate(file["tasks"])
            ]

    def write(self, folder: Path) -> Path:
        """Write a matrix along T of each model, and of the reference's halves; return a manifest.

        Every item is a document of its own, so that intervals are over items.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rows = [["file", "name", "size"]]
        for m, model in enumerate(self.models):
            halves = {f"{model}-{half}": slice(k, None, 2) for k, half in enumerate(HALVES)}
            taken = {model: slice(None), **(halves if model == REFERENCE else {})}
            for name, part in taken.items():
                np.savez(
                    folder / f"{name}.npz",
                    loss_matrix=self.loss_NMK[:, m, part],
                    axis_values=self.tokens_K[part],
                    item=np.arange(len(self.loss_NMK)),
                )
                rows.append([f"{name}.npz", name, str(self.size_M[m])])
        return write_rows(folder / "runs.csv", rows)


def gemstone(path: Path, steps: Steps) -> None:
    """Run the verbs on the item losses."""
    tasks = Items.read(path)
    for items in tasks:
        runs, name = steps.out / "gemstone" / items.task, f"{items.task}-import"
        manifest = steps.out / "files" / items.task / "runs.csv"
        if not steps.log(name).is_file():
            items.write(manifest.parent)
        steps.run(
            name, "import", manifest, "--out", runs, *OF_ITEMS, "--axis", "T", "--unit", "tokens"
        )
        halves = [f"{REFERENCE}-{half}" for half in HALVES]
        for model in (REFERENCE, *SOURCES, *halves):
            steps.run(f"{items.task}-fit-{model}", "fit", runs / model)
        for model in SOURCES:
            steps.run(f"{items.task}-spectrum-{model}", "spectrum", runs / model)
        for model, sources in ((REFERENCE, SOURCES), (halves[1], halves[:1])):
            words = [runs / model, "--source", *(runs / source for source in sources)]
            steps.run(f"{items.task}-spectrum-{model}", "spectrum", *words)
        steps.run(
            f"{items.task}-axis",
            *("spectrum", "--axis", "M", *(runs / model for model in items.models)),
            *("--source", runs / REFERENCE, "--out", steps.out / "axis" / items.task),
        )
    last_losses(tasks, steps)


def last_losses(tasks: list[Items], steps: Steps) -> None:
    """Import the last checkpoints of all models as one matrix along M, and tell its falls."""
    file, run = steps.out / "files" / "sizes.npz", steps.out / "gemstone-sizes"
    n_items = [len(items.loss_NMK) for items in tasks]
    np.savez(
        file,
        loss_matrix=np.concatenate([items.loss_NMK[:, :, -1] for items in tasks]),
        axis_values=tasks[0].size_M,
        task=np.repeat([items.task for items in tasks], n_items),
        item=np.arange(sum(n_items)),
    )
    words = (*OF_ITEMS, "--axis", "M", "--unit", "parameters", "--datasets", "task")
    steps.run("sizes-import", "import", file, "--out", run, *words)
    steps.run("sizes-spectrum", "spectrum", run, "--threshold", str(THRESHOLD))


def ladder(folder: Path, steps: Steps) -> None:
    """Fit the laws of the OLMo ladder: smaller models predict 1B, shorter budgets the longest."""
    rows = (
        [str(path.resolve()), path.stem, str(LADDER_SIZES[path.stem.split("-")[0]])]
        for path in sorted(folder.glob("*xC*.csv"))
    )
    manifest = write_rows(steps.out / "files" / "ladder.csv", [MANIFEST, *rows])
    steps.run(
        "ladder-laws",
        *("laws", "--manifest", manifest, "--loss-column", *LADDER_LOSSES),
        *("--resamples", str(CURVE_RESAMPLES), "--out", steps.out / "laws" / "ladder"),
    )


def schedules(folder: Path, steps: Steps) -> None:
    """Fit the laws of the curves of Luo et al.: nine schedules at each of three sizes."""
    rows = (
        [str(path.resolve()), f"{size}M-{path.stem}", f"{size}000000"]
        for size in ("25", "100", "400")
        for path in sorted((folder / f"csv_{size}").glob("*.csv"))
    )
    manifest = write_rows(steps.out / "files" / "schedules.csv", [MANIFEST, *rows])
    steps.run(
        "schedules-laws",
        *("laws", "--manifest", manifest, "--resamples", str(CURVE_RESAMPLES)),
        *("--out", steps.out / "laws" / "schedules"),
    )


def write_rows(path: Path, rows: Iterable[list[str]]) -> Path:
    """Write a CSV, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


PARTS = {
    "gemstone_items/gemstone_items.npz": gemstone,
    "olmo_ladder": ladder,
    "multi_power_law": schedules,
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of `convert.py`'s files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    given = parser.parse_args(words)
    with exit_with_one_line():
        found = [name for name in PARTS if (given.data / name).exists()]
        if not found:
            raise TokscaleError(f"{given.data} has none of {', '.join(PARTS)}; run convert.py")
        for name in found:
            PARTS[name](given.data / name, Steps(given.out))
        print(write_tables(given.data, given.out))


if __name__ == "__main__":
    main()

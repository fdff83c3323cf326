"""Turn the raw files of public repositories into the files that `real_runs` reads.

    python examples/real_runs/convert.py --gemstone FOLDER --out DIR

Clone the repositories yourself, at these commits; nothing is fetched here:

    --gemstone  mcleish7/gemstone-scaling-laws, 5f42047: its folder benchmarks/bhagia_task_losses
    --olmo      allenai/OLMo-ladder, 67a3f44: its folder src/scripts/paper/data/ladder-runs
    --zsl       mirandrom/zsl, 07bfa79: its file analyses/01-deceleration/fig/bnsl_fit.json
    --mpl       thu-yao-01-luo/MultiPowerLaw, 8da9f19: its folder with csv_25, csv_100 and csv_400

Shapes: N items, M models, K checkpoints.
"""

import argparse
import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line

TASKS = ("arcc", "hellaswag", "piqa", "winogrande")
_MODEL = re.compile(r"Gemstone-(\d+)x(\d+)")
_STEP = re.compile(r"step_(\d+)")
_LAST_STEP = 83_450  # of the folder "main", the final model
_STEPS_PER_CHECKPOINT, _TOKENS_PER_CHECKPOINT = 2385, 10_000_000_000
_LOSS = re.compile(r"eval/(.+)-validation/CrossEntropyLoss")
_LADDER_RUN = re.compile(r"\d+[MB]-[\d.]+xC(-rerun)?\.csv")
_RENAMED = {
    "_step": "step",
    "throughput/total_tokens": "tokens",
    "optim/learning_rate_group0": "learning_rate_group0",
    "learning_rate_peak": "learning_rate_peak",
}


def gemstone(folder: Path, out: Path) -> None:
    """Write gemstone_items.npz: the loss of every item of four tasks, by model and checkpoint."""
    models = sorted(
        (int(match[1]), int(match[2]), path)
        for path in folder.iterdir()
        if (match := _MODEL.fullmatch(path.name))
    )
    if not models:
        raise TokscaleError(f"{folder} has no folder Gemstone-WIDTHxDEPTH; give another --gemstone")
    step_K = _checkpoints(models[0][2])
    loss_NMK = np.stack([_losses(path, step_K) for _, _, path in models], axis=1)
    items = [len(_items(models[0][2] / "main", task)) for task in TASKS]
    target = out / "gemstone_items" / "gemstone_items.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        target,
        loss_NMK=loss_NMK.astype(np.float16),
        task_N=np.repeat(np.arange(len(TASKS), dtype=np.int8), items),
        tasks=np.array(TASKS),
        models=np.array([f"{width}x{depth}" for width, depth, _ in models]),
        width_M=np.array([width for width, _, _ in models], np.int32),
        depth_M=np.array([depth for _, depth, _ in models], np.int32),
        step_K=step_K,
        tokens_K=_TOKENS_PER_CHECKPOINT * -(-step_K // _STEPS_PER_CHECKPOINT),
    )
    print(f"{target}: {loss_NMK.shape} items x models x checkpoints")


def _checkpoints(model: Path) -> np.ndarray:
    steps = [int(match[1]) for path in model.iterdir() if (match := _STEP.fullmatch(path.name))]
    return np.array([*sorted(steps), _LAST_STEP], np.int64)


def _losses(model: Path, step_K: np.ndarray) -> np.ndarray:
    """Return loss_NK of one model, the tasks one after the other."""
    columns = []
    for step in step_K:
        folder = model / ("main" if step == _LAST_STEP else f"step_{step:08d}")
        columns.append(np.concatenate([_items(folder, task) for task in TASKS]))
    return np.stack(columns, axis=1)


def _items(folder: Path, task: str) -> np.ndarray:
    """Return the losses in nats of a task's items at one checkpoint: of its parts, in order."""
    path = folder / f"losses_{task}.json"
    try:
        parts = json.loads(path.read_text(encoding="utf-8")).values()
    except (OSError, ValueError) as error:
        raise TokscaleError(f"cannot read {path} ({error}); clone the repository again") from error
    return np.concatenate([np.array(part) for part in parts])


def olmo(folder: Path, out: Path) -> None:
    """Write olmo_ladder/SIZE-BUDGETxC.csv: step, tokens, learning rate and losses by dataset."""
    files = sorted(path for path in folder.iterdir() if _LADDER_RUN.fullmatch(path.name))
    if not files:
        raise TokscaleError(f"{folder} has no SIZE-BUDGETxC.csv; give another --olmo")
    target = out / "olmo_ladder"
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        with path.open(newline="", encoding="utf-8") as source:
            rows = list(csv.DictReader(source))
        names = {
            column: _RENAMED.get(column) or (match[1] if (match := _LOSS.fullmatch(column)) else "")
            for column in rows[0]
        }
        kept = {column: name for column, name in names.items() if name}
        with (target / path.name).open("w", newline="", encoding="utf-8") as written:
            table = csv.writer(written)
            table.writerow(kept.values())
            table.writerows([row[column] for column in kept] for row in rows)
    print(f"{target}: {len(files)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--gemstone", "--olmo", "--zsl", "--mpl"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with exit_with_one_line():
        if given.gemstone:
            gemstone(given.gemstone, given.out)
        if given.olmo:
            olmo(given.olmo, given.out)
        if given.zsl:
            (given.out / "zsl").mkdir(parents=True, exist_ok=True)
            shutil.copy(given.zsl, given.out / "zsl" / "bnsl_fit.json")
        if given.mpl:
            for folder in sorted(given.mpl.glob("csv_*")):
                shutil.copytree(folder, given.out / "multi_power_law" / folder.name)


if __name__ == "__main__":
    main()

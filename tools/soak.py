"""Kill a training job again and again at random times, and check its probes.

    make soak                                     # 100 kills; goes on where it was stopped
    PYTHONPATH=tests/support python tools/soak.py --kills 100 --seed 0 --folder soak-run

A small pipeline-parallel job probes after every step and checkpoints every few. Each life starts
from the last checkpoint and gets SIGKILL on all of its processes at a random moment: in two of ten
lives during start-up, else within seconds of its first step. After each kill every losses file must
be whole and none missing up to the last checkpoint; at the end no step is probed twice on one
branch, none is missing, and the losses are those of an undisturbed job, to the bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from jobs import Corpus, job_environment, job_flags, make_corpus, run_job, torchrun
from runs import read_journal

from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.losses import list_losses, read_losses

STEPS_PER_KILL = 20
SAVE_INTERVAL = 5
_LONGEST_LIFE = 2.0  # seconds after the first step: some steps and checkpoints of a small job
_START_UP = 8.0  # seconds of start-up in which a job may be killed: imports, then Megatron


def soak(folder: Path, corpus: Corpus, n_kills: int, seed: int) -> list[dict[str, object]]:
    """Run the job to its end through `n_kills` kills; return one row per life.

    Raises:
        AssertionError: something was lost, doubled or changed.
    """
    n_steps = STEPS_PER_KILL * n_kills
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    flags = _flags(corpus, n_steps)
    if not RunPaths(undisturbed).folder.exists():
        run_job(corpus, 2, *flags, "--tokscale-dir", str(undisturbed))
    flags = (*flags, "--save", str(killed), "--load", str(killed))
    state = folder / "lives.json"
    lives = json.loads(state.read_text()) if state.exists() else []
    while len(lives) < n_kills:
        life = _one_life(corpus, flags, folder / "log", np.random.default_rng([seed, len(lives)]))
        lives.append(life | _check_after_kill(killed))
        state.write_text(json.dumps(lives))
        _remove_old_checkpoints(killed)
        print(f"kill {len(lives)} of {n_kills}: {lives[-1]}", flush=True)
    run_job(corpus, 2, *flags)
    _check_at_the_end(killed, undisturbed, n_steps)
    return lives


def _flags(corpus: Corpus, n_steps: int) -> tuple[str, ...]:
    return (
        *("--pipeline-model-parallel-size", "2", "--save-interval", str(SAVE_INTERVAL)),
        *("--train-iters", str(n_steps), "--lr-decay-iters", str(n_steps)),
        *("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1"),
    )


def _one_life(
    corpus: Corpus, flags: tuple[str, ...], log: Path, generator: np.random.Generator
) -> dict[str, object]:
    """Start the job and kill all of it at a random moment."""
    in_start_up = bool(generator.random() < 0.2)
    wait = float(generator.uniform(0, _START_UP if in_start_up else _LONGEST_LIFE))
    target = ["-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags)]
    with log.open("w") as output:
        job = subprocess.Popen(
            torchrun(2, target), env=job_environment(), stdout=output, stderr=output
        )
    deadline = time.monotonic() + 300
    while not in_start_up and "elapsed time per iteration" not in log.read_text():
        assert job.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)
    time.sleep(wait)
    assert job.poll() is None, f"it ended before it was killed: {log.read_text()[-4000:]}"
    launcher = psutil.Process(job.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()
    job.wait()
    return {"start-up": in_start_up, "wait": round(wait, 3)}


def _check_after_kill(killed: Path) -> dict[str, object]:
    files = list_losses(RunPaths(killed).losses)
    for path in files.values():
        read_losses(path)  # raises for a file that is not whole
    tracker = killed / "latest_checkpointed_iteration.txt"
    saved = int(tracker.read_text()) if tracker.exists() else 0
    missing = set(range(saved + 1 if saved else 0)) - set(files)
    assert not missing, f"checkpoint {saved} is saved without the losses of {sorted(missing)}"
    return {"checkpoint": saved, "last probe": max(files, default=-1)}


def _remove_old_checkpoints(killed: Path) -> None:
    for path in sorted(killed.glob("iter_*"))[:-3]:
        shutil.rmtree(path)


def _check_at_the_end(killed: Path, undisturbed: Path, n_steps: int) -> None:
    found, expected = Run.open(killed), Run.open(undisturbed)
    found.verify()
    assert found.step_K.tolist() == list(range(n_steps + 1))
    assert np.array_equal(found.read_losses(), expected.read_losses())
    for left, right in zip(found.records, expected.records, strict=True):
        assert (left.consumed_samples, left.lr_sum) == (right.consumed_samples, right.lr_sum)
    assert not list(RunPaths(killed).folder.rglob(".*.tmp"))
    probed: set[int] = set()
    for event in read_journal(killed):
        if event["event"] == "started":
            probed -= set(event["abandoned"])
        elif event["event"] == "probe":
            assert event["step"] not in probed, f"step {event['step']} was probed twice"
            probed.add(event["step"])
    assert probed <= set(found.step_K.tolist())


def main() -> None:
    """Run the soak that the command line describes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("soak-run"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder.resolve()
    if not (folder / "probe.safetensors").exists():
        make_corpus(folder)
    corpus = Corpus((str(folder / "left"), str(folder / "right")), folder / "probe.safetensors")
    lives = soak(folder, corpus, arguments.kills, arguments.seed)
    redone = [int(str(life["last probe"])) - int(str(life["checkpoint"])) for life in lives]
    print(
        f"{len(lives)} kills ({sum(bool(life['start-up']) for life in lives)} during start-up), "
        f"{STEPS_PER_KILL * arguments.kills} steps, {sum(n for n in redone if n > 0)} probes set "
        "aside and taken again: no partial file, none missing, none twice, all losses identical"
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    sys.exit(main())

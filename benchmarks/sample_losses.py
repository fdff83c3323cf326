"""Time per step with --tokscale-sample-losses, over that without it.

    python benchmarks/sample_losses.py [--size cpu|gpu] [--jobs N] [--blocks N] [--ledger FILE]
        [--out FILE]

Within one job recording is on and off in turns, for blocks of as many steps as the log interval, so
both sides have the same machine and the same minutes. The recorder's wrapper of the loss function,
its flush and its file are in the blocks that record; in the others the loss function is Megatron's
own. The ratio is that of the median times of the two kinds of blocks in a job. With a ledger a
benchmark that was stopped resumes with the next job. The recorder's time on the host per step is
the time of the loss function with recording less that without it, and the flush: the noise of the
machine hides it less.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from probe_cost import SIZES, run_job
from random_probe_set import random_probe_set
from resumable import Lines
from table import heading, markdown

_ROOT = Path(__file__).parent.parent
_MARK = "sample_losses: "
_WARM_BLOCKS = 1
_BLOCK = 10  # steps between two flushes, as with --log-interval 10


def measured_job(size_name, number, n_blocks):
    """Return the result of one job: seconds per step of each block, and in the recorder."""
    size = {**SIZES[size_name], "steps": _BLOCK * n_blocks}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = int(size["model"].split("--seq-length ")[1].split()[0])
        random_probe_set(2, length, size["vocabulary"]).save(folder / "probe.safetensors")
        flags = ["--tokscale-probe-set", str(folder / "probe.safetensors"), "--tokscale-dir"]
        flags += [str(folder / "run"), "--tokscale-probe-schedule", "list:0"]
        flags += ["--tokscale-sample-losses", "--log-interval", str(_BLOCK)]
        script = ["-m", "megatron_tokscale.run", str(Path(__file__).resolve())]
        paths = [str(_ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SAMPLE_LOSSES_JOB": str(number)}
        output = run_job(size, folder, script, *flags, **env)
    lines = [line.split(_MARK)[1] for line in output.splitlines() if _MARK in line]
    return json.loads(lines[0]) if lines else sys.exit(output[-6000:])


def inside():
    """Train with recording on in every second block, and print the times of a rank that records."""
    import torch

    from megatron_tokscale import pretrain
    from megatron_tokscale.training.samples import recorder

    first_on = int(os.environ["SAMPLE_LOSSES_JOB"]) % 2
    on_step, seen = recorder.SampleRecorder.on_step, recorder.SampleRecorder._seen
    blocks, spent = [], {"loss": 0.0, "plain": 0.0, "flush": 0.0}
    clock = {"start": 0.0}

    def is_on(step):
        return step // _BLOCK % 2 == first_on

    def switched_seen(self, loss_func):
        # With recording and without it the loss function is timed alike, on the host.
        is_recording = is_on(self._step)
        called = seen(self, loss_func) if is_recording else loss_func

        def timed(output, *args, **kwargs):
            started = time.perf_counter()
            result = called(output, *args, **kwargs)
            spent["loss" if is_recording else "plain"] += time.perf_counter() - started
            return result

        return timed

    def timed_on_step(self, state):
        started = time.perf_counter()
        on_step(self, state)
        spent["flush"] += time.perf_counter() - started
        if state.step % _BLOCK == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            blocks.append((is_on(state.step - 1), (now - clock["start"]) / _BLOCK))
            clock["start"] = now

    recorder.SampleRecorder._seen = switched_seen
    recorder.SampleRecorder.on_step = timed_on_step
    pretrain.main()
    if recorder.has_losses():
        kept = blocks[_WARM_BLOCKS:]
        on, off = ([t for is_it, t in kept if is_it == kind] for kind in (True, False))
        n_on = _BLOCK * sum(is_it for is_it, _ in blocks)
        n_off = _BLOCK * len(blocks) - n_on
        host = (spent["flush"] + spent["loss"]) / n_on - spent["plain"] / n_off
        print(_MARK + json.dumps({"on": on, "off": off, "host": host}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=21, help="blocks of 10 steps in a job")
    parser.add_argument("--ledger", type=Path, help="finished jobs are kept here, and read again")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    size, n_blocks = arguments.size, arguments.blocks
    with tempfile.TemporaryDirectory() as name:
        lines = Lines(arguments.ledger or Path(name) / "jobs.jsonl")
        results = [
            lines.once((size, n_blocks, number), measured_job, size, number, n_blocks)
            for number in range(arguments.jobs)
        ]
    text = report(size, results)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def report(size_name, results) -> str:
    import megatron.core
    import torch

    ratio = np.array([np.median(row["on"]) / np.median(row["off"]) for row in results])
    error = f"{ratio.std(ddof=1) / len(ratio) ** 0.5:.4f}" if len(ratio) > 1 else "one job"
    off = np.median(np.concatenate([row["off"] for row in results]))
    host = np.array([row["host"] for row in results])
    rows = [
        ["step without recording, median, ms", f"{1000 * off:.1f}"],
        ["**step with recording / without**, mean of the jobs", f"**{ratio.mean():.4f}**"],
        ["its standard error over jobs", error],
        ["the ratios of the jobs", ", ".join(f"{value:.4f}" for value in ratio)],
        ["the recorder's time on the host, ms a step", f"{1000 * np.median(host):.3f}"],
        ["the same as a share of a step", f"{100 * np.median(host) / off:.2f}%"],
    ]
    versions = {"megatron-core": megatron.core.__version__, "torch": torch.__version__}
    note = f"`{SIZES[size_name]['model']}`; jobs: {len(results)}. Goal: a ratio of at most 1.005."
    return "\n".join([heading(**versions), note, "", markdown(["", "value"], rows)])


if __name__ == "__main__":
    inside() if "SAMPLE_LOSSES_JOB" in os.environ else main()

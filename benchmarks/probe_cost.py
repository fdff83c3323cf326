"""Cost of a probe in a training job, beside Megatron's own evaluation of as many tokens.

    python benchmarks/probe_cost.py [--size cpu|gpu] [--rounds N] [--out FILE]

In one job (TP2 x PP2 on the CPU; one rank in bf16 with the distributed optimizer and overlapped
gathering on a GPU) after some steps, in turns: Megatron's `evaluate()` as its training loop calls
it, and a probe of the same number of sequences, from its barrier to its metrics; the writing, in a
thread beside the training, is timed separately. Then the step time with the plugin on and no probe
due over that with the plugin off: from the logs of jobs run in turns, and as the time that the
plugin's own hooks take between two steps, which the noise of the machine does not hide.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_probe_set import random_probe_set
from table import heading, markdown

_ROOT = Path(__file__).parent.parent
_MARK = "probe_cost: "
_WARM_STEPS = 3

SIZES = {
    "cpu": {
        "processes": 4,
        "model": "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 "
        "--max-position-embeddings 256 --micro-batch-size 2 --global-batch-size 8 "
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --tokscale-cpu",
        "vocabulary": 8191,
        "sequences": 32,
        "steps": 24,
    },
    "gpu": {
        "processes": 1,
        "model": "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 32 --bf16 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
        "--no-persist-layer-norm --no-rope-fusion",
        "vocabulary": 50303,
        "sequences": 128,
        "steps": 40,
    },
}
_TRAINING = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --lr 1e-4 --lr-decay-style constant --eval-iters 1 "
    "--eval-interval 100000 --log-interval 1 --num-workers 0 --tokenizer-type NullTokenizer "
    "--attention-dropout 0 --hidden-dropout 0 --mock-data --split 90,10,0"
)


def run_job(size: dict[str, Any], folder: Path, script: list[str], *extra: str, **env: str) -> str:
    """Run a job to its end and return its output."""
    steps = ["--train-iters", str(size["steps"]), "--vocab-size", str(size["vocabulary"])]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(size["processes"])]
    words = [*launch, *script, *size["model"].split(), *_TRAINING.split(), *steps, *extra]
    on_cpu = {"CUDA_VISIBLE_DEVICES": ""} if "--tokscale-cpu" in size["model"] else {}
    job = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        | on_cpu
        | {"PYTHONWARNINGS": "ignore", **env},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if job.returncode != 0:
        sys.exit(job.stdout[-6000:])
    return job.stdout


def step_times(output: str) -> list[float]:
    """Return milliseconds per step, from Megatron's log, without the first steps."""
    found = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)
    return [float(text) for text in found][_WARM_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="evaluations and probes in turn")
    parser.add_argument("--jobs", type=int, default=3, help="jobs with and without, in turns")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    import megatron.core
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = int(re.search(r"--seq-length (\d+)", size["model"])[1])
        probe_set = random_probe_set(size["sequences"], length, size["vocabulary"])
        probe_set.save(folder / "probe.safetensors")
        probe = ["--tokscale-probe-set", str(folder / "probe.safetensors")]
        measured = json.loads(_measure_inside(size, folder, probe, arguments.rounds))
        off: list[float] = []
        on: list[float] = []
        plain = [*size["model"].replace(" --tokscale-cpu", "").split()]
        script = ["-m", "megatron_tokscale.pretrain"]
        for number in range(arguments.jobs):
            without = {**size, "model": " ".join(plain)}
            use_cpu = {"MEGATRON_TOKSCALE_CPU": "1"} if plain != size["model"].split() else {}
            if use_cpu:
                use_cpu["CUDA_VISIBLE_DEVICES"] = ""
            off += step_times(run_job(without, folder, script, **use_cpu))
            run = [
                "--tokscale-dir",
                str(folder / f"on{number}"),
                "--tokscale-probe-schedule",
                "list:0",
            ]
            on += step_times(run_job(size, folder, script, *probe, *run))
    text = _report(size, measured, off, on, megatron.core.__version__, torch.__version__)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def _measure_inside(size: dict[str, Any], folder: Path, probe: list[str], rounds: int) -> str:
    run = ["--tokscale-dir", str(folder / "run"), "--tokscale-probe-schedule", "list:0"]
    script = ["-m", "megatron_tokscale.run", str(Path(__file__).resolve())]
    paths = [str(_ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    inside = {"PROBE_COST_ROUNDS": str(rounds), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    output = run_job(size, folder, script, *probe, *run, **inside)
    lines = [line for line in output.splitlines() if _MARK in line]
    return lines[0].split(_MARK)[1] if lines else sys.exit(output[-6000:])


def _report(
    size: dict[str, Any],
    measured: dict[str, Any],
    off: list[float],
    on: list[float],
    *versions: str,
) -> str:
    evaluations, probes = np.array(measured["evaluate"]), np.array(measured["probe"])
    ratios = probes / evaluations
    low, high = np.quantile(ratios, [0.25, 0.75])
    step = float(np.median(off)) / 1e3
    hooks = measured["hooks"]
    rows = [
        ["Megatron's evaluate(), s", f"{np.median(evaluations):.3f}", ""],
        ["probe, s", f"{np.median(probes):.3f}", ""],
        ["**probe / evaluate()**", f"**{np.median(ratios):.3f}**", f"{low:.3f} to {high:.3f}"],
        ["writing the losses, on its thread, s", f"{np.median(measured['write']):.4f}", ""],
        ["step with the plugin off, ms", f"{1e3 * step:.1f}", f"{len(off)} steps"],
        [
            "step with the plugin on and no probe due / off",
            f"{np.median(on) / np.median(off):.4f}",
            f"{len(on)} steps; quartiles of one job set {_spread(off)}",
        ],
        ["the plugin's hooks between two steps, microseconds", f"{1e6 * hooks:.1f}", ""],
        ["**(step + hooks) / step**", f"**{1 + hooks / step:.6f}**", ""],
        ["peak memory, evaluate(), MiB", f"{measured['peak'][0]:.1f}", measured["memory"]],
        ["peak memory, probe, MiB", f"{measured['peak'][1]:.1f}", measured["memory"]],
    ]
    core, torch_version = versions
    length = int(re.search(r"--seq-length (\d+)", size["model"])[1])
    return "\n".join(
        [
            heading(**{"megatron-core": core, "torch": torch_version}),
            f"`{size['model']}`; {size['sequences']} sequences, "
            f"{size['sequences'] * length} tokens per probe and per evaluation",
            "",
            markdown(["", "median", "quartiles, or remarks"], rows),
        ]
    )


def _spread(values: list[float]) -> str:
    low, high = np.quantile(values, [0.25, 0.75]) / np.median(values)
    return f"{low:.3f} to {high:.3f}"


class Inside:
    """The measurement in the job: it takes the place of the step after the warm ones."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.prober: Any = None
        self.train: tuple[Any, ...] = ()

    def install(self) -> None:
        from megatron.training import training

        from megatron_tokscale.training.probe.prober import Prober

        start, train, step = (
            Prober.on_train_start,
            training.train,
            training.post_training_step_callbacks,
        )

        def note_prober(prober: Prober, *args: Any) -> None:
            self.prober = prober
            start(prober, *args)

        def note_train(*args: Any, **kwargs: Any) -> Any:
            self.train = args
            return train(*args, **kwargs)

        def measure(model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> Any:
            result = step(model, optimizer, scheduler, iteration, *rest)
            if iteration == _WARM_STEPS:
                self.measure(model, optimizer, scheduler)
            return result

        Prober.on_train_start = note_prober  # type: ignore[method-assign]
        training.train = note_train
        training.post_training_step_callbacks = measure

    def measure(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        import torch
        from megatron.training import get_args, print_rank_0, training

        from megatron_tokscale.training.events import TrainingState

        args = get_args()
        forward_step, *_, valid, process, config = self.train[:8]
        n_evaluations = -(-self.prober.probe_set.n_sequences // args.global_batch_size)

        def state_at(step: int) -> TrainingState:
            return TrainingState(
                step=step,
                consumed_samples=int(args.consumed_train_samples),
                args=args,
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                forward_step=forward_step,
            )

        def evaluate() -> None:
            hooks = training.should_disable_forward_pre_hook(args)
            if hooks:
                training.disable_forward_pre_hook(model, optimizer)
            training.evaluate(forward_step, valid, model, process, config, eval_iters=n_evaluations)
            if hooks:
                training.enable_forward_pre_hook(model)

        def probe() -> None:
            self.prober.take(state_at(_WARM_STEPS + turn))

        def timed(action: Any) -> float:
            torch.cuda.synchronize()
            torch.distributed.barrier()
            started = time.perf_counter()
            action()
            torch.cuda.synchronize()
            torch.distributed.barrier()
            return time.perf_counter() - started

        turn = 0
        peaks = [_peak_memory(evaluate), _peak_memory(probe)]
        times: dict[str, Any] = {"evaluate": [], "probe": [], "write": []}
        for turn in range(1, self.rounds + 1):  # noqa: B007 - probe() names its step after it
            times["evaluate"].append(timed(evaluate))
            times["probe"].append(timed(probe))
            times["write"].append(timed(self.prober.wait_for_losses))
        n_calls = 1000
        started = time.perf_counter()
        for _ in range(n_calls):
            self.prober.on_log({})
            self.prober.on_step(state_at(args.iteration + 7))
        hooks = (time.perf_counter() - started) / n_calls
        kind = (
            "allocated on the device" if torch.version.cuda and _has_gpu() else "resident, rank 0"
        )
        print_rank_0(_MARK + json.dumps(times | {"hooks": hooks, "peak": peaks, "memory": kind}))


def _has_gpu() -> bool:
    from megatron_tokscale import cpu

    return not cpu.is_enabled()


def _peak_memory(action: Any) -> float:
    """Return the peak in MiB: of the device, or the process's high-water mark so far."""
    import torch

    if _has_gpu():
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() / 2**20
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    if "PROBE_COST_ROUNDS" in os.environ:
        from megatron_tokscale.pretrain import main as pretrain

        Inside(int(os.environ["PROBE_COST_ROUNDS"])).install()
        pretrain()
    else:
        main()

"""The machine of the check: its sizes, its environment, and Megatron jobs that run on it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from random_probe_set import random_probe_set

from megatron_tokscale.probe import ProbeSet

_ROOT: Final = Path(__file__).parents[2]
_AT_ONCE: Final = 4
"""Jobs that share the GPU. Our choice: most of their time is their start, on one core each."""
_TIME_LIMIT: Final = 240
"""Seconds after which a job counts as hung. Our choice: ten times the duration of a job."""

PRETRAIN: Final = ("-m", "megatron_tokscale.pretrain")
INSPECT: Final = ("-m", "gpu_check.inspect_job")

_DETERMINISTIC: Final = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


@dataclass(frozen=True)
class Size:
    """Sizes of the jobs' model and of its probe set."""

    layers: int
    hidden: int
    heads: int
    length: int
    vocabulary: int
    micro_batch: int
    sequences: int

    def flags(self) -> dict[str, str]:
        """Return Megatron's flags of the model and its training on random data."""
        return {
            "--num-layers": str(self.layers),
            "--hidden-size": str(self.hidden),
            "--num-attention-heads": str(self.heads),
            "--seq-length": str(self.length),
            "--max-position-embeddings": str(self.length),
            "--position-embedding-type": "rope",
            "--normalization": "RMSNorm",
            "--swiglu": "",
            "--disable-bias-linear": "",
            "--untie-embeddings-and-output-weights": "",
            "--tokenizer-type": "NullTokenizer",
            "--vocab-size": str(self.vocabulary),
            "--micro-batch-size": str(self.micro_batch),
            "--global-batch-size": str(4 * self.micro_batch),
            "--train-iters": "10",
            "--lr": "1e-3",
            "--lr-decay-style": "constant",
            "--eval-interval": "1000",
            "--eval-iters": "1",
            "--log-interval": "1",
            "--num-workers": "0",
            "--mock-data": "",
            "--split": "90,10,0",
            "--ckpt-format": "torch_dist",
        }


TOY: Final = Size(2, 32, 4, 32, 255, 2, 9)
SMALL: Final = Size(8, 512, 8, 1024, 8191, 2, 18)
LONG: Final = Size(4, 1024, 8, 4096, 128255, 1, 8)
"""Sequence length and vocabulary of a 6B model's job."""

# Without Transformer Engine and apex, as on a machine that has only wheels of megatron-core.
_LOCAL: Final = {
    "--transformer-impl": "local",
    "--no-persist-layer-norm": "",
    "--no-gradient-accumulation-fusion": "",
    "--no-masked-softmax-fusion": "",
    "--no-rope-fusion": "",
}
OVERLAPS: Final = {
    "--use-distributed-optimizer": "",
    "--overlap-grad-reduce": "",
    "--overlap-param-gather": "",
    # The other format keeps the padding between parameters, which nothing has written.
    "--dist-ckpt-optim-fully-reshardable": "",
}


@dataclass(frozen=True)
class Job:
    """A Megatron job.

    Attributes:
        flags: Megatron's and the plugin's flags; an empty value is a flag without one.
        target: script, or `-m` and module, with which Python starts each rank.
        ranks: processes, one per GPU.
        environment: variables besides those of the site.
        kill_at: text of the output at which the job gets `kill_by`; None: it runs to its end.
        kill_by: signal.
    """

    flags: Mapping[str, str]
    target: Sequence[str] = PRETRAIN
    ranks: int = 1
    environment: Mapping[str, str] | None = None
    kill_at: str | None = None
    kill_by: signal.Signals = signal.SIGTERM


@dataclass(frozen=True)
class Ended:
    """An ended job: its exit code and its output."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        """The last line of the output that has text."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class Site:
    """The machine of the check.

    Attributes:
        folder: folder of the check's files.
        on_cpu: True if the check itself is run, at toy sizes with Megatron on the CPU.
        gpus: number of GPUs.
    """

    folder: Path
    on_cpu: bool
    gpus: int

    @property
    def size(self) -> Size:
        """Sizes of the jobs' model."""
        return TOY if self.on_cpu else SMALL

    @property
    def long(self) -> Size:
        """Sizes of a job with a 6B model's sequences and vocabulary."""
        return TOY if self.on_cpu else LONG

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cpu" if self.on_cpu else "cuda"

    def training(self, size: Size | None = None) -> dict[str, str]:
        """Return flags of a deterministic job in bfloat16 with dropout and all overlaps."""
        flags = (size or self.size).flags() | OVERLAPS
        flags |= {"--attention-dropout": "0.1", "--hidden-dropout": "0.1"}
        if self.on_cpu:
            return flags | {"--tokscale-cpu": ""}
        return flags | _LOCAL | {"--bf16": "", "--deterministic-mode": ""}

    def probe(self, schedule: str, size: Size | None = None) -> dict[str, str]:
        """Return the flags of a job that probes random sequences."""
        size = size or self.size
        path = self.folder / f"probe-{size.length}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            probe_set_of(size).save(path)
        return {"--tokscale-probe-set": str(path), "--tokscale-probe-schedule": schedule}

    def run_all(self, jobs: Mapping[str, Job]) -> dict[str, Ended]:
        """Run jobs, several at a time, each in its own folder, and return how each ended."""
        at_once = 1 if self.on_cpu or any(job.ranks > 1 for job in jobs.values()) else _AT_ONCE
        with ThreadPoolExecutor(at_once) as pool:
            ended = pool.map(lambda item: self.run(item[0], item[1]), jobs.items())
            return dict(zip(jobs, ended, strict=True))

    def run(self, name: str, job: Job) -> Ended:
        """Run a job in the folder `name`, and keep its output there."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        words = [word for flag in job.flags.items() for word in flag if word]
        if job.ranks > 1:
            ports = ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
            launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(job.ranks), *ports]
            command = [sys.executable, *launch, *job.target, *words]
        else:
            command = [sys.executable, *job.target, *words]
        log = folder / "output.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env=self._environment(job),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )
            code = _wait(process, log, job)
        return Ended(code, log.read_text(errors="replace"))

    def run_script(self, name: str, words: Sequence[str], **environment: str) -> Ended:
        """Run a Python script of the checkout to its end."""
        job = Job({}, words, environment=environment)
        return self.run(name, job)

    def _environment(self, job: Job) -> dict[str, str]:
        paths = [str(_ROOT), *(str(_ROOT / each) for each in ("tools", "benchmarks"))]
        paths += [str(_ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return {
            **os.environ,
            **(_DETERMINISTIC if not self.on_cpu else {"CUDA_VISIBLE_DEVICES": ""}),
            **(alone if job.ranks == 1 else {}),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **(job.environment or {}),
        }


def _wait(process: subprocess.Popen[bytes], log: Path, job: Job) -> int:
    """Wait for a job, kill it at `kill_at` or if it hangs, and return its exit code."""
    deadline = time.monotonic() + _TIME_LIMIT
    is_killed = job.kill_at is None
    while (code := process.poll()) is None:
        if not is_killed and job.kill_at in log.read_text(errors="replace"):
            # A signal to end is the rank's alone: it still needs its checkpoint's writer.
            send = os.killpg if job.kill_by == signal.SIGKILL else os.kill
            send(process.pid, job.kill_by)
            is_killed = True
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    return code


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def probe_set_of(size: Size) -> ProbeSet:
    """Return a probe set of random ids."""
    return random_probe_set(size.sequences, size.length, size.vocabulary)

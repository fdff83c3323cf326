"""Small data in Megatron's format, and real Megatron jobs on the CPU."""

import atexit
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

TESTS = Path(__file__).parent
SEQ_LENGTH = 32
VOCAB_SIZE = 255
EOD = 250

MODEL = {
    "--num-layers": "4",
    "--hidden-size": "32",
    "--num-attention-heads": "4",
    "--seq-length": str(SEQ_LENGTH),
    "--max-position-embeddings": str(SEQ_LENGTH),
    "--position-embedding-type": "rope",
    "--normalization": "RMSNorm",
    "--swiglu": "",
    "--disable-bias-linear": "",
    "--untie-embeddings-and-output-weights": "",
}
TRAINING = {
    "--micro-batch-size": "2",
    "--global-batch-size": "8",
    "--lr": "3e-3",
    "--min-lr": "3e-4",
    "--lr-decay-style": "cosine",
    "--lr-decay-iters": "16",
    "--lr-warmup-iters": "2",
    "--attention-dropout": "0.1",
    "--hidden-dropout": "0.1",
    "--eval-interval": "1000",
    "--eval-iters": "1",
    "--log-interval": "1",
    "--num-workers": "0",
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": str(VOCAB_SIZE),
    "--split": "900,100,0",
    "--ckpt-format": "torch",
}


@dataclass(frozen=True)
class Corpus:
    """Two .bin/.idx datasets of unlike Markov chains, and a probe set of their held-out part."""

    prefixes: tuple[str, str]
    probe_set: Path

    @property
    def data_path(self) -> list[str]:
        return ["0.5", self.prefixes[0], "0.5", self.prefixes[1]]


def write_documents(prefix: Path, documents: list[list[int]]) -> str:
    """Write a dataset with Megatron's own builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def markov_documents(seed: int, n_documents: int = 300) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    successors = generator.integers(0, EOD, (EOD, 3))
    documents = []
    for _ in range(n_documents):
        document = [int(generator.integers(EOD))]
        for _ in range(int(generator.integers(20, 200))):
            rank = min(2, int(generator.exponential(0.6)))
            document.append(int(successors[document[-1], rank]))
        documents.append([*document, EOD])
    return documents


def make_corpus(folder: Path) -> Corpus:
    """Write the datasets and the probe set into `folder`."""
    from megatron_tokscale.probe.build import ProbeSettings, build_probe_set

    prefixes = tuple(
        write_documents(folder / name, markov_documents(seed))
        for seed, name in enumerate(("left", "right"))
    )
    corpus = Corpus(prefixes, folder / "probe.safetensors")
    settings = ProbeSettings(
        data_path=corpus.data_path,
        split=TRAINING["--split"],
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        n_tokens=700,
        eod=EOD,
    )
    build_probe_set(settings).save(corpus.probe_set)
    return corpus


def job_flags(corpus: Corpus, *extra: str, without: tuple[str, ...] = ()) -> list[str]:
    """Flags of the tests' job; `extra` ones replace those of the same name."""
    flags = {**MODEL, **TRAINING}
    dropped = {*extra, *without}
    words = [word for name, value in flags.items() if name not in dropped for word in (name, value)]
    data = ["--data-path", *corpus.data_path]
    cache = ["--data-cache-path", str(corpus.probe_set.parent / "cache")]
    return [word for word in words if word] + data + cache + ["--tokscale-cpu", *extra]


def job_environment() -> dict[str, str]:
    """One thread per process, and a machine that shows no GPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }


def free_port() -> int:
    """A free port at random, below those that systems give to connections."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def torchrun(n_processes: int, target: list[str]) -> list[str]:
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--nproc_per_node", str(n_processes)),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
        *target,
    ]


@functools.cache
def warm_launcher(python_path: str = "") -> subprocess.Popen[str]:
    """The process that ranks are forked from, with Megatron imported; it lives as long as we do."""
    environment = job_environment()
    if python_path:
        environment["PYTHONPATH"] = python_path
    launcher = subprocess.Popen(
        [sys.executable, str(TESTS / "warm_launcher.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(launcher.terminate)
    return launcher


def ask_launcher(
    n_processes: int, words: Sequence[str], *, python_path: str = "", apart: bool = False
) -> dict[str, Any]:
    """Run a script, or `-m MODULE`, on ranks forked from the warm launcher, to any end.

    The same jobs as torchrun's, in a third of the time.

    Args:
        n_processes: number of ranks.
        words: what would follow `python`.
        python_path: PYTHONPATH of the launcher, if not this process's.
        apart: whether stderr is returned as "errors" and not as a part of "output".
    """
    launcher = warm_launcher(python_path)
    assert launcher.stdin and launcher.stdout
    job = {"ranks": n_processes, "argv": words, "apart": apart}
    launcher.stdin.write(json.dumps(job) + "\n")
    launcher.stdin.flush()
    return dict(json.loads(launcher.stdout.readline()))


def run_forked(n_processes: int, *words: str, python_path: str = "") -> str:
    """Run a script, or `-m MODULE`, on forked ranks; return their output."""
    answer = ask_launcher(n_processes, words, python_path=python_path)
    assert answer["code"] == 0, answer["output"][-6000:]
    return str(answer["output"])


def run_job(corpus: Corpus, n_processes: int, *extra: str) -> str:
    """Train to the end and return the job's output."""
    return run_forked(n_processes, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *extra))


def run_alone(corpus: Corpus, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run a job of one rank to any end; its stdout and stderr are apart."""
    words = ["-m", "megatron_tokscale.pretrain", *job_flags(corpus, *extra)]
    answer = ask_launcher(1, words, apart=True)
    return subprocess.CompletedProcess(words, answer["code"], answer["output"], answer["errors"])


def kill_job_at(corpus: Corpus, n_processes: int, mark: str, log: Path, *extra: str) -> None:
    """Start a job and SIGKILL all of its processes as soon as `mark` is in its output."""
    command = torchrun(
        n_processes, ["-m", "megatron_tokscale.pretrain", *job_flags(corpus, *extra)]
    )
    with log.open("w") as output:
        job = subprocess.Popen(
            command,
            env=job_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while mark not in log.read_text():
            assert job.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, f"no {mark!r} in {log}"
            time.sleep(0.01)
        launcher = psutil.Process(job.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        job.wait()

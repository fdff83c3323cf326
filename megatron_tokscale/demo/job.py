"""A training job of the demo: Megatron under torchrun; its log gives the progress."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_tokscale.core.progress import ProgressOnStderr
from megatron_tokscale.store import Run, RunPaths

SPLIT = "90,10,0"
"""Megatron's --split: a tenth of the documents is held out, and watched."""
_PROCESSES = 2
_ITERATION = re.compile(r" iteration +(\d+)/ *(\d+) .*lm loss: (\S+)")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the demo's model, data and training.

    Attributes:
        vocab_size: tokens of the tokenizer that is trained on the text.
        n_layers: layers of the model.
        hidden_size: width of a layer.
        seq_length: tokens of a sample.
        global_batch_size: samples of a step.
        train_iters: steps of the training.
        learning_rate: learning rate after the warm-up; it stays constant.
        characters: characters of each kind of text, about.
        probe_tokens: tokens to watch, about.
    """

    vocab_size: int
    n_layers: int
    hidden_size: int
    seq_length: int
    global_batch_size: int
    train_iters: int
    learning_rate: float
    characters: int
    probe_tokens: int

    @property
    def train_samples(self) -> int:
        """Training samples that the job consumes."""
        return self.train_iters * self.global_batch_size

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints: a sixteenth of the training."""
        return max(self.train_iters // 16, 1)


# Both sizes are our choice: as much as two cores train in some minutes, and in a minute. A higher
# learning rate, or a shorter warm-up, makes the loss rise after the warm-up, in all tokens at once.
FULL = Size(
    vocab_size=2048,
    n_layers=4,
    hidden_size=128,
    seq_length=128,
    global_batch_size=16,
    train_iters=1280,
    learning_rate=2e-3,
    characters=8_000_000,
    probe_tokens=32_000,
)
QUICK = Size(
    vocab_size=512,
    n_layers=2,
    hidden_size=64,
    seq_length=64,
    global_batch_size=16,
    train_iters=96,
    learning_rate=5e-3,
    characters=2_000_000,
    probe_tokens=4_000,
)


def megatron_flags(size: Size, data_path: list[str], cache: Path) -> list[str]:
    """Return Megatron's flags for a small Llama-like GPT at a constant learning rate.

    Each of the two data-parallel processes takes its half of a step's samples in one microbatch: a
    step then takes 0.65 times as long as with two pipeline stages and four microbatches (142 and
    217 ms, the least of 44 steps on two cores).
    """
    model = {
        "--num-layers": size.n_layers,
        "--hidden-size": size.hidden_size,
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
        "--micro-batch-size": size.global_batch_size // _PROCESSES,
        "--global-batch-size": size.global_batch_size,
        "--train-iters": size.train_iters,
        "--lr": size.learning_rate,
        "--lr-decay-style": "constant",
        "--lr-warmup-iters": max(size.train_iters // 20, 1),
        "--weight-decay": 0.1,
        "--clip-grad": 1.0,
        "--adam-beta2": 0.95,
        "--seed": 1234,
    }
    data = {
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": size.vocab_size,
        "--split": SPLIT,
        "--data-cache-path": cache,
        "--num-workers": 0,
        "--eval-interval": size.train_iters,
        "--eval-iters": 1,
        "--log-interval": 1,
        "--save-interval": size.save_interval,
        "--ckpt-format": "torch",
    }
    words = [str(word) for pair in (model | training | data).items() for word in pair]
    switches = ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    return [*words, *switches, "--data-path", *data_path]


def train(
    what: str, run: Path, size: Size, flags: list[str], branch_from: tuple[Path, int] | None = None
) -> None:
    """Train in two processes from the last checkpoint in `run`; the log goes to `run` as well.

    Returns when the job ends, whether or not it reached its last step: see the probes in `run`.

    Args:
        what: name of the training in the lines of progress.
        run: run directory.
        size: size of the job.
        flags: Megatron's and the plugin's flags.
        branch_from: run and step of the checkpoint to start from while `run` has none.
    """
    run.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"),
        str(_PROCESSES),
        *("-m", "megatron_tokscale.pretrain", "--tokscale-cpu", *flags),
        *("--save", str(run), *_load(run, branch_from)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }
    meter = ProgressOnStderr().meter(what, size.train_iters, "steps")
    log = run / "train.log"
    with (
        log.open("a", encoding="utf-8") as output,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as job,
    ):
        assert job.stdout is not None
        for line in job.stdout:
            output.write(line)
            if match := _ITERATION.search(line):
                meter(int(match[1]), note=f"training loss {float(match[3]):.2f}")


def _load(run: Path, branch_from: tuple[Path, int] | None) -> list[str]:
    """Return the flags of the checkpoint that a job starts from."""
    if branch_from is None or (run / "latest_checkpointed_iteration.txt").exists():
        return ["--load", str(run)]
    trunk, step = branch_from
    # The branch follows the trunk's plan, of which its own directory has no record yet.
    return ["--load", str(trunk), "--ckpt-step", str(step), "--tokscale-override-plan"]


def is_trained(run: Path, last_step: int) -> bool:
    """Return whether the last probe of a training is on disk."""
    if not RunPaths(run).identity.exists():
        return False
    step_K = Run.open(run).step_K
    return bool(step_K.size and step_K[-1] == last_step)

"""Megatron jobs that write down what they train on.

    recorded_job.py FOLDER STOP <flags of megatron_tokscale.pretrain>

notes every microbatch in FOLDER, a file for each rank. The rank that is asked for a microbatch of
step STOP (0: never) kills itself with SIGKILL instead.
"""

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jobs import Corpus, ask_launcher, job_flags

Sample = tuple[int, ...]
"""The tokens that a sample reads: its inputs, and the label of the last of them."""


class Result(NamedTuple):
    code: int
    output: str

    @property
    def refusals(self) -> list[str]:
        """The lines of errors; what another rank has begun may stand before one."""
        return re.findall(r"megatron-tokscale: .*", self.output)


def start(n_processes: int, *words: str, python_path: str = "") -> Result:
    """Run a script, or `-m MODULE`, on ranks forked from the warm launcher, to any end."""
    answer = ask_launcher(n_processes, words, python_path=python_path)
    return Result(answer["code"], answer["output"])


def run_recorded(
    corpus: Corpus,
    folder: Path,
    n_processes: int,
    *flags: str,
    stop: int = 0,
    without: tuple[str, ...] = (),
    data: list[str] | None = None,
    python_path: str = "",
) -> str:
    """Train, to the end or until SIGKILL at step `stop`, and return the job's output."""
    folder.mkdir(parents=True, exist_ok=True)
    words = job_flags(corpus, *flags, without=without)
    if data is not None:
        at = words.index("--data-path")
        words[at : at + 1 + len(corpus.data_path)] = data
    result = start(n_processes, __file__, str(folder), str(stop), *words, python_path=python_path)
    assert result.code == (-signal.SIGKILL if stop else 0), result.output[-6000:]
    return result.output


def read_samples(folder: Path, kind: str = "train") -> dict[int, Sample]:
    """Sample k of the job; all ranks that have read it must have read the same."""
    samples: dict[int, Sample] = {}
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["kind"] == kind:
                for i, tokens in enumerate(row["samples"]):
                    assert samples.setdefault(row["first"] + i, tuple(tokens)) == tuple(tokens)
    return samples


def recording(get_batch: Callable[..., Any], folder: Path, stop: int) -> Callable[..., Any]:
    from megatron.core import mpu
    from megatron.training import get_args
    from torch import is_grad_enabled

    counts: Counter[Any] = Counter()

    def read(iterator: Any, vp_stage: int | None) -> Any:
        args = get_args()
        if stop and is_grad_enabled() and args.curr_iteration + 1 == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = get_batch(iterator, vp_stage)
        if batch["tokens"] is None:
            return batch
        kind = "train" if is_grad_enabled() else "eval"
        consumed = args.consumed_train_samples if kind == "train" else 0
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        number = counts[kind, consumed, vp_stage]
        counts[kind, consumed, vp_stage] += 1
        rows = zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True)
        row = {
            "kind": kind,
            "first": consumed + (number * size + rank) * args.micro_batch_size,
            "samples": [[*tokens, labels[-1]] for tokens, labels in rows],
        }
        with (folder / f"{os.environ['RANK']}.{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return batch

    return read


def main() -> None:
    folder, stop = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    from megatron_tokscale import pretrain

    pretrain.get_batch = recording(pretrain.get_batch, folder, stop)
    pretrain.main()


if __name__ == "__main__":
    main()

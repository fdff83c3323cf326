"""Collective calls and bytes of the plugin per rank, in jobs of 2 to 2,048 ranks.

    PYTHONPATH=tests/support python benchmarks/collectives.py [--gloo 2 4 8] [--fake 8 128 2048]
        [--out FILE]

The jobs train a tiny model under a plan, with probes and decisions on the plan's weights. Those of
--gloo are real. Those of --fake are one process each, for rank 0, for the rank that writes the
losses, and for one more, on torch's fake process group: its collectives bring nothing, so the
process gets the values that the ranks of a real job have sent each other
(`recorded_collectives.py`). Nothing is computed from the number of ranks.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jobs import (
    EOD,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Corpus,
    job_flags,
    make_corpus,
)
from planned_jobs import plan_of
from recorded_collectives import DECISION, LOG, PROBE, START
from recorded_job import start
from table import heading, markdown

SCRIPT = Path(__file__).parent / "recorded_collectives.py"
SEQUENCES = 256  # of the probe set; 2,048 ranks as TP4 x PP4 x DP128 take two each
STEPS = 10  # the weights are decided 4 steps after the probe at step 6
SPLIT = "500,500,0"  # so that the small corpus has sequences enough to watch


type Start = Callable[[int, list[str]], None]
"""Runs a script on a number of processes, to the end."""


class Layout(NamedTuple):
    """A job's numbers of ranks."""

    tensor: int
    pipeline: int
    ranks: int

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def roles(self) -> dict[str, int]:
        """The ranks that are unlike each other."""
        writer = self.ranks // self.pipeline * (self.pipeline - 1)
        other = self.tensor if self.data > 1 else 1  # if possible, one that reads data
        return {"rank 0": 0, "writer": writer, "other": other}

    def __str__(self) -> str:
        return f"{self.ranks} (TP{self.tensor} PP{self.pipeline} DP{self.data})"


LAYOUTS = {
    2: Layout(1, 2, 2),
    4: Layout(1, 2, 4),
    8: Layout(2, 2, 8),
    128: Layout(4, 4, 128),
    2048: Layout(4, 4, 2048),
}


class Recorded(NamedTuple):
    """Calls by phase (name, bytes sent, bytes received), and the peak of its tensors' bytes."""

    calls: dict[str, list[tuple[str, int, int]]]
    peak: dict[str, int]

    def totals(self, phase: str) -> tuple[int, int, int]:
        """Return calls, bytes sent and bytes received."""
        rows = self.calls.get(phase, [])
        return len(rows), sum(row[1] for row in rows), sum(row[2] for row in rows)

    def names(self, phase: str) -> Counter[str]:
        """Return the number of calls by name."""
        return Counter(row[0] for row in self.calls.get(phase, []))

    @classmethod
    def read(cls, file: Path) -> "Recorded":
        content = json.loads(file.read_text())
        calls = {phase: [tuple(row) for row in rows] for phase, rows in content["calls"].items()}
        return cls(calls, content["peak"])


def make_job(folder: Path) -> Corpus:
    """Write data, a probe set of SEQUENCES sequences, and a plan."""
    from megatron_tokscale.data import Replanning
    from megatron_tokscale.probe.build import ProbeSettings, build_probe_set

    corpus = make_corpus(folder)
    settings = ProbeSettings(
        data_path=corpus.data_path,
        split=SPLIT,
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        n_sequences=SEQUENCES,
        eod=EOD,
    )
    build_probe_set(settings).save(corpus.probe_set)
    how = Replanning(strength=3.0, floor=0.25, max_change=1.5)
    plan_of(corpus.prefixes, {0: (0.5, 0.5)}, replanning=how).save(folder / "plan.json")
    return corpus


def words_of(corpus: Corpus, layout: Layout, run: Path, role: str = "real") -> list[str]:
    """Return the command line of a job behind `python`; its records go to `run`.

    Args:
        corpus: the data, with the probe set.
        layout: numbers of ranks.
        run: the run directory, which is made.
        role: role of the rank that a single process plays; "real" in a job of real ranks.
    """
    folder = corpus.probe_set.parent
    run.mkdir(parents=True)
    batch = max(8, layout.data)
    flags = {
        "--tensor-model-parallel-size": layout.tensor,
        "--pipeline-model-parallel-size": layout.pipeline,
        "--micro-batch-size": 1,
        "--global-batch-size": batch,
        "--train-iters": STEPS,
        "--split": SPLIT,
        "--tokscale-probe-set": corpus.probe_set,
        "--tokscale-probe-schedule": "linear:3",
        "--tokscale-plan": folder / "plan.json",
        "--tokscale-replan-interval": 6,
        "--tokscale-dir": run,
    }
    job = [str(word) for pair in flags.items() for word in pair]
    if role != "real":
        job += ["--fake-process-group", "--no-check-for-nan-in-loss-and-grad"]
        job += ["--rerun-mode", "disabled"]
    rank, n_ranks = str(layout.roles.get(role)), str(layout.ranks)
    script = [str(SCRIPT), str(run), str(folder / "transcript"), role, rank, n_ranks]
    return [*script, *job_flags(corpus, *job)]


def run_real(corpus: Corpus, layout: Layout, run: Path, start_job: Start) -> dict[str, Recorded]:
    """Run a job on gloo; return the records of its unlike ranks."""
    start_job(layout.ranks, words_of(corpus, layout, run))
    return {role: Recorded.read(run / f"{rank}.json") for role, rank in layout.roles.items()}


def run_fake(corpus: Corpus, layout: Layout, run: Path, start_job: Start) -> dict[str, Recorded]:
    """Run the unlike ranks of a job, one after the other, on the fake process group."""
    found = {}
    for role, rank in layout.roles.items():
        out = run / role.replace(" ", "-")
        start_job(1, words_of(corpus, layout, out, role))
        found[role] = Recorded.read(out / f"{rank}.json")
    return found


def start_forked(n_processes: int, words: list[str]) -> None:
    """Run a script on ranks that a process with Megatron in it forks."""
    job = start(n_processes, *words)
    if job.code:
        raise SystemExit(job.output[-6000:])


def rows_of(name: str, n_ranks: int, found: dict[str, Recorded]) -> list[list[str]]:
    """Return the rows of a job in the table."""
    rows = []
    for role, record in found.items():
        row = [f"{LAYOUTS[n_ranks]} {name}", role]
        for phase in (START, PROBE, DECISION, LOG):
            calls, sent, received = record.totals(phase)
            row.append(f"{calls}: {sent:,} / {received:,}")
        # Where no losses come from other ranks, the writer has none to put in order.
        row.append(f"{record.peak.get(PROBE, 0):,}" if name == "gloo" else "not measured")
        rows.append(row)
    return rows


def names_of(found: dict[str, Recorded]) -> list[str]:
    """Return a line per phase: the calls of the writer by name."""
    lines = []
    for phase in (START, PROBE, DECISION, LOG):
        names = found["writer"].names(phase)
        lines.append(f"- {phase}: " + ", ".join(f"{n} {name}" for name, n in names.items()))
    return lines


def main() -> None:
    """Run the jobs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gloo", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--fake", type=int, nargs="*", default=[8, 128, 2048])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus, found = make_job(folder), {}
        # The job of 4 real ranks gives the values that the fake group's processes get.
        jobs = [("gloo", 4), *(("fake", n) for n in arguments.fake)]
        jobs += [("gloo", n) for n in arguments.gloo if n != 4]
        for name, n_ranks in jobs:
            run = run_real if name == "gloo" else run_fake
            place = folder / f"{name}{n_ranks}"
            found[name, n_ranks] = run(corpus, LAYOUTS[n_ranks], place, start_forked)
            print(*rows_of(name, n_ranks, found[name, n_ranks]), sep="\n", flush=True)
    order = sorted(found, key=lambda job: (job[0] == "fake", job[1]))
    rows = [row for job in order for row in rows_of(*job, found[job])]
    columns = ["ranks", "rank", START, PROBE, DECISION, LOG, "peak of a probe's tensors, bytes"]
    from importlib.metadata import version

    text = "\n".join(
        [
            heading(torch=torch.__version__, **{"megatron-core": version("megatron-core")}),
            "",
            "`PYTHONPATH=tests/support python benchmarks/collectives.py`",
            "",
            "Collective calls of the plugin on one rank: bytes sent / received. Probe set: "
            f"{SEQUENCES} sequences of {SEQ_LENGTH} tokens. Megatron's own forward pass is left "
            "out. A fake job is one process of that rank on torch's fake process group.",
            "",
            markdown(columns, rows),
            "",
            "In a probe each rank that holds losses gets those of the probe set, 4 bytes a token, "
            "and from each data-parallel rank the places of one sequence. The writer's start-up "
            "sends the number of ranks in digits.",
            "",
            "Calls of the writer by name, in the job of 4 ranks:",
            "",
            *names_of(found["gloo", 4]),
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()

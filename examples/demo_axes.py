"""Evidence on real text: the demo's run beside a second seed, other model sizes and less data.

    python examples/demo_axes.py [--demo demo-run]

after `make demo`. It trains 17 more runs of the demo (under an hour on two cores, with the
analysis):

- seed2, seed3: the same training with other seeds, for the tests that need two runs, for the shift
  that a seed alone makes on the axis M, and for the noise between seeds when two runs are compared;
- hidden32 to hidden192: other widths of the model, for the axis M;
- tokens100 to tokens1300: branches of the demo's run, for the axis D. The demo's run is the trunk:
  its learning rate stays constant. A branch starts from one of its checkpoints, and its learning
  rate decays to zero over the last fifth of its steps.

Then it fits them and runs the tests: do learning times carry over to another seed and another size,
how far does the size of the model or the amount of data shift the clock, which law explains the
losses, which tokens has a narrower model not learned, and what is still to come? The answers are
printed, and most are sections of DEMO/axes/report.html. A run that is trained or fitted is not
trained or fitted again: a script that was stopped resumes.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.demo.job import FULL, SPLIT, Size, is_trained, megatron_flags, train
from megatron_tokscale.store.paths import RunPaths

SCHEDULE = "log:per-octave=8+last"
WIDTHS = {32: 5.2e-3, 48: 3.9e-3, 64: 3.4e-3, 96: 2.6e-3, 192: 1.4e-3}
"""Learning rates by width: as far from the width's best rate as 2e-3 is at the demo's width of 128
(benchmarks/results/demo_rates.md)."""
BRANCHES = (80, 160, 240, 320, 480, 640, 800, 960, 1040)
"""Steps of the trunk at which a branch starts: multiples of `Size.save_interval`. Its decay takes a
quarter as many steps: a fifth of the branch."""


@dataclass(frozen=True)
class Job:
    """A training of this script.

    Attributes:
        size: size of the job.
        flags: further flags of Megatron's.
        branch_at: step of the trunk at which it starts; None for a training of its own.
    """

    size: Size
    flags: tuple[str, ...] = ()
    branch_at: int | None = None


def branch(start: int) -> Job:
    """Return the job that decays the learning rate to zero from a step of the trunk on."""
    decay = start // 4
    size = replace(FULL, train_iters=start + decay)
    rates = {
        "--lr-decay-style": "WSD",
        "--lr-wsd-decay-style": "linear",
        "--lr-wsd-decay-iters": decay,
        "--lr-decay-iters": size.train_iters,
        "--min-lr": 0,
    }
    words = [str(word) for pair in rates.items() for word in pair]
    return Job(size, (*words, "--override-opt_param-scheduler"), start)


JOBS = {
    "seed2": Job(FULL, ("--seed", "4321")),
    "seed3": Job(FULL, ("--seed", "9876")),
    **{
        f"hidden{width}": Job(replace(FULL, hidden_size=width, learning_rate=rate))
        for width, rate in WIDTHS.items()
    },
    **{f"tokens{start * 5 // 4}": branch(start) for start in BRANCHES},
}
"""The trainings by name. The demo's own run is a point of the axis M, and the trunk of D."""


def train_all(demo: Path) -> None:
    """Train the jobs that are not trained yet, one after the other."""
    probe_set, plan = demo / "probe.safetensors", demo / "uniform.json"
    for file in (probe_set, plan):
        if not file.is_file():
            raise TokscaleError(f"{file} is missing; run `make demo` first")
    probe = ["--tokscale-probe-set", str(probe_set), "--tokscale-probe-schedule", SCHEDULE]
    for name, job in JOBS.items():
        run = demo / "axes" / name
        if is_trained(run, job.size.train_iters):
            continue
        flags = megatron_flags(job.size, data_path(demo), demo / "cache")
        branch_from = None if job.branch_at is None else (demo / "baseline", job.branch_at)
        flags += [*probe, "--tokscale-plan", str(plan), *job.flags]
        train(name, run, job.size, flags, branch_from)
        if not is_trained(run, job.size.train_iters):
            raise TokscaleError(f"the job ended early; see the end of {run / 'train.log'}")


def data_path(demo: Path) -> list[str]:
    """Return the demo's blend as words of --data-path."""
    prefixes = (demo / "data" / name for name in ("speeches", "python"))
    return [word for prefix in prefixes for word in ("0.5", str(prefix))]


def analyse(demo: Path) -> None:
    """Run the verbs that a user would type, and print each before it runs."""
    baseline, axes = demo / "baseline", demo / "axes"
    models = [axes / name for name in JOBS if name.startswith("hidden")]
    data = [axes / name for name in JOBS if name.startswith("tokens")]
    seeds = [axes / name for name in JOBS if name.startswith("seed")]
    for run in (baseline, *seeds, *models):
        if not RunPaths(run).fits.is_file():
            tokscale("fit", run)
    tokscale("spectrum", axes / "seed2", "--source", baseline)
    tokscale("spectrum", baseline, "--source", axes / "seed2", axes / "hidden64")
    for axis, runs in (("M", [*models, *seeds]), ("D", data)):
        (axes / axis / "axis.json").unlink(missing_ok=True)  # of an earlier call of this script
        tokscale("spectrum", "--axis", axis, *runs, baseline, "--out", axes / axis)
    others = [axes / name for name in JOBS]
    tokscale("laws", baseline, *others, "--data-path", *data_path(demo), "--split", SPLIT)
    for other, noise in (("seed2", ["seed3"]), ("hidden64", ["seed2", "seed3"])):
        tokscale("compare", baseline, axes / other, "--noise", *(axes / name for name in noise))
    tokscale("forecast", baseline)
    tokscale(
        *("report", baseline, "--axis-dir", axes / "M", axes / "D"),
        *("--tokenizer", demo / "tokenizer.json", "--out", axes / "report.html"),
    )


def tokscale(*words: str | Path) -> None:
    """Run a verb, and end this script if the verb fails."""
    print("\n$ megatron-tokscale", *words, flush=True)
    command = [sys.executable, "-m", "megatron_tokscale.cli", *map(str, words)]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="folder of the demo")
    demo = parser.parse_args().demo
    with exit_with_one_line():
        train_all(demo)
        analyse(demo)


if __name__ == "__main__":
    main()

"""Evidence on real text: the demo's run beside a second seed, smaller models and less data.

    python examples/demo_axes.py [--demo demo-run]

after `make demo`. It trains ten more runs of the demo (15 minutes or so on two cores), fits them,
and asks what the paper claims: do learning times carry over to another seed and another size, do
those along T say what more data (D) and a larger model (M) learn, and which law explains the
losses? The answers are printed, and are sections of DEMO/axes/report.html. What is there already is
not done again.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.demo.job import FULL, SPLIT, megatron_flags, train
from megatron_tokscale.fit import fits_path
from megatron_tokscale.store import Run

DENSE, SPARSE = "log:per-octave=8+last", "log:per-octave=2+last"
WIDTHS, STEPS = (32, 48, 64, 96, 128), (40, 80, 160, 320)
JOBS = {
    "seed2": (FULL, DENSE, ["--seed", "4321"]),
    **{
        f"hidden{width}": (
            replace(FULL, hidden_size=width),
            DENSE if width == 64 else SPARSE,
            [],
        )
        for width in WIDTHS
    },
    **{f"steps{n}": (replace(FULL, train_iters=n), SPARSE, []) for n in STEPS},
}
"""Name: size, when to probe, further flags. hidden128 is also the last point of the axis D."""


def is_trained(run: Path, steps: int) -> bool:
    """Whether the last probe of a training of so many steps is on disk."""
    if not (run / "tokscale" / "run.json").exists():
        return False
    taken = Run.open(run).step_K
    return bool(len(taken) and taken[-1] == steps)


def train_all(demo: Path) -> None:
    """Train what is not trained, one job after the other."""
    probe_set = demo / "probe.safetensors"
    if not probe_set.is_file():
        raise TokscaleError(f"{probe_set} is not there; run `make demo` first")
    for name, (size, schedule, extra) in JOBS.items():
        run = demo / "axes" / name
        if is_trained(run, size.train_iters):
            continue
        probe = ["--tokscale-probe-set", str(probe_set), "--tokscale-probe-schedule", schedule]
        flags = megatron_flags(size, data_path(demo), demo / "cache")
        train(name, run, size, [*flags, *probe, *extra])
        if not is_trained(run, size.train_iters):
            raise TokscaleError(f"the job ended early; see the end of {run / 'train.log'}")


def data_path(demo: Path) -> list[str]:
    """The demo's blend, as --data-path takes it."""
    prefixes = (demo / "data" / name for name in ("speeches", "python"))
    return [word for prefix in prefixes for word in ("0.5", str(prefix))]


def analyse(demo: Path) -> None:
    """The verbs that a user would type, each shown before it runs."""
    baseline, axes = demo / "baseline", demo / "axes"
    for run in (baseline, axes / "seed2", axes / "hidden64"):
        if not fits_path(Run.open(run)).is_file():
            tokscale("fit", run)
    tokscale("spectrum", baseline, "--source", axes / "seed2", axes / "hidden64")
    models = [axes / f"hidden{width}" for width in WIDTHS]
    data = [*(axes / f"steps{n}" for n in STEPS), axes / "hidden128"]
    for axis, runs in (("M", models), ("D", data)):
        tokscale("spectrum", "--axis", axis, *runs, "--source", baseline, "--out", axes / axis)
    others = [axes / name for name in JOBS]
    tokscale("laws", baseline, *others, "--data-path", *data_path(demo), "--split", SPLIT)
    tokscale(
        *("report", baseline, "--axis-dir", axes / "M", axes / "D"),
        *("--tokenizer", demo / "tokenizer.json", "--out", axes / "report.html"),
    )


def tokscale(*words: str | Path) -> None:
    """Run a verb; its error ends this script too."""
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

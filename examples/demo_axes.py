"""Evidence on real text: the demo's run beside a second seed, smaller models and less data.

    python examples/demo_axes.py [--demo demo-run]

after `make demo`. It trains ten more runs of the demo (about 15 minutes on two cores), fits them,
and tests the paper's claims: do learning times carry over to another seed and another size, do
learning times along T predict what more data (D) and a larger model (M) learn, and which law
explains the losses? The answers are printed, and are sections of DEMO/axes/report.html. A run that
is trained or fitted already is not trained or fitted again.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.demo.job import FULL, SPLIT, is_trained, megatron_flags, train
from megatron_tokscale.store.paths import RunPaths

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
"""Size, probe schedule and further flags by name. hidden128 is the last point of the axis D too."""


def train_all(demo: Path) -> None:
    """Train the jobs that are not trained yet, one after the other."""
    probe_set = demo / "probe.safetensors"
    if not probe_set.is_file():
        raise TokscaleError(f"{probe_set} is missing; run `make demo` first")
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
    """Return the demo's blend as words of --data-path."""
    prefixes = (demo / "data" / name for name in ("speeches", "python"))
    return [word for prefix in prefixes for word in ("0.5", str(prefix))]


def analyse(demo: Path) -> None:
    """Run the verbs that a user would type, and print each before it runs."""
    baseline, axes = demo / "baseline", demo / "axes"
    for run in (baseline, axes / "seed2", axes / "hidden64"):
        if not RunPaths(run).fits.is_file():
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

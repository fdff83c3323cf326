"""More runs of the demo: a second seed, smaller models (axis M), less data (axis D).

    python examples/demo_axes.py [--demo demo-run]

after `make demo`. A run that is trained already is left alone, a stopped one goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_tokscale.demo.job import FULL, megatron_flags, train
from megatron_tokscale.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.store import Run

DENSE, SPARSE = "log:per-octave=8+last", "log:per-octave=2+last"
JOBS = {
    "seed2": (FULL, DENSE, ["--seed", "4321"]),
    "hidden64": (replace(FULL, hidden_size=64), DENSE, []),
    **{
        f"hidden{width}": (replace(FULL, hidden_size=width), SPARSE, [])
        for width in (32, 48, 96, 128)
    },
    **{f"steps{n}": (replace(FULL, train_iters=n), SPARSE, []) for n in (40, 80, 160, 320)},
}
"""Name: size, when to probe, further flags. The last point of D is hidden128, 640 steps."""


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
    data = [word for name in ("speeches", "python") for word in ("0.5", str(demo / "data" / name))]
    for name, (size, schedule, extra) in JOBS.items():
        run = demo / "axes" / name
        if is_trained(run, size.train_iters):
            continue
        probe = ["--tokscale-probe-set", str(probe_set), "--tokscale-schedule", schedule]
        train(name, run, size, [*megatron_flags(size, data, demo / "cache"), *probe, *extra])
        if not is_trained(run, size.train_iters):
            raise TokscaleError(f"the job ended early; see the end of {run / 'train.log'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"))
    with exit_with_one_line():
        train_all(parser.parse_args().demo)


if __name__ == "__main__":
    main()

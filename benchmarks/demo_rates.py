"""Learning rates for the widths of examples/demo_axes.py: a short training at each of several.

    python benchmarks/demo_rates.py [--demo demo-run] [--folder FOLDER] [--out FILE]

after `make demo`. Every width trains 320 steps, with the demo's warm-up of 64, at the constant rate
of the root rule (2e-3 at the demo's width of 128) times 1/sqrt(2), 1 and sqrt(2). The score is the
mean loss of the demo's probe set at the last step. The best rate is the vertex of the parabola in
ln rate through the three losses, at most one step of the grid beyond it. In the last column every
width has the same share of its best rate as the demo's rate is of its own. A training that is done
is not done again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_tokscale.core.errors import exit_with_one_line
from megatron_tokscale.demo.job import FULL, is_trained, megatron_flags, train
from megatron_tokscale.store import Run

WIDTHS = (32, 48, 64, 96, 128, 192)
FACTORS = (0.71, 1.0, 1.41)
STEPS = 320


def rate_of(width, factor):
    """Return the learning rate: the root of the width from the demo's rate, times a factor."""
    return round(FULL.learning_rate * (FULL.hidden_size / width) ** 0.5 * factor, 5)


def best_rate(rates, losses):
    """Return the rate with the least loss of the parabola in ln rate through three points.

    It is at most one step of the grid beyond the outer rates, and the best of the three where the
    parabola opens downwards.
    """
    x_K = np.log(rates)
    curvature, slope, _ = np.polyfit(x_K - x_K[1], losses, 2)
    if curvature <= 0:
        return rates[int(np.argmin(losses))]
    reach = 2 * float(x_K[-1] - x_K[1])
    return float(rates[1] * np.exp(np.clip(-slope / (2 * curvature), -reach, reach)))


def last_loss(demo, folder, width, rate):
    """Train a width at a rate, unless that is done, and return the probe's mean loss at the end."""
    size = replace(FULL, hidden_size=width, learning_rate=rate, train_iters=STEPS)
    run = folder / f"hidden{width}-{rate:g}"
    if not is_trained(run, STEPS):
        prefixes = (demo / "data" / name for name in ("speeches", "python"))
        data_path = [word for prefix in prefixes for word in ("0.5", str(prefix))]
        flags = megatron_flags(size, data_path, demo / "cache")
        flags[flags.index("--save-interval") + 1] = str(STEPS)
        flags[flags.index("--lr-warmup-iters") + 1] = str(FULL.train_iters // 20)
        flags += ["--tokscale-probe-set", str(demo / "probe.safetensors")]
        flags += [
            "--tokscale-probe-schedule",
            "last",
            "--tokscale-plan",
            str(demo / "uniform.json"),
        ]
        train(run.name, run, size, flags)
    return float(np.nanmean(Run.open(run).read_losses_at(STEPS)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="folder of the demo")
    parser.add_argument("--folder", type=Path, default=Path("rates-run"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from table import heading, print_sections

    with exit_with_one_line():
        cells, best = {}, {}
        for width in WIDTHS:
            rates = [rate_of(width, factor) for factor in FACTORS]
            losses = [last_loss(arguments.demo, arguments.folder, width, rate) for rate in rates]
            cells[width] = [f"{x:.3f} ({rate:g})" for rate, x in zip(rates, losses, strict=True)]
            best[width] = best_rate(rates, losses)
    share = FULL.learning_rate / best[FULL.hidden_size]
    rows = [
        [str(width), *cells[width], f"{best[width]:.2g}", f"{share * best[width]:.2g}"]
        for width in WIDTHS
    ]
    header = ["width", *(f"x {factor:g}" for factor in FACTORS), "best rate", "same share of it"]
    title = f"Mean loss in nats after {STEPS} steps (learning rate), by factor of the root rule"
    text = print_sections([(title, header, rows)])
    if arguments.out:
        about = ["# Learning rates of the demo's widths", "`python benchmarks/demo_rates.py`"]
        arguments.out.write_text("\n\n".join([*about, heading(), text]))


if __name__ == "__main__":
    main()

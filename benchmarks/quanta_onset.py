"""Exponent b of learning time = onset + E / frequency, on planted quanta: coverage and verdicts.

    python benchmarks/quanta_onset.py [--runs 500] [--out FILE]

A quantum of rate p (exposures a step) is learned at step (onset + E p^-b) e^noise. Quanta are
put into groups by rate; a group's time is the geometric mean of its learned quanta. About ten
minutes on one core at 500 runs. Run r of a row draws from the seed (row, r).

Shapes: I groups, J quanta of a group.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from scipy.stats import binomtest
from table import heading, markdown

from megatron_tokscale.laws import frequency_exponent
from megatron_tokscale.results.laws import FrequencyExponent
from megatron_tokscale.results.verdict import Verdict

RATES = (0.02, 3.0)  # exposures a step, of a small run whose quanta are known
SCATTER = 0.26  # of ln(time) of one quantum, as measured there
MARGIN = 0.8  # two typical widths, in ln(time): `laws` leaves out groups so near the last probe


@dataclass(frozen=True)
class World:
    """One row of the table.

    Attributes:
        name: what is planted.
        b: the exponent.
        onset: t0, in steps.
        exposures: E.
        n_groups: number of groups, evenly spaced in ln p.
        n_quanta: quanta in each group.
        end: last step of the run; later quanta are not learned.
        known_end: whether the fit knows the end, and leaves out late groups.
    """

    name: str
    b: float = 1.0
    onset: float = 60.0
    exposures: float = 20.0
    n_groups: int = 40
    n_quanta: int = 20
    end: float = np.inf
    known_end: bool = True


WORLDS = (
    World("onset 60, E 20"),
    World("the same, 1 quantum a group", n_quanta=1),
    World("the same, 12 groups", n_groups=12),
    World("the same, 6 groups", n_groups=6),
    World("no onset, E 20", onset=0.0),
    World("b 0.81, no onset", b=0.81, onset=0.0),
    World("b 0.5, onset 60", b=0.5),
    World("onset 60, run ends at step 750", end=750),
    World("the same, end not known to the fit", end=750, known_end=False),
)


def fit(world: World, rng: np.random.Generator) -> FrequencyExponent:
    """Plant quanta, and fit their groups' learning times."""
    rate_I = np.geomspace(*RATES, world.n_groups)
    mean_I = world.onset + world.exposures * rate_I**-world.b
    noise_IJ = SCATTER * rng.standard_normal((world.n_groups, world.n_quanta))
    log_time_IJ = np.log(mean_I)[:, None] + noise_IJ
    is_learned_IJ = log_time_IJ <= np.log(world.end)
    count_I = is_learned_IJ.sum(axis=1)
    log_time_I = np.where(is_learned_IJ, log_time_IJ, 0).sum(axis=1) / np.maximum(count_I, 1)
    time_I = np.where(count_I > 0, np.exp(log_time_I), np.inf)
    end = world.end * np.exp(-MARGIN) if world.known_end else None
    return frequency_exponent(rate_I, time_I, weight_I=np.maximum(count_I, 1), end=end)


def row(world: World, number: int, n_runs: int) -> list[str]:
    """Return the row of one world."""
    fits = [fit(world, np.random.default_rng([number, run])) for run in range(n_runs)]
    covered = sum(each.b.low <= world.b <= each.b.high for each in fits)
    bounds = binomtest(covered, n_runs).proportion_ci(method="exact")
    verdicts = [each.test.verdict for each in fits]
    return [
        world.name,
        f"{np.median([each.b.value for each in fits]):.3f}",
        f"{np.median([each.b.high - each.b.low for each in fits]):.3f}",
        f"{covered / n_runs:.1%} [{bounds.low:.1%}, {bounds.high:.1%}]",
        *(f"{verdicts.count(verdict) / n_runs:.0%}" for verdict in Verdict),
        f"{np.median([each.b_without_onset.value for each in fits]):.3f}",
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, and write it with command and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500, help="planted runs of each row")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args(words)
    columns = ["planted", "b, median", "length of its interval", "interval covers b"]
    columns += [f"b = 1 {verdict.value}" for verdict in Verdict]
    columns += ["b without an onset"]
    rows = [row(world, number, arguments.runs) for number, world in enumerate(WORLDS)]
    text = markdown(columns, rows)
    print(text)
    if arguments.out:
        command = f"python benchmarks/quanta_onset.py --runs {arguments.runs} --out FILE"
        about = heading(scipy=scipy.__version__, numpy=np.__version__)
        title = "# Exponent of learning times with an onset, on planted quanta"
        arguments.out.write_text(f"{title}\n\n`{command}`\n\n{about}\n\n{text}\n")


if __name__ == "__main__":
    main()

"""Calls, shifts and the test of two spectra on planted pairs of runs: level, power, coverage.

    python benchmarks/compare.py [--pairs 200] [--tokens 4000] [--processes 2] [--folder FOLDER]
                                 [--out FILE]

Every finished pair is a line in FOLDER; an interrupted study resumes there. A pair of 4,000 tokens
with one noise run takes 0.7 s of one core, with common noise 1.2 s: the whole study, 25 kinds of
200 pairs, takes about 40 minutes on two idle cores.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import planted_worlds
from planted_worlds import DATASETS, WORLDS, as_fitted
from resumable import Lines, share
from scipy import stats

from megatron_tokscale.compare.common_noise import LeftOver
from megatron_tokscale.compare.group_rows import (
    ALL,
    MeanCurves,
    Tables,
    compare_groups,
    groupings_of,
)
from megatron_tokscale.compare.late_loss import window_weights
from megatron_tokscale.compare.spectra import compare_spectra
from megatron_tokscale.compare.token_table import TokenTable
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.results.comparison import Difference
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency
from megatron_tokscale.spectrum.groups import Groups

RESAMPLES = 200
DOCUMENT_TOKENS = 100
JITTER = 0.25  # sd in x of a token's learning time between seeds
SOONER = 2.0  # x by which the tokens of a planted gain are learned sooner
AFTER_UNIGRAMS = 38  # step at which the planted unigram phase is over
GRID = 8  # points of the noiseless curves between two probes
LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """A planted pair of runs.

    Attributes:
        world: name of the world of `planted_worlds`.
        common: noise in nats that all tokens of a dataset share at a probe.
        seeds: sd in x of the shift of a whole run between seeds.
        gains: share of the tokens that B learns `SOONER` earlier.
        shift: by how much B is sooner in x, for all tokens of the first dataset and half of that
            for the second.
        noise: number of noise runs.
    """

    world: str
    common: float = 0.0
    seeds: float = 0.0
    gains: float = 0.0
    shift: float = 0.0
    noise: int = 1


NULL = [Pair(world) for world in ("A2", "A3", "B1", "B2", "C", "D")]
NULL += [Pair(world, common=0.05, seeds=0.03) for world in ("A2", "B1", "B3", "D")]
NULL += [Pair("B1", common=0.05, seeds=0.03, noise=3)]
GAINS = [Pair(world, gains=gains) for world in ("A2", "B1") for gains in (0.02, 0.05, 0.1)]
GAINS += [Pair("B1", common=0.05, seeds=0.03, gains=0.05)]
GAINS += [Pair("B1", common=0.05, seeds=0.03, gains=0.05, noise=3)]
SHIFTS = [Pair(world, shift=shift) for world in ("A2", "B1") for shift in (0.1, 0.2)]
SHIFTS += [Pair("B1", common=0.05, seeds=0.03, shift=0.2)]
SHIFTS += [Pair("B1", common=0.05, seeds=0.03, shift=0.2, noise=3)]


def curves_of(clean_NG, grid_G, x_K, sooner_N):
    """Return noiseless losses at the probes of a run that is sooner by `sooner_N` in x."""
    place_NK = (np.where(np.isfinite(x_K), x_K, grid_G[0])[None] + sooner_N[:, None]) - grid_G[0]
    place_NK = np.clip(place_NK / (grid_G[1] - grid_G[0]), 0, len(grid_G) - 1.001)
    left_NK = place_NK.astype(int)
    share_NK = place_NK - left_NK
    row_N1 = np.arange(len(clean_NG))[:, None]
    loss_NK = clean_NG[row_N1, left_NK] * (1 - share_NK) + clean_NG[row_N1, left_NK + 1] * share_NK
    loss_NK[:, ~np.isfinite(x_K)] = clean_NG[:, :1]
    return loss_NK


def plant(pair, tokens, rng):
    """Return the text, x_K, the losses of all runs, each run's shift, and the mask of the gains."""
    text, x_K = planted_worlds.text_of(tokens, rng, DOCUMENT_TOKENS), planted_worlds.axis()
    low, high = -1.0, float(x_K[-1]) + SOONER + 1.5
    grid_G = np.linspace(low, high, GRID * 60)
    clean_NG = WORLDS[pair.world].draw(text, grid_G, rng)
    sooner_I = pair.seeds * rng.standard_normal(2 + pair.noise)
    runs = []
    gain_N = rng.random(tokens) < pair.gains
    for i, sooner in enumerate(sooner_I):
        sooner_N = sooner + JITTER * rng.standard_normal(tokens)
        if i == 1:
            sooner_N += pair.shift * np.where(text.dataset_N == 0, 1.0, 0.5) + SOONER * gain_N
        clean_NK = curves_of(clean_NG, grid_G, x_K, sooner_N)
        noisy_NK = clean_NK + planted_worlds.noise(text, len(x_K), rng, pair.common)
        runs.append(noisy_NK.astype(np.float32))
    return text, x_K, runs, sooner_I, gain_N


def interval(estimate):
    """Return value and interval; NaN where it is undefined."""
    if not isinstance(estimate, Estimate):
        return [float("nan")] * 3
    return [estimate.value, estimate.low, estimate.high]


def repetition(pair, seed, tokens=4_000, resamples=RESAMPLES):
    """Return calls, factors and the outcome of the test of spectra on one planted pair."""
    numbers = [round(1000 * each) if isinstance(each, float) else each for each in astuple(pair)]
    rng = np.random.default_rng([seed, tokens, list(WORLDS).index(pair.world), *numbers[1:]])
    text, x_K, planted, sooner_I, gain_N = plant(pair, tokens, rng)
    runs, shifts = zip(*(as_fitted(x_K, each, text.dataset_N) for each in planted), strict=True)
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    weight_RU = units.weights(resamples, seed)
    end = float(x_K[-1])
    from_x = float(x_K[1] if pair.world.startswith("A") else np.log(AFTER_UNIGRAMS))
    weight_K = window_weights(x_K, end)
    tables = [
        TokenTable.of_block(fit_sigmoids(x_K, loss_NK), loss_NK, weight_K, end_x=end, from_x=from_x)
        for loss_NK in runs
    ]
    cells = groups_by_frequency(text.dataset_N, text.log_share_N)
    compared = Tables(tables[0], tables[1], tuple(tables[2:]), from_x, end, cells.group_N)
    known = {"dataset": Groups(text.dataset_N.astype(np.int64), DATASETS)}
    by_name = {name: groupings_of(known, compared)[name] for name in (ALL, "dataset")}
    curves = MeanCurves(by_name, units, [x_K] * len(runs))
    for i, loss_NK in enumerate(runs):
        curves.add(i, slice(0, tokens), loss_NK)
    calls = compared.calls()
    means = [mean_RGK[0] for mean_RGK, _ in curves.means("dataset", weight_RU[:1])]
    left = tuple(
        LeftOver.draw(known["dataset"], x_K, means[i], shifts[i], resamples, rng) for i in (0, 1)
    )
    rows = compare_groups(compared, calls, by_name, curves, units, weight_RU, left)
    spectra = compare_spectra(
        *(compared.a, compared.b, compared.noise), (from_x, end), units, weight_RU, seed
    )
    gained, lost = calls
    a, b = compared.a, compared.b
    # A planted gain that could be found: A has not learned the token, B has, by their states.
    possible_N = gain_N & ~a.learned_N & b.learned_N
    whole = rows[ALL][0]
    by_dataset = rows["dataset"]
    run_sooner = float(sooner_I[1] - sooner_I[0])
    return {
        "gained": int(gained.called_N.sum()),
        "false": int((gained.called_N & ~gain_N).sum()),
        "lost": int(lost.called_N.sum()),
        "planted": int((gain_N & ~a.learned_N).sum()),
        "possible": int(possible_N.sum()),
        "excess": interval(whole.gained.excess),
        "run": run_sooner,
        "times": [interval(each.learning_times.factor) for each in (whole, *by_dataset)],
        "times recipe": [interval(each.learning_times.recipe) for each in (whole, *by_dataset)],
        "losses": [interval(each.late_loss.factor) for each in (whole, *by_dataset)],
        "losses recipe": [interval(each.late_loss.recipe) for each in (whole, *by_dataset)],
        "differ": spectra.outcome is Difference.DIFFER,
        "p documents": spectra.p_documents,
    }


def compute(pairs, count, tokens, lines, processes):
    """Compute the repetitions that the lines do not hold."""
    missing = [
        key
        for seed in range(count)
        for pair in pairs
        if (key := (*astuple(pair), seed, tokens)) not in lines.by_key
    ]
    with ProcessPoolExecutor(processes) as pool:
        for key, result in pool.map(_job, missing):
            lines.add(key, result)


def _job(key):
    *pair, seed, tokens = key
    return key, repetition(Pair(*pair), seed, tokens)


def words(pair):
    """Return the columns that say what is planted."""
    return [pair.world, f"{pair.common:g}", f"{pair.seeds:g}", str(pair.noise)]


def of(pair, count, tokens, lines):
    """Return the results of a pair."""
    return [lines.by_key[(*astuple(pair), seed, tokens)] for seed in range(count)]


def null_rows(count, tokens, lines):
    """Yield a row per null pair: false calls, and tests that reject."""
    for pair in NULL:
        found = of(pair, count, tokens, lines)
        excess = [each["excess"] for each in found]
        yield [
            *words(pair),
            share(sum(each["gained"] > 0 for each in found), count),
            share(sum(each["lost"] > 0 for each in found), count),
            share(sum(low <= 0 <= high for _, low, high in excess), count),
            share(sum(each["differ"] for each in found), count),
            share(sum(each["p documents"] <= LEVEL for each in found), count),
        ]


def gain_rows(count, tokens, lines):
    """Yield a row per pair with gains: false discovery rate, power, and tokens lost in vain."""
    for pair in GAINS:
        found = of(pair, count, tokens, lines)
        rates = [each["false"] / max(each["gained"], 1) for each in found]
        hits = sum(each["gained"] - each["false"] for each in found)
        error = stats.sem(rates)
        yield [
            *words(pair),
            f"{pair.gains:.0%}",
            f"{np.mean([each['planted'] for each in found]):.0f}",
            f"{np.mean([each['gained'] for each in found]):.0f}",
            f"{np.mean(rates):.3f} ± {1.96 * error:.3f}",
            f"{hits / max(sum(each['planted'] for each in found), 1):.0%}",
            f"{hits / max(sum(each['possible'] for each in found), 1):.0%}",
            share(sum(each["lost"] > 0 for each in found), count),
        ]


def shift_rows(count, tokens, lines):
    """Yield a row per pair, measure and group: the true factor, its mean and coverage."""
    null = [pair for pair in NULL if pair.world not in ("C", "D")]
    for pair in (*null, *SHIFTS):
        found = of(pair, count, tokens, lines)
        shifts = (0.75 * pair.shift, pair.shift, 0.5 * pair.shift)
        for measure in ("times", "losses"):
            for g, (group, shift) in enumerate(zip(("all", *DATASETS), shifts, strict=True)):
                if (g == 0) == (pair.shift > 0):  # the datasets of shifted pairs, else all tokens
                    continue
                values = np.array([each[measure][g] for each in found])
                recipe = np.array([each[f"{measure} recipe"][g] for each in found])
                true_here = np.exp(shift + np.array([each["run"] for each in found]))
                inside = (values[:, 1] <= true_here) & (true_here <= values[:, 2])
                over = (recipe[:, 1] <= np.exp(shift)) & (np.exp(shift) <= recipe[:, 2])
                excludes = (recipe[:, 1] > 1) | (recipe[:, 2] < 1)
                yield [
                    *words(pair),
                    measure,
                    group,
                    f"{np.exp(shift):.3f}",
                    f"{np.exp(np.nanmean(np.log(values[:, 0]) - np.log(true_here) + shift)):.3f}",
                    share(inside.sum(), count),
                    share(over.sum(), count),
                    f"{np.nanmedian(recipe[:, 2] / recipe[:, 1]) ** 0.5:.2f}",
                    f"{excludes.mean():.0%}",
                ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="pairs of runs of each kind")
    parser.add_argument("--tokens", type=int, default=4_000, help="watched tokens of a run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("compare-run"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import scipy
    import torch
    from table import heading, print_sections

    torch.set_num_threads(1)
    count, tokens = arguments.pairs, arguments.tokens
    lines = Lines(arguments.folder / "pairs.jsonl")
    compute([*NULL, *GAINS, *SHIFTS], count, tokens, lines, arguments.processes)
    about = ["world", "common noise", "seeds' shift", "noise runs"]
    sections = [
        (
            f"B is another seed of A: {count} pairs of each kind",
            [
                *about,
                "pairs with a token gained",
                "with a token lost",
                "interval of the excess has 0",
                "spectra differ",
                "p over documents <= 0.05",
            ],
            null_rows(count, tokens, lines),
        ),
        (
            "Planted gains: false discovery rate (5% is asked for) and power",
            [
                *about,
                "tokens sooner",
                "not learned by A",
                "called",
                "false",
                "found of these",
                "of those that B has learned",
                "pairs with a token lost",
            ],
            gain_rows(count, tokens, lines),
        ),
        (
            "The factor by which B is sooner",
            [
                *about,
                "by",
                "dataset",
                "true",
                "mean",
                "over documents covers",
                "over seeds covers",
                "half width over seeds",
                "over seeds excludes 1",
            ],
            shift_rows(count, tokens, lines),
        ),
    ]
    text = print_sections(sections)
    if arguments.out:
        versions = heading(torch=torch.__version__, scipy=scipy.__version__, numpy=np.__version__)
        command = f"python benchmarks/compare.py --pairs {count} --out {arguments.out}"
        head = ABOUT.format(command=command, versions=versions, tokens=tokens)
        arguments.out.write_text(head + text)


ABOUT = f"""# What `compare` says of planted pairs of runs

`{{command}}`

{{versions}}

The worlds: `tests/support/planted_worlds.py`; {{tokens:,}} tokens in documents of
{DOCUMENT_TOKENS}.
Between two seeds the learning time of a token differs by {JITTER:g} in x (standard deviation, per
run), that of a whole run by the seeds' shift. Tokens of a planted gain are learned e^{SOONER:g}
times sooner by B. Of a shift, the first dataset has all and the second one half. All tokens of a
dataset share the common noise at a probe, of which the fitter takes out what it can tell. Covers:
the interval over documents against the shift of these two runs, that over seeds against the planted
shift.

"""

if __name__ == "__main__":
    main()

"""Verdicts of the evidence tests in planted worlds with and without steps, and their coverage.

    python benchmarks/evidence.py [--runs 500] [--tokens 12000] [--processes 2] [--folder FOLDER]
                                  [--out FILE]

Every finished repetition is a line in FOLDER; an interrupted study resumes there. A repetition of
12,000 tokens takes 2.7 s of one core: the whole study takes about three and a half hours on two.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import planted_worlds
from planted_worlds import WORLDS
from resumable import Lines, share
from scipy import stats

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.primary import COVARIANCE, LOCALITY, ORDER
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import Units, Widths, learning_order, learning_times
from megatron_tokscale.spectrum.evidence.fall_covariance import FallSums, octaves
from megatron_tokscale.spectrum.evidence.falls import OCTAVE, fall_weights, intervals
from megatron_tokscale.spectrum.evidence.order import OTHER_RUN
from megatron_tokscale.spectrum.evidence.surface import (
    Comparison,
    SurfaceSums,
    moving_times,
    time_bins,
)
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency

RESAMPLES, TRUTH_RESAMPLES = 200, 50  # the latter correct the bias alone
COMMON = (0.0, 0.05)
LARGE, LARGE_TOKENS = 4, 96_000  # repetitions that give the true values, and tokens of each
AFTER_UNIGRAMS = 38  # step at which the planted unigram phase is over
PRIMARY = {"locality": LOCALITY, "order": ORDER, "covariance": COVARIANCE}
LEVEL = 0.05
ABOUT = """# What the evidence tests say in worlds with and without steps

`python benchmarks/evidence.py --out benchmarks/results/evidence.md`, seeds 0, 1, 2, ...

{about}

The worlds: `tests/support/planted_worlds.py`; {tokens:,} tokens in documents of {length}, two runs
with the same curves and other noise, with and without noise of {common} nats that all tokens of a
dataset share at a probe. In A1 to B3 every token has a step of its own; in C and D none has. The
tests count the probes from step {after} in B, C and D, where the planted unigram phase is over, and
from the first in A, which has none.

"""
NOTES = """A claim must hold in A1 to B3 (upper bound of "holds" at least 95%) and never fail there;
in C and D the lower bound of "holds" must be at most 5%. True: the mean of {large} pairs of runs of
{large_tokens:,} tokens. p: exact binomial test of 95% coverage; Holm's correction over the table
rejects below {least:.1e}. Intervals count wherever they are defined.
"""


def repetition(world, common, seed, tokens=12_000, resamples=RESAMPLES):
    """Return verdicts and intervals on one planted pair of runs.

    Returns:
        verdicts: outcome of each primary test, by its name.
        intervals: value, low and high of every number, by its name.
    """
    rng = np.random.default_rng([seed, tokens, list(WORLDS).index(world), COMMON.index(common)])
    text, x_K = planted_worlds.text_of(tokens, rng), planted_worlds.axis()
    a_NK, b_NK = planted_worlds.seeds(WORLDS[world], text, x_K, rng, common=common)
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    weight_RU = units.weights(resamples, seed)
    from_x = x_K[1] if world.startswith("A") else np.log(AFTER_UNIGRAMS)
    groups = groups_by_frequency(text.dataset_N, text.log_share_N)
    scored = x_K >= from_x - 1e-9
    widths = Widths.from_losses(
        x_K[scored], b_NK[:, scored], groups.group_N, units.unit_N, seed
    ).result(weight_RU)
    fits, own = fit_sigmoids(x_K, a_NK), fit_sigmoids(x_K, b_NK)
    baseline = {"unigram": text.log_share_N, "mean loss": fits.level_N.astype(float)}
    order = learning_order(
        learning_times(fits), learning_times(own), baseline, units.unit_N, weight_RU
    )
    all_tokens, to_x = slice(0, len(text)), float(x_K[-1])
    sums = FallSums(octaves(from_x, to_x), x_K, x_K, groups, units)
    sums.add(all_tokens, a_NK, b_NK)
    falls = sums.result(weight_RU)
    found = {
        "ratio of median widths": widths.test.estimate,
        "median 10-90% width": widths.observed.width_x.p50,
        "Spearman's rho": order.spearman[OTHER_RUN],
        "partial correlation": order.test.estimate,
        "covariance of far octaves": falls.test.estimate,
        "covariance of neighbours": falls.profile[1],
        "reproducible share": falls.reproducible,
    }
    try:
        compared = Comparison(x_K, x_K, fall_weights(x_K, intervals(from_x, to_x, OCTAVE / 2)))
        surface = SurfaceSums(time_bins(moving_times(fits)), groups, compared, units)
        surface.add(all_tokens, fits, a_NK, b_NK)
        result = surface.result(weight_RU)
        found |= {f"surface, {name}": test.estimate for name, test in result.tests.items()}
    except UndefinedError:
        pass
    return {
        "verdicts": {
            name: str(test.verdict)
            for name, test in zip(PRIMARY, (widths.test, order.test, falls.test), strict=True)
        },
        "intervals": {
            name: [each.value, each.low, each.high]
            for name, each in found.items()
            if not isinstance(each, Undefined)
        },
    }


def _job(key):
    kind, world, common, seed, tokens = key
    resamples = TRUTH_RESAMPLES if kind == "truth" else RESAMPLES
    return key, repetition(world, common, seed, tokens, resamples)


def compute(runs, tokens, lines, processes):
    """Compute the repetitions that have no line yet: a seed of all worlds after the other."""
    configurations = [(world, common) for common in COMMON for world in WORLDS]
    keys = [
        ("truth", *each, seed, LARGE_TOKENS) for seed in range(LARGE) for each in configurations
    ]
    keys = [("run", *each, seed, tokens) for seed in range(runs) for each in configurations] + keys
    missing = [key for key in keys if key not in lines.by_key]
    with ProcessPoolExecutor(processes) as pool:
        for key, result in pool.map(_job, missing):
            lines.add(key, result)


def verdict_rows(runs, tokens, lines):
    """Yield a row per world and primary test: shares of the three verdicts."""
    for common in COMMON:
        for world, planted in WORLDS.items():
            found = [lines.by_key["run", world, common, seed, tokens] for seed in range(runs)]
            for test, claim in PRIMARY.items():
                counts = [
                    sum(each["verdicts"][test] == outcome for each in found) for outcome in Verdict
                ]
                expected = "holds" if planted.stepwise else "does not hold"
                shares = [share(count, runs) for count in counts]
                yield [world, f"{common:g}", f"{test}: {claim.rule}", expected, *shares]


def coverage_rows(runs, tokens, lines):
    """Return a row per world and number: truth, mean, coverage and its p-value."""
    rows = []
    for common in COMMON:
        for world in WORLDS:
            found = [lines.by_key["run", world, common, seed, tokens] for seed in range(runs)]
            large = [
                lines.by_key["truth", world, common, seed, LARGE_TOKENS] for seed in range(LARGE)
            ]
            for name in large[0]["intervals"]:
                true = np.mean([each["intervals"][name][0] for each in large])
                drawn = [each["intervals"].get(name, [np.nan] * 3) for each in found]
                value, low, high = np.array(drawn, dtype=float).T
                known = np.isfinite(low)
                if not known.any():
                    continue
                covered = int(((low <= true) & (true <= high))[known].sum())
                p_value = stats.binomtest(covered, int(known.sum()), 1 - LEVEL).pvalue
                rows.append(
                    [
                        *(world, f"{common:g}", name, f"{true:.4f}"),
                        f"{value[known].mean():.4f}",
                        share(covered, int(known.sum())),
                        f"{p_value:.2g}",
                    ]
                )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500, help="pairs of runs of each world")
    parser.add_argument("--tokens", type=int, default=12_000, help="watched tokens of a run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("evidence-run"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import scipy
    import torch
    from table import heading, print_sections

    torch.set_num_threads(1)
    runs, tokens = arguments.runs, arguments.tokens
    lines = Lines(arguments.folder / "worlds.jsonl")
    compute(runs, tokens, lines, arguments.processes)
    coverage = coverage_rows(runs, tokens, lines)
    shares = [f'share of "{outcome}"' for outcome in Verdict]
    sections = [
        (
            f"Verdicts of the primary tests, {runs} pairs of runs of each world",
            ["world", "common noise", "test", "should", *shares],
            list(verdict_rows(runs, tokens, lines)),
        ),
        (
            f"Coverage of the 95% intervals over documents, {runs} pairs of runs of each world",
            ["world", "common noise", "number", "true", "mean", "covered", "p"],
            coverage,
        ),
    ]
    text = print_sections(sections)
    if arguments.out:
        about = heading(torch=torch.__version__, scipy=scipy.__version__, numpy=np.__version__)
        head = ABOUT.format(
            about=about,
            tokens=tokens,
            length=planted_worlds.DOCUMENT_TOKENS,
            common=COMMON[1],
            after=AFTER_UNIGRAMS,
        )
        notes = NOTES.format(
            large=LARGE, large_tokens=LARGE_TOKENS, least=LEVEL / max(len(coverage), 1)
        )
        arguments.out.write_text(head + text + notes)


if __name__ == "__main__":
    main()

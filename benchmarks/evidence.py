"""Verdicts of the evidence tests in planted worlds with and without steps, and their coverage.

    PYTHONPATH=tests/support python benchmarks/evidence.py [--runs 500] [--tokens 4000]
        [--processes 2] [--folder FOLDER] [--tally FILE] [--recount-surface] [--out FILE]

Every finished repetition is a line in FOLDER; an interrupted study resumes there. A repetition of
4,000 tokens takes about a second of one core: the whole study takes an hour and a half on two.
--recount-surface counts the surface anew, and nothing else, in as many runs as the tally holds: for
a change of the surface. It takes a third of the time.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import planted_worlds
from planted_worlds import WORLDS, as_fitted
from resumable import Lines, share
from scipy import stats

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.fit.common_shifts import draw_left_over
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.primary import COVARIANCE, LOCALITY, ORDER
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import Units, Widths, learning_order, learning_times
from megatron_tokscale.spectrum.evidence.fall_covariance import FallSums, octaves
from megatron_tokscale.spectrum.evidence.falls import OCTAVE, fall_weights, intervals
from megatron_tokscale.spectrum.evidence.locality import COMMON_DRAWS, CommonNoise
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
DOCUMENT_TOKENS = 100  # 40 documents to resample from 4,000 tokens, as the demo's probe set has 44
LARGE_TOKENS = 16_000
LARGE, LARGE_SURFACE = 16, 64  # repetitions of so many tokens that give the true values
AT_THIS_SIZE = {"ratio of median widths"}  # numbers whose true value is the mean of the first runs
AFTER_UNIGRAMS = 38  # step at which the planted unigram phase is over
CONFIGURATIONS = [(world, common) for common in COMMON for world in WORLDS]
PRIMARY = {"locality": LOCALITY, "order": ORDER, "covariance": COVARIANCE}
LEVEL = 0.05
SURFACE, SURFACE_TRUTH = "surface", "surface truth"
LARGE_KINDS = {"truth": LARGE, SURFACE_TRUTH: LARGE_SURFACE}
ABOUT = """# What the evidence tests say in worlds with and without steps

`python benchmarks/evidence.py --runs {runs} --tally benchmarks/results/evidence_tally.json --out
benchmarks/results/evidence.md`, seeds 0, 1, 2, ... The tally holds the counts; a call with more
runs adds to it.

{about}

The worlds: `tests/support/planted_worlds.py`; {tokens:,} tokens in documents of {length}, two runs
with the same curves and other noise, with and without noise of {common} nats that all tokens of a
dataset share at a probe; of it, the fitter takes out what it can tell (`fit/common_shifts.py`). In
A1 to B3 every token has a step of its own; in C and D none has. The tests count the probes from
step {after} in B, C and D, where the planted unigram phase is over, and from the first in A, which
has none.

"""
NOTES = """A claim must hold in A1 to B3 (upper bound of "holds" at least 95%) and never fail
there; in C and D the lower bound of "holds" must be at most 5%. True: the mean of {large} pairs
of runs of {large_tokens:,} tokens, of the surface of {surface}. The ratio of median widths is an
exception: the curves of its null model are means of the sample's own groups, and their noise makes
the null model's transitions a little narrower, so its true value is that of samples of this size
(the mean of the repetitions). At 4,000 tokens the ratio is up to 2% above that of 48,000, against a
verdict of "holds". p: exact binomial test of 95% coverage; Holm's correction over the table rejects
it for too few covered in {few} of {rows} rows, and for too many in {many}.
Intervals count wherever they are defined.
"""


@dataclass(frozen=True)
class Pair:
    """Two planted runs with the same curves, whose common shifts are taken out, and their text."""

    x_K: np.ndarray
    text: planted_worlds.Text
    a_NK: np.ndarray
    b_NK: np.ndarray
    b_shifts: tuple
    from_x: float

    @classmethod
    def of(cls, world, common, seed, tokens):
        number = list(WORLDS).index(world)
        rng = np.random.default_rng([seed, tokens, number, COMMON.index(common)])
        text, x_K = planted_worlds.text_of(tokens, rng, DOCUMENT_TOKENS), planted_worlds.axis()
        (a_NK, _), (b_NK, b_shifts) = (
            as_fitted(x_K, loss_NK, text.dataset_N)
            for loss_NK in planted_worlds.seeds(WORLDS[world], text, x_K, rng, common=common)
        )
        from_x = x_K[1] if world.startswith("A") else np.log(AFTER_UNIGRAMS)
        return cls(x_K, text, a_NK, b_NK, b_shifts, from_x)

    @cached_property
    def units(self):
        return Units.from_documents(self.text.dataset_N, self.text.document_N, seed=0)

    @cached_property
    def groups(self):
        return groups_by_frequency(self.text.dataset_N, self.text.log_share_N)


def repetition(world, common, seed, tokens=4_000, resamples=RESAMPLES):
    """Return verdicts and intervals on one planted pair of runs.

    Returns:
        verdicts: outcome of each primary test, by its name.
        intervals: value, low and high of every number, by its name.
    """
    pair = Pair.of(world, common, seed, tokens)
    fits = fit_sigmoids(pair.x_K, pair.a_NK)
    weight_RU = pair.units.weights(resamples, seed)
    widths = widths_of(pair, weight_RU, seed)
    order = order_of(pair, fits, weight_RU)
    falls = falls_of(pair, weight_RU)
    found = {
        "ratio of median widths": widths.test.estimate,
        "median 10-90% width": widths.observed.width_x.p50,
        "Spearman's rho": order.spearman[OTHER_RUN],
        "partial correlation": order.test.estimate,
        "covariance of far octaves": falls.test.estimate,
        "covariance of neighbours": falls.profile[1],
        "reproducible share": falls.reproducible,
        **surface_of(pair, fits),
    }
    tests = (widths.test, order.test, falls.test)
    return {
        "verdicts": {name: str(test.verdict) for name, test in zip(PRIMARY, tests, strict=True)},
        "intervals": as_lists(found),
    }


def surface_repetition(world, common, seed, tokens):
    """Return what `repetition` does, of the surface alone."""
    pair = Pair.of(world, common, seed, tokens)
    found = surface_of(pair, fit_sigmoids(pair.x_K, pair.a_NK))
    return {"verdicts": {}, "intervals": as_lists(found)}


def as_lists(found):
    """Return value, low and high of the numbers that are defined."""
    return {
        name: [each.value, each.low, each.high]
        for name, each in found.items()
        if not isinstance(each, Undefined)
    }


def widths_of(pair, weight_RU, seed):
    """Return the widths of run B beside those of their groups' curves."""
    x_K, dataset_N = pair.x_K, pair.text.dataset_N
    scored = x_K >= pair.from_x - 1e-9
    means_DK = np.array([pair.b_NK[dataset_N == d].mean(axis=0, dtype=float) for d in (0, 1)])
    rng = np.random.default_rng(seed)
    left_BDK = draw_left_over(x_K, means_DK, pair.b_shifts, COMMON_DRAWS, rng)
    noise = CommonNoise(left_BDK[..., scored], dataset_N)
    return Widths.from_losses(
        x_K[scored], pair.b_NK[:, scored], pair.groups.group_N, pair.units.unit_N, seed, noise
    ).result(weight_RU)


def order_of(pair, fits, weight_RU):
    """Return the agreement of the learning times of both runs."""
    times = [learning_times(each) for each in (fits, fit_sigmoids(pair.x_K, pair.b_NK))]
    baseline = {"unigram": pair.text.log_share_N, "mean loss": fits.level_N.astype(float)}
    return learning_order(*times, baseline, pair.units.unit_N, weight_RU)


def falls_of(pair, weight_RU):
    """Return the covariance of the tokens' falls by octave in both runs."""
    edges = octaves(pair.from_x, float(pair.x_K[-1]))
    sums = FallSums(edges, pair.x_K, pair.x_K, pair.groups, pair.units)
    sums.add(slice(0, len(pair.text)), pair.a_NK, pair.b_NK)
    return sums.result(weight_RU)


def surface_of(pair, fits):
    """Return the skills of the surface by name; none where it is undefined."""
    try:
        edges = intervals(pair.from_x, float(pair.x_K[-1]), OCTAVE / 2)
        compared = Comparison(pair.x_K, pair.x_K, fall_weights(pair.x_K, edges))
        bins = time_bins(moving_times(fits), pair.x_K)
        sums = SurfaceSums(bins, pair.groups, compared, pair.units)
        sums.add(slice(0, len(pair.text)), fits, pair.a_NK, pair.b_NK)
        tests = sums.result().tests
    except UndefinedError:
        return {}
    return {f"{SURFACE}, {name}": test.estimate for name, test in tests.items()}


def _job(key):
    kind, world, common, seed, tokens = key
    if kind.startswith(SURFACE):
        return key, surface_repetition(world, common, seed, tokens)
    resamples = TRUTH_RESAMPLES if kind == "truth" else RESAMPLES
    return key, repetition(world, common, seed, tokens, resamples)


def compute(tally, runs, lines, processes):
    """Compute the repetitions that have no line yet: a seed of all worlds after the other.

    A tally that holds the numbers of a world holds their true values too.
    """
    rows = {each: tally["worlds"][name_of(*each)] for each in CONFIGURATIONS}
    new = [each for each in CONFIGURATIONS if not rows[each]["numbers"]]
    keys = [*large_keys("truth", LARGE, new), *large_keys(SURFACE_TRUTH, LARGE_SURFACE, new)]
    keys += [
        ("run", *each, seed, tally["tokens"])
        for seed in range(runs)
        for each in CONFIGURATIONS
        if seed >= rows[each]["runs"]
    ]
    compute_lines(keys, lines, processes)


def compute_surface(tally, lines, processes):
    """Compute the surface of all repetitions that the tally counts, and of those of true values."""
    keys = large_keys(SURFACE_TRUTH, LARGE_SURFACE, CONFIGURATIONS)
    most = max(row["runs"] for row in tally["worlds"].values())
    keys += [
        (f"{SURFACE} run", *each, seed, tally["tokens"])
        for seed in range(most)
        for each in CONFIGURATIONS
        if seed < tally["worlds"][name_of(*each)]["runs"]
    ]
    compute_lines(keys, lines, processes)


def large_keys(kind, repetitions, configurations):
    """Return the keys of the repetitions that give true values."""
    return [
        (kind, *each, seed, LARGE_TOKENS) for seed in range(repetitions) for each in configurations
    ]


def compute_lines(keys, lines, processes):
    """Compute the repetitions that have no line yet."""
    missing = [key for key in keys if key not in lines.by_key]
    with ProcessPoolExecutor(processes) as pool:
        for key, result in pool.map(_job, missing):
            lines.add(key, result)


def name_of(world, common):
    """Return the name of a world with common noise in the tally."""
    return f"{world}, {common:g}"


def first_tally(tokens):
    """Return the counts of no repetition.

    A tally may have a note: what its counts do not share with those of the present code.
    """
    worlds = {name_of(*each): {"runs": 0, "verdicts": {}, "numbers": {}} for each in CONFIGURATIONS}
    return {"tokens": tokens, "worlds": worlds}


def add_to_tally(tally, runs, lines):
    """Count the repetitions up to `runs` that the tally does not hold yet.

    Of every verdict it holds the count of each outcome; of every number the true value, how many
    repetitions define it, how many intervals cover the true value, and the sum of the values.
    """
    for each in CONFIGURATIONS:
        row = tally["worlds"][name_of(*each)]
        first = row["runs"]
        if not row["numbers"]:
            row["numbers"] = true_numbers(LARGE_KINDS, "run", each, runs, tally, lines)
        for seed in range(first, runs):
            found = lines.by_key["run", *each, seed, tally["tokens"]]
            for test, outcome in found["verdicts"].items():
                counts = row["verdicts"].setdefault(test, {})
                counts[outcome] = counts.get(outcome, 0) + 1
            count(row["numbers"], found["intervals"])
        row["runs"] = max(runs, first)


def recount_surface(tally, lines):
    """Put new counts of the surface in the place of those of the tally."""
    truth, run = {SURFACE_TRUTH: LARGE_SURFACE}, f"{SURFACE} run"
    for each in CONFIGURATIONS:
        row = tally["worlds"][name_of(*each)]
        numbers = true_numbers(truth, run, each, row["runs"], tally, lines)
        for seed in range(row["runs"]):
            count(numbers, lines.by_key[run, *each, seed, tally["tokens"]]["intervals"])
        row["numbers"].update(numbers)


def true_numbers(truth, run, configuration, runs, tally, lines):
    """Return the true value of every number, with no repetition counted.

    `truth` has the repetitions of each kind of true values; a later kind counts.
    """
    large = {}
    for kind, repetitions in truth.items():
        keys = large_keys(kind, repetitions, [configuration])
        of_kind = [lines.by_key[key]["intervals"] for key in keys]
        large |= dict.fromkeys(of_kind[0], of_kind)
    first = [
        lines.by_key[run, *configuration, seed, tally["tokens"]]["intervals"]
        for seed in range(runs)
    ]
    true_of = {name: first if name in AT_THIS_SIZE else of_kind for name, of_kind in large.items()}
    return {
        name: [float(np.mean([each[name][0] for each in found])), 0, 0, 0.0]
        for name, found in true_of.items()
    }


def count(numbers, found):
    """Add a repetition to the counts of the numbers."""
    for name, (value, low, high) in found.items():
        if name in numbers and np.isfinite(low):
            true, known, covered, total = numbers[name]
            covers = int(low <= true <= high)
            numbers[name] = [true, known + 1, covered + covers, total + value]


def pairs_of(tally):
    """Return in words how many pairs of runs of each world the tally counts."""
    counts = [tally["worlds"][name_of(next(iter(WORLDS)), common)]["runs"] for common in COMMON]
    if len(set(counts)) == 1:
        return f"{counts[0]} pairs of runs of each world"
    return f"{counts[0]} pairs of runs of each world without common noise, {counts[1]} with it"


def verdict_rows(tally):
    """Yield a row per world and primary test: shares of the three verdicts."""
    for world, common in CONFIGURATIONS:
        row = tally["worlds"][name_of(world, common)]
        for test, claim in PRIMARY.items():
            expected = "holds" if WORLDS[world].stepwise else "does not hold"
            counts = [row["verdicts"][test].get(str(outcome), 0) for outcome in Verdict]
            shares = [share(count, row["runs"]) for count in counts]
            yield [world, f"{common:g}", f"{test}: {claim.rule}", expected, *shares]


def coverage_rows(tally):
    """Return a row per world and number: truth, mean, coverage and its p-value."""
    rows = []
    for world, common in CONFIGURATIONS:
        numbers = tally["worlds"][name_of(world, common)]["numbers"]
        for name, (true, known, covered, total) in numbers.items():
            if known:
                p_value = stats.binomtest(covered, known, 1 - LEVEL).pvalue
                shown = [f"{true:.4f}", f"{total / known:.4f}", share(covered, known)]
                rows.append([world, f"{common:g}", name, *shown, f"{p_value:.2g}"])
    return rows


def rejected(tally):
    """Return the numbers of rows whose coverage is below and above 95% by Holm's test."""
    rows = [
        (stats.binomtest(covered, known, 1 - LEVEL).pvalue, covered < (1 - LEVEL) * known)
        for world in tally["worlds"].values()
        for _, known, covered, _ in world["numbers"].values()
        if known
    ]
    few_many = [0, 0]
    for rank, (p_value, is_few) in enumerate(sorted(rows)):
        if p_value > LEVEL / (len(rows) - rank):
            break
        few_many[not is_few] += 1
    return few_many


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500, help="pairs of runs of each world")
    parser.add_argument("--tokens", type=int, default=4_000, help="watched tokens of a run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("evidence-run"))
    parser.add_argument("--tally", type=Path, help="counts of earlier runs; these are added to it")
    parser.add_argument(
        "--recount-surface", action="store_true", help="count the surface anew, and nothing else"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import scipy
    import torch
    from table import heading, print_sections

    torch.set_num_threads(1)
    runs, tokens = arguments.runs, arguments.tokens
    lines = Lines(arguments.folder / "worlds.jsonl")
    tally = first_tally(tokens)
    if arguments.tally and arguments.tally.is_file():
        tally = json.loads(arguments.tally.read_text())
    if arguments.recount_surface:
        compute_surface(tally, lines, arguments.processes)
        recount_surface(tally, lines)
    else:
        compute(tally, runs, lines, arguments.processes)
        add_to_tally(tally, runs, lines)
    if arguments.tally:
        arguments.tally.write_text(json.dumps(tally) + "\n")
    coverage = coverage_rows(tally)
    shares = [f'share of "{outcome}"' for outcome in Verdict]
    sections = [
        (
            f"Verdicts of the primary tests, {pairs_of(tally)}",
            ["world", "common noise", "test", "should", *shares],
            list(verdict_rows(tally)),
        ),
        (
            f"Coverage of the 95% intervals over documents, {pairs_of(tally)}",
            ["world", "common noise", "number", "true", "mean", "covered", "p"],
            coverage,
        ),
    ]
    text = print_sections(sections)
    if arguments.out:
        about = heading(torch=torch.__version__, scipy=scipy.__version__, numpy=np.__version__)
        head = ABOUT.format(
            about=about,
            runs=runs,
            tokens=tokens,
            length=DOCUMENT_TOKENS,
            common=COMMON[1],
            after=AFTER_UNIGRAMS,
        )
        few, many = rejected(tally)
        notes = NOTES.format(
            large=LARGE,
            large_tokens=LARGE_TOKENS,
            surface=LARGE_SURFACE,
            few=few,
            many=many,
            rows=len(coverage),
        )
        arguments.out.write_text(head + text + notes + tally.get("note", ""))


if __name__ == "__main__":
    main()

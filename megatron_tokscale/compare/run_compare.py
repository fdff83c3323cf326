"""`compare_runs`: compare two runs on one probe set token by token, and write compare.json.

Shapes: N tokens, K probe steps.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_tokscale.compare.calls import RATE
from megatron_tokscale.compare.common_end import CutRun, RunsToCompare
from megatron_tokscale.compare.common_noise import LeftOver
from megatron_tokscale.compare.examples import strongest, tokenizer_of
from megatron_tokscale.compare.group_rows import (
    ALL,
    MeanCurves,
    Tables,
    compare_groups,
    groupings_of,
)
from megatron_tokscale.compare.late_loss import WINDOW
from megatron_tokscale.compare.spectra import SWAPS, compare_spectra
from megatron_tokscale.compare.token_table import TokenTable, read_table
from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import MOST_UNITS
from megatron_tokscale.core.schemas import COMPARISON_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.core.writable import unwritable
from megatron_tokscale.results.comparison import (
    ComparedRun,
    Comparison,
    ComparisonSettings,
    read_comparison,
)
from megatron_tokscale.results.estimate import defined_or_reason
from megatron_tokscale.spectrum.evidence.token_groups import token_groups
from megatron_tokscale.spectrum.groups import Groups, groupings
from megatron_tokscale.store import Run, WatchedTokens
from megatron_tokscale.store.reader import Time

FILE = "compare.json"
_VALUES_PER_UNIT, _LEAST_UNITS = 2**16, 128
"""Bounds of the tables of units, groups and probes: many probes leave fewer units."""
_VALUES_PER_READ = 2**24  # losses of a block: 64 MB
_DATASETS = "datasets of the common noise"  # a grouping that is not shown
_PROBES_DIFFER = 1.25
"""Ratio of the numbers of probes in the compared range from which a note says so (our choice)."""
_RATE_DIFFERS = 0.2
"""Difference of the shares of the peak learning rate from which a note says so (our choice)."""


def compare_runs(
    a: Run,
    b: Run,
    noise: Sequence[Run] = (),
    *,
    out: Path | None = None,
    clock: Time | None = None,
    tokenizer: Path | None = None,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> Comparison:
    """Compare run B with run A token by token, and write compare.json.

    The runs are compared at their common end: the earliest last probe of all of them. The losses
    are read twice by blocks; memory grows by some tens of bytes per token and run.

    Args:
        a: the baseline, fitted.
        b: the other run, fitted, with the same probe set.
        noise: further seeds of the baseline, fitted; without any, calls are undecided.
        out: folder of compare.json; by default A/analysis/compare/NAME-OF-B (`_folder_name`).
        clock: unit of the time in which the runs are compared; by default tokens, else steps, else
            the unit of imported runs.
        tokenizer: tokenizer.json to show tokens as text; None to show ids.
        n_resamples: bootstrap resamples of the documents, or of what stands in for them.
        seed: seed of all draws.
        progress: receiver of the name of each stage; None for none.

    Returns:
        The content of compare.json.

    Raises:
        TokscaleError: the runs cannot be compared (`RunsToCompare.open`), no token has all losses
            in all of them, the tokenizer cannot be used, or `out` cannot be written to.
    """
    progress = progress or NoProgress()
    runs = RunsToCompare.open(a, b, noise, clock)
    path = (out or a.paths.comparison(_folder_name(a.path, b.path))) / FILE
    _check_out(path, runs)
    decoder = tokenizer_of(tokenizer, a.tokens)
    progress.stage("states and late losses of tokens")
    from_x = runs.scored_from
    every = [read_table(each, from_x) for each in runs.every]
    token_N = _compared(every)
    if not len(token_N):
        raise TokscaleError(
            f"no token has a fit and finite losses in all {len(every)} runs; leave out the runs "
            "that have diverged"
        )
    tables = _tables(every, token_N, runs, from_x)
    most = max(_VALUES_PER_UNIT // max(len(each.x_K) for each in runs.every), _LEAST_UNITS)
    units = a.tokens.units(seed, min(most, MOST_UNITS))
    units = replace(units, unit_N=units.unit_N[token_N])
    weight_RU = units.weights(n_resamples, seed)
    known = {name: each.rows(token_N) for name, each in groupings(a.tokens).items()}
    by_name = groupings_of(known, tables)
    progress.stage("mean losses of groups")
    datasets = Groups(a.tokens.dataset_N[token_N].astype(np.int64), tuple(a.tokens.datasets))
    curves = MeanCurves(
        {**by_name, _DATASETS: datasets}, units, [each.x_K[: each.n_used] for each in runs.every]
    )
    for number, each in enumerate(runs.every):
        _add_losses(curves, number, each, token_N)
    progress.stage("tokens gained and lost, and shifts")
    calls = tables.calls()
    left = _left_over(runs, datasets, curves, weight_RU, seed)
    rows = compare_groups(tables, calls, by_name, curves, units, weight_RU, left)
    gained, lost = (strongest(each, tables, token_N, a.tokens, decoder) for each in calls)
    progress.stage("spectra")
    span = (from_x, runs.end)
    spectra = defined_or_reason(
        lambda: compare_spectra(tables.a, tables.b, tables.noise, span, units, weight_RU, seed)
    )
    named = zip(runs.every, _names(runs), strict=True)
    compared_a, compared_b, *compared_noise = (_compared_run(each, name) for each, name in named)
    comparison = Comparison(
        a=compared_a,
        b=compared_b,
        noise=tuple(compared_noise),
        probe_fingerprint=a.tokens.fingerprint,
        clock=runs.clock,
        clock_name=a.time_name(runs.clock),
        end=float(np.exp(runs.end)),
        n_tokens=a.n_tokens,
        compared=len(token_N),
        n_units=units.documents,
        unit_kind=units.kind,
        notes=tuple(_notes(runs, a.tokens, len(token_N))),
        overall=rows[ALL][0],
        groups={name: each for name, each in rows.items() if name != ALL},
        spectra=spectra,
        gained=gained,
        lost=lost,
        settings=ComparisonSettings(RATE, WINDOW, n_resamples, SWAPS, seed),
    )
    write_typed_result(path, COMPARISON_SCHEMA, comparison)
    return comparison


def _folder_name(a: Path, b: Path) -> str:
    """Return the path of B from the folder that A lies in, joined by "-".

    A run beside A keeps its own name; runs of one name in other folders differ by these.
    """
    from_a = os.path.relpath(b.resolve(), a.resolve().parent)
    return "-".join(each for each in Path(from_a).parts if each != "..") or b.resolve().name


def _check_out(path: Path, runs: RunsToCompare) -> None:
    """Refuse a path that cannot be written to, or that has the comparison of other runs."""
    if reason := unwritable(path.parent, path.name):
        raise TokscaleError(
            f"{path} cannot be written ({reason}); expected a folder that you may write to; give "
            "another --out"
        )
    if not is_there(path):
        return
    try:
        found = read_comparison(path)
    except TokscaleError as error:
        raise TokscaleError(
            f"{path} is there, and is no comparison that this version reads; it is not replaced; "
            "move it away, or give another --out"
        ) from error
    before = (found.a.fit.run_id, found.b.fit.run_id)
    here = tuple(each.source.run.info.run_id for each in (runs.a, runs.b))
    if before != here:
        raise TokscaleError(
            f"{path} has the comparison of other runs, {found.a.name} and {found.b.name}; it is "
            "not replaced; give another --out"
        )


def _compared(tables: Sequence[TokenTable]) -> Integers:
    """Return the numbers of the tokens that are complete in all runs."""
    complete_N = np.logical_and.reduce([each.complete_N for each in tables])
    return np.flatnonzero(complete_N)


def _tables(
    every: Sequence[TokenTable], token_N: Integers, runs: RunsToCompare, from_x: float
) -> Tables:
    """Return the tables of the compared tokens."""
    first, second, *noise = (each.rows(token_N) for each in every)
    cells = token_groups(runs.a.source.run.tokens).rows(token_N)
    return Tables(first, second, tuple(noise), from_x, runs.end, cells.group_N)


def _add_losses(curves: MeanCurves, number: int, run: CutRun, token_N: Integers) -> None:
    """Add the losses of the compared tokens of a run up to the common end, by blocks."""
    n_tokens = run.source.run.n_tokens
    block = max(_VALUES_PER_READ // len(run.x_K), 1)
    for start in range(0, n_tokens, block):
        tokens = slice(start, min(start + block, n_tokens))
        first, last = np.searchsorted(token_N, (tokens.start, tokens.stop)).tolist()
        loss_NK = run.source.fitted_losses(tokens)[token_N[first:last] - start]
        curves.add(number, slice(first, last), loss_NK[:, : run.n_used])


def _left_over(
    runs: RunsToCompare, datasets: Groups, curves: MeanCurves, weight_RU: Floats, seed: int
) -> tuple[LeftOver, LeftOver]:
    """Draw the common noise that the fits of A and B leave in the losses."""
    first, second, *_ = (mean_RDK[0] for mean_RDK, _ in curves.means(_DATASETS, weight_RU[:1]))
    rng = np.random.default_rng([seed, 3])
    found = [
        LeftOver.draw(
            datasets,
            run.source.x_K[: run.n_used],
            mean_DK,
            run.source.fit.common_shifts,
            len(weight_RU) - 1,
            rng,
        )
        for run, mean_DK in ((runs.a, first), (runs.b, second))
    ]
    return found[0], found[1]


def _names(runs: RunsToCompare) -> list[str]:
    """Return the names of the runs' folders, with as many folders above as tell them apart."""
    parts = [each.source.run.path.resolve().parts for each in runs.every]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _compared_run(run: CutRun, name: str) -> ComparedRun:
    source = run.source
    return ComparedRun(
        name=name,
        fit=source.fit.identity,
        last=float(np.exp(run.x_K[-1])),
        used=float(np.exp(run.x_K[run.n_kept - 1])),
        probes=run.n_kept,
        refitted=run.goes_on,
        learning_rate=run.rate_share,
    )


def _notes(runs: RunsToCompare, tokens: WatchedTokens, compared: int) -> list[str]:
    """Return sentences on what limits the comparison."""
    names = _names(runs)
    notes: list[str] = []
    if longer := [n for n, each in zip(names, runs.every, strict=True) if each.goes_on]:
        notes.append(
            f"compared at the common end; {', '.join(longer)} goes on after it, and was cut there "
            "and fitted again"
        )
    probes = [int(np.sum(each.x_K[: each.n_kept] > runs.scored_from - 1e-6)) for each in runs.every]
    if max(probes) > _PROBES_DIFFER * min(probes):
        listed = ", ".join(f"{n} {each}" for n, each in zip(names, probes, strict=True))
        notes.append(
            f"the runs have different numbers of probes in the compared range ({listed}): the fits "
            "of one training differ by that alone, and with them learned tokens, learning times "
            "and spectra; late losses differ little; give the runs one probe schedule"
        )
    share = [each.rate_share for each in runs.every]
    if np.ptp([each for each in share if np.isfinite(each)] or [0.0]) > _RATE_DIFFERS:
        listed = ", ".join(f"{n} {each:.2f}" for n, each in zip(names, share, strict=True))
        notes.append(
            f"the learning rates at the common end are different shares of their peaks ({listed}): "
            "a decay lowers the losses of all tokens together"
        )
    seeds = [each.source.run.launches[0].seed for each in runs.every if each.source.run.launches]
    if len(seeds) == len(names) and seeds[0] in seeds[2:]:
        notes.append("a noise run has the seed of A: it shows less than the noise between seeds")
    if compared < tokens.n_tokens:
        notes.append(
            f"{tokens.n_tokens - compared:,} of {tokens.n_tokens:,} tokens have losses that are "
            "NaN or infinite in one of the runs, and are left out"
        )
    if note := tokens.note_on_units():
        notes.append(note)
    return notes

"""`transfer_run`: learning times of one run against the losses of another, to transfer.json.

Shapes: N tokens, K probe steps, U resampling units, R resamples.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.checked import write_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.resampling import MOST_UNITS, Units
from megatron_tokscale.core.schemas import TRANSFER_SCHEMA
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.laws.plain import or_reason
from megatron_tokscale.results import FittedRun, heading, known_transfers
from megatron_tokscale.spectrum.evidence.order import learning_order
from megatron_tokscale.spectrum.evidence.transfer import PERMUTATIONS, Alignment, TransferSums
from megatron_tokscale.spectrum.groups import (
    Groups,
    groupings,
    learning_times,
    plain_predictors,
)
from megatron_tokscale.spectrum.run_spectrum import drawn
from megatron_tokscale.spectrum.sums import loss_sums
from megatron_tokscale.store import Run

_RANKED_TOKENS = 500_000
_VALUES_PER_GROUP, _LEAST_UNITS = 2**16, 128  # bounds the tables of units, groups and probes


def transfer_run(
    source: Run,
    target: Run,
    *,
    n_resamples: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Do `source`'s learning times say when `target` learns? Into `target`'s transfer.json.

    An entry per source run; that of the same run is replaced.

    Args:
        source: a fitted run (A).
        target: a fitted run (B) with the same probe set; its fits serve as the ceiling.
        n_resamples: bootstrap resamples of the documents.
        seed: of the draws, the permutations and the bootstrap.
        progress: called with a word on what is done next.

    Returns:
        The entry: by alignment and grouping the skills of `TransferSums.result`, and the learning
        order (`learning_order`).

    Raises:
        TokscaleError: the runs are one, watch other tokens, count other times, or one is not
            fitted; no token has all losses in both; the target's transfer.json is damaged.
    """
    say = progress or (lambda _: None)
    runs = fitted_pair(source, target)
    tokens = target.probe_set
    most_units = max(_VALUES_PER_GROUP // len(runs[1].x_K), _LEAST_UNITS)
    units = Units.from_documents(
        tokens.dataset_N, tokens.document_N, seed, min(most_units, MOST_UNITS)
    )
    weight_RU = units.weights(n_resamples, seed)
    say("mean curves and learning times")
    mean_K, time_N = _means_and_times(runs)
    groups = groupings(tokens, time_N[0])
    result: dict[str, Any] = {}
    for name in ("absolute", "by loss"):
        say(f"groups of tokens, aligned {name}" if name == "by loss" else "groups of tokens")
        result[name] = or_reason(
            partial(_aligned, name, runs, mean_K, groups, units, weight_RU, seed)
        )
    say("learning order")
    sample = drawn(target.n_tokens, _RANKED_TOKENS, seed)
    plain = plain_predictors(tokens) | {"mean loss in the other run": time_N[2]}
    result["order"] = learning_order(
        time_N[0][sample],
        time_N[1][sample],
        {key: value[sample] for key, value in plain.items()},
        units.unit_N[sample],
        weight_RU,
    )
    entry = {
        "source": source.path.name,
        "source_run_id": source.info.run_id,
        "source_steps": source.step_K.tolist(),
        **heading(runs[1].fit),
        "documents": units.documents,
        **result,
        "settings": {"n_resamples": n_resamples, "permutations": PERMUTATIONS, "seed": seed},
    }
    _store(runs[1], entry)
    return entry


def fitted_pair(a: Run, b: Run) -> tuple[FittedRun, FittedRun]:
    """Two fitted runs that a transfer can be tested between.

    Raises:
        TokscaleError: see `transfer_run`.
    """
    if a.path.resolve() == b.path.resolve():
        raise TokscaleError(f"{a.path} is its own source; test the times of another run on it")
    if a.probe_set.fingerprint != b.probe_set.fingerprint:
        raise TokscaleError(
            f"{a.path} and {b.path} watch other tokens: their probe sets are "
            f"{a.probe_set.fingerprint} and {b.probe_set.fingerprint}"
        )
    source, target = FittedRun.open(a), FittedRun.open(b)
    known_transfers(b, target.fit)  # a damaged file is told before the work, not after it
    if source.time != target.time:
        raise TokscaleError(
            f"{a.path} is fitted in {source.time}, {b.path} in {target.time}; "
            f"run `megatron-tokscale fit {a.path} --time {target.time}`"
        )
    return source, target


Blocks = Iterator[tuple[slice, SigmoidFits, Floats32, SigmoidFits, Floats32]]


def _both(runs: tuple[FittedRun, FittedRun]) -> Blocks:
    """Blocks of tokens with the fits and losses of both runs, cut alike."""
    source, target = runs
    rest: list[SigmoidFits] = []
    ahead = target.blocks()
    for at, fits, loss_NK in source.blocks():
        have = sum(map(len, rest))
        while have < len(fits):
            rest.append(next(ahead)[1])
            have += len(rest[-1])
        joined = SigmoidFits.concatenate(rest)
        own, rest = joined.rows(slice(0, len(fits))), [joined.rows(slice(len(fits), None))]
        yield at, fits, loss_NK, own, target.run.read_losses(at.start, at.stop)


def _means_and_times(
    runs: tuple[FittedRun, FittedRun],
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats, Floats]]:
    """Mean loss of both runs over the tokens with all losses; times of both, A's mean losses."""
    total: list[Any] = [0.0, 0.0]
    count = 0
    times: list[list[Floats]] = [[], [], []]
    for _, fits, source_NK, own, loss_NK in _both(runs):
        whole_N = fits.complete_N & own.complete_N
        for i, losses in enumerate((source_NK, loss_NK)):
            total[i] = total[i] + loss_sums(losses[whole_N], np.zeros(whole_N.sum(), int), 1)[0]
        times[0].append(learning_times(fits))
        times[1].append(learning_times(own))
        times[2].append(fits.level_N.astype(np.float64))
        count += int(whole_N.sum())
    if not count:
        raise TokscaleError("no token has a fit and finite losses at all probes of both runs")
    joined = [np.concatenate(parts) for parts in times]
    return (total[0] / count, total[1] / count), (joined[0], joined[1], joined[2])


def _aligned(
    name: str,
    runs: tuple[FittedRun, FittedRun],
    mean_K: tuple[Floats, Floats],
    groups: dict[str, Groups],
    units: Units,
    weight_RU: Floats,
    seed: int,
) -> dict[str, Any]:
    source, target = runs
    alignment = (
        Alignment.absolute(target.x_K)
        if name == "absolute"
        else Alignment.by_loss(source.x_K, mean_K[0], target.x_K, mean_K[1])
    )
    sums = TransferSums(alignment, groups, units)
    for at, fits, source_NK, own, loss_NK in _both(runs):
        sums.add(at, fits, loss_NK, source_NK, own, target.x_K)
    return sums.result(weight_RU, seed)


def _store(target: FittedRun, entry: dict[str, Any]) -> None:
    """Put the entry among those of other sources, which stay."""
    entries = [
        each
        for each in known_transfers(target.run, target.fit)
        if each["source_run_id"] != entry["source_run_id"]
    ]
    write_result(
        target.run.paths.transfer,
        {
            "schema_version": TRANSFER_SCHEMA,
            "version": __version__,
            "from": [*entries, entry],
        },
    )

"""`forecast_run`: draw tokens of a run, forecast and back-test their falls, write forecast.json.

Shapes: N tokens, K probe steps.
"""

from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from megatron_tokscale.compare.forecast.groups import context_classes, missing_columns
from megatron_tokscale.compare.forecast.judge import judge
from megatron_tokscale.compare.forecast.origin import Forecaster, Watched
from megatron_tokscale.core.arrays import Floats32, Integers
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.schemas import FORECAST_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.results import FittedRun
from megatron_tokscale.results.estimate import Undefined, defined_or_reason
from megatron_tokscale.results.forecast import ORIGINS, Forecast, ForecastSettings, Method
from megatron_tokscale.results.scored_range import RangeEnd, ScoredRange
from megatron_tokscale.spectrum.evidence.token_groups import token_groups
from megatron_tokscale.spectrum.run_spectrum import draw_tokens
from megatron_tokscale.spectrum.scored_range import probe_rates, scored_range_of
from megatron_tokscale.store import Run

MOST_TOKENS: Final = 40_000
"""Tokens that are drawn by default: they are fitted four times, which takes a minute (our
choice). `cli/forecast.py` repeats the number, so that the parser loads no analysis."""
_FULL_RATE: Final = 0.95  # share of the peak rate above which a decay has hardly begun (our choice)


def forecast_run(
    run: Run,
    *,
    tokens: int = MOST_TOKENS,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> Forecast:
    """Forecast the nats that a fitted run has still to learn, and write forecast.json.

    The origin is the end of the scored range. The same forecast is made from the losses up to a
    quarter and to a half of its time, and compared with what came.

    Args:
        run: an opened run, fitted.
        tokens: tokens that are drawn; each is fitted on the losses up to an eighth, a quarter, a
            half and the whole of the origin's time.
        n_resamples: bootstrap resamples of the documents, or of what stands in for them.
        seed: seed of all draws.
        progress: receiver of the name of each stage; None for none.

    Raises:
        TokscaleError: the run is not fitted, or was fitted on other losses, its columns are runs,
            or there are too few probes for a forecast.
    """
    progress = progress or NoProgress()
    if tokens < 1:
        raise TokscaleError(f"--tokens {tokens} draws no token; expected 1 or more; give --tokens")
    if run.imported and run.imported.axis != "T":
        raise TokscaleError(
            f"{run.path} has one column per run along {run.imported.axis}; a forecast needs losses "
            "over time; import a matrix along T"
        )
    source = FittedRun.open(run)
    source.check_complete()
    progress.stage("scored range")
    scored = scored_range_of(run, source.x_K, run.mean_losses())
    watched = _watched(source, scored, tokens, n_resamples, seed)
    forecaster = Forecaster(watched)
    progress.stage("back-tests")
    back_tests = tuple(defined_or_reason(partial(forecaster.origin, share)) for share in ORIGINS)
    progress.stage("forecast")
    try:
        now = forecaster.origin(1.0)
    except UndefinedError as error:
        raise TokscaleError(f"{run.path} cannot be forecast: {error}") from error
    falls = now.horizons[0].falls
    silent = [method for method in Method if isinstance(falls[method], Undefined)]
    found = Forecast(
        fit=source.fit.identity,
        non_finite=source.fit.non_finite,
        n_units=watched.units.documents,
        scored=scored,
        assumed=assumptions(run, scored, source),
        missing=missing_columns(run.tokens),
        now=now,
        back_tests=back_tests,
        judgements=judge(back_tests, silent),
        settings=ForecastSettings(len(watched.loss_NK), n_resamples, seed),
    )
    write_typed_result(run.paths.forecast, FORECAST_SCHEMA, found)
    return found


def assumptions(run: Run, scored: ScoredRange, source: FittedRun) -> tuple[str, ...]:
    """Return sentences on what a forecast assumes of the training to come."""
    found = ["the data keep their mixture, and the learning rate stays as it is at the origin"]
    rate_K = probe_rates(run)
    timed_K = np.isfinite(source.x_K) & (source.x_K <= scored.to_x)
    if scored.end_reason is RangeEnd.DECAY:
        found.append(
            "the forecast starts where the learning rate falls below half its peak: it does not "
            "foresee what the decay gains, and the probes in it are no test of it"
        )
    if scored.end_reason is RangeEnd.NO_RATES:
        found.append("the learning rates are not known: falls of a decay count as falls to go on")
    elif scored.end_reason is RangeEnd.FEW_PROBES:
        found.append(
            "the learning rate decays before the origin: its falls count as falls to go on"
        )
    elif timed_K.any() and rate_K[timed_K][-1] < _FULL_RATE * np.nanmax(rate_K):
        share = rate_K[timed_K][-1] / np.nanmax(rate_K)
        found.append(
            f"the learning rate at the origin is {share:.0%} of its peak: what the decay until "
            "there gained counts as falls to go on"
        )
    return tuple(found)


def _watched(
    source: FittedRun, scored: ScoredRange, tokens: int, n_resamples: int, seed: int
) -> Watched:
    """Draw tokens that miss no loss, and read their losses up to the end of the scored range."""
    run = source.run
    token_N, loss_NK = _drawn(run, draw_tokens(run.n_tokens, tokens, seed))
    whole = run.tokens.units(seed)
    groups = token_groups(run.tokens)
    return Watched(
        x_K=source.x_K,
        loss_NK=loss_NK,
        groups=groups.rows(token_N),
        classes={name: each.rows(token_N) for name, each in context_classes(run.tokens).items()},
        dataset_N=run.tokens.dataset_N[token_N],
        datasets=run.tokens.datasets,
        units=replace(whole, unit_N=whole.unit_N[token_N]),
        weight_RU=whole.weights(n_resamples, seed),
        from_x=scored.from_x,
        to_x=scored.to_x,
        takes_shifts_out=source.fit.common_shifts is not None,
        seed=seed,
    )


def _drawn(run: Run, chosen: Integers) -> tuple[Integers, Floats32]:
    """Return the numbers and losses of the chosen tokens whose losses are all finite.

    Raises:
        TokscaleError: none of them has finite losses at all probes.
    """
    numbers, losses = [], []
    for token_N, loss_NK in run.finite_blocks():
        kept_N = np.isin(token_N, chosen, assume_unique=True)
        numbers.append(token_N[kept_N])
        losses.append(loss_NK[kept_N])
    token_N = np.concatenate(numbers)
    if not len(token_N):
        raise TokscaleError(
            f"none of the {len(chosen):,} tokens drawn from {run.path} has finite losses at all "
            "probes; give a larger --tokens"
        )
    return token_N, np.concatenate(losses)

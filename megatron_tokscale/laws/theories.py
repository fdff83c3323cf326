"""The theories of papers.md 2, 3, 4 and 8 on one run, each as its authors measured it.

Every function returns plain values for laws.json and raises UndefinedError where its theory does
not apply. Shapes: N tokens, K probe steps, R resamples, F groups by frequency.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.laws.agreement import Agreement
from megatron_tokscale.laws.deceleration import fit_deceleration
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.laws.language.cagnetta import data_exponent, fit_context_exponent
from megatron_tokscale.laws.language.contexts import ContextBins
from megatron_tokscale.laws.language.correlations import (
    correlation_exponent,
    draw_documents,
    token_correlations,
)
from megatron_tokscale.laws.one_third.group_test import group_test
from megatron_tokscale.laws.one_third.one_third import fit_one_third
from megatron_tokscale.laws.plain import or_reason, plain
from megatron_tokscale.laws.power_law.huber import Curve, Solution
from megatron_tokscale.laws.power_law.power_law import fit_power_law
from megatron_tokscale.laws.power_law.tail import tail_exponent
from megatron_tokscale.laws.quanta.learning_times import frequency_exponent
from megatron_tokscale.laws.quanta.monogenic import MonogenicShare, scaled_mean_curve
from megatron_tokscale.laws.quanta.quanta import alpha_from, exponents_from
from megatron_tokscale.laws.zero_sum import ZeroSum
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.store import Run

_SAMPLE = 20_000
_LAGS = tuple(range(1, 33)) + tuple(round(32 * 2 ** (i / 4)) for i in range(1, 11))


def power_law(t_K: Floats, loss_RK: Floats, start: float, n_resamples: int, seed: int) -> Any:
    """E + B t^-alpha with two intervals: over documents, and over the scatter of the probes."""
    law = fit_power_law(t_K, loss_RK[0], from_=start, n_resamples=n_resamples, seed=seed)
    fitted_K = (t_K >= law.from_time) & (t_K <= law.to_time)
    best = Solution(law.floor, math.log(law.scale), law.exponent, law.converged)
    exponent_R, floor_R = np.full((2, len(loss_RK)), np.nan)
    exponent_R[0], floor_R[0] = law.exponent, law.floor
    for r in np.flatnonzero(np.isfinite(loss_RK).all(axis=1))[1:]:
        curve = Curve(np.log(t_K[fitted_K]), np.log(loss_RK[r, fitted_K]))
        near = curve.solve_near(best)
        exponent_R[r], floor_R[r] = near.exponent, near.floor
    return plain(law) | {
        **Estimate.from_resamples(exponent_R, least=0).entry("exponent_documents"),
        **Estimate.from_resamples(floor_R, least=0).entry("floor_documents"),
        "exponent_R": plain(exponent_R),
    }


def tail(inputs: Inputs, start: float) -> Any:
    """The exponent of the spectrum's tail, from `start` to where transitions are cut off."""
    first = np.log(start) if start > 0 else inputs.x_C[0]
    found = tail_exponent(
        inputs.x_C, inputs.drop_RC, from_x=first, to_x=inputs.last_x - inputs.margin
    )
    return plain(found) | Estimate.from_resamples(found.exponent_R).entry("exponent")


def agreement(tail_of: dict[str, Any], law: dict[str, Any]) -> Any:
    """The tail's exponent less that of the loss, resample by resample of the documents.

    The scatter of the probes about the law, which resampling documents does not see, is added in
    quadrature.
    """
    for each in (tail_of, law):
        if "undefined" in each:
            raise UndefinedError(each["undefined"])
    a_R, alpha_R = (np.array(each["exponent_R"], float) for each in (tail_of, law))
    difference_R = a_R - alpha_R
    drawn_R = difference_R[1:][np.isfinite(difference_R[1:])]
    if len(drawn_R) < 2:
        raise UndefinedError("without resamples of the documents nothing says how well they agree")
    se = float(np.hypot(drawn_R.std(ddof=1), law["exponent_se"]))
    difference = float(difference_R[0])
    reach = 1.96 * se
    return {
        "difference": difference,
        "se": se,
        "difference_interval": [difference - reach, difference + reach],
        "agree": abs(difference) <= reach,
    }


def one_third(run: Run, inputs: Inputs) -> Any:
    """The one-third law in the summed learning rate, and the test by groups of tokens."""
    if not run.knows("lr-sum"):
        raise UndefinedError(f"{run.path} does not know its sums of learning rates")
    lr_sum_K = np.exp(run.x_K("lr-sum"))
    begun = lr_sum_K > 0  # the first step of a warm-up may have a learning rate of zero
    lr_sum_K = lr_sum_K[begun]
    law = fit_one_third(lr_sum_K, inputs.mean_loss_RK[0, begun])

    def groups() -> Any:
        loss_RFK = inputs.frequency_loss_RFK[:, :, begun]
        loss_RFK = loss_RFK[np.isfinite(loss_RFK).all(axis=(1, 2))]
        test = group_test(
            lr_sum_K,
            loss_RFK[0],
            weight_G=inputs.frequency_share_F,
            loss_RGK=loss_RFK[1:] if len(loss_RFK) > 1 else None,
        )
        return plain(test) | {"verdict": test.verdict}

    return plain(law) | {
        "holds_one_third": law.holds_one_third,
        "frequency_groups": or_reason(groups),
    }


def quanta(run: Run, inputs: Inputs, law: dict[str, Any], seed: int) -> Any:
    """Learning time against frequency, tokens that fall in one step, exponents of other axes."""
    by_frequency = or_reason(
        lambda: frequency_exponent(inputs.frequency_I, inputs.frequency_time_I)
    )
    implied = None
    if "undefined" not in law and 0 < law["exponent"] < 1:
        implied = plain(exponents_from(alpha_from(law["exponent"])))
    return {
        "frequency": by_frequency,
        "implied_by_loss_exponent": implied,
        "monogenic": or_reason(lambda: _monogenic(run, inputs, seed)),
    }


def _monogenic(run: Run, inputs: Inputs, seed: int) -> MonogenicShare:
    """On one probe per octave, as plateaus of dense probes never stand still."""
    octave_K = np.floor(np.log2(np.maximum(inputs.t_K, 1e-300)))
    thinned = np.flatnonzero(np.diff(octave_K, append=np.inf) > 0)
    rows = np.sort(np.random.default_rng(seed).permutation(run.n_tokens)[:_SAMPLE])

    def blocks() -> Iterator[tuple[Any, Floats]]:
        for at, loss_NK in run.finite_blocks():
            chosen = np.isin(at, rows)
            losses = loss_NK[chosen][:, thinned]
            if len(losses):
                yield losses, scaled_mean_curve(inputs.mean_loss_RK[0, thinned], losses)

    return MonogenicShare.from_blocks(blocks())


def zero_sum(run: Run, n_resamples: int, seed: int) -> Any:
    """How much tokens' losses move while the mean falls, from each probe to twice its step."""
    units = Units.from_documents(run.probe_set.dataset_N, run.probe_set.document_N, seed)
    sums = ZeroSum(run.step_K, len(units))
    for at_N, loss_NK in run.finite_blocks():
        sums.add(loss_NK, unit_N=units.unit_N[at_N])
    result = {
        "from_step": plain(sums.from_step_P),
        "to_step": plain(sums.to_step_P),
        **plain(sums.metrics()),
    }
    names = ("interference", "movement", "change")
    if len(units) < 2:
        none_2P = [[None] * len(sums.from_step_P)] * 2
        return result | {f"{name}_interval_2P": none_2P for name in names}
    intervals = plain(sums.intervals(units.weights(n_resamples, seed)[1:]))
    return result | {f"{name}_interval_2P": intervals[f"{name}_2P"] for name in names}


def deceleration(run: Run, inputs: Inputs, n_resamples: int, seed: int) -> Any:
    """A break from one power law of the step to a slower one."""
    found = fit_deceleration(run.step_K, inputs.mean_loss_RK[0], n_resamples=n_resamples, seed=seed)
    return plain(found) | {"decelerates": found.decelerates}


def contexts(run: Run, n_resamples: int, seed: int) -> Any:
    """gamma, from the losses of the last probe by length of context."""
    tokens = run.probe_set
    loss_N = run.read_losses_at(int(run.step_K[-1])).astype(np.float64)
    bins = ContextBins.from_contexts(np.where(np.isfinite(loss_N), tokens.context_N, 0))
    loss_N = np.nan_to_num(loss_N)
    document_N = tokens.dataset_N.astype(np.int64) << 32 | tokens.document_N
    return fit_context_exponent(
        bins.context_S,
        bins.mean(loss_N),
        loss_RS=bins.resample(loss_N, cluster_N=document_N, n_resamples=n_resamples, seed=seed),
        n_resamples=n_resamples,
        seed=seed,
    )


def correlations(corpus: Sequence[Portion], seed: int) -> Any:
    """beta, from the corpus; where documents drown the signal, with their mean taken away."""
    documents = draw_documents(corpus, seed=seed)

    def beta(*, centred: bool) -> Any:
        measured = token_correlations(documents, lags=_LAGS, centred=centred, seed=seed)
        return plain(correlation_exponent(measured, seed=seed)) | {"centred": centred}

    try:
        return beta(centred=False)
    except UndefinedError:
        return beta(centred=True)


def cagnetta(gamma: dict[str, Any], beta: dict[str, Any]) -> Any:
    """alpha_D = gamma / (2 beta)."""
    for each in (gamma, beta):
        if "undefined" in each:
            raise UndefinedError(each["undefined"])
    return data_exponent(gamma["gamma"], gamma["se"], beta["beta"], beta["se"])


def compared(predicted: dict[str, Any], exponent: float, se: float) -> Any:
    """alpha_D as predicted from the language beside a measured one."""
    if "undefined" in predicted:
        raise UndefinedError(predicted["undefined"])
    return Agreement.between(predicted["exponent"], predicted["se"], exponent, se)

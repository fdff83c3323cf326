"""Learning times, order, onset, tail and forecasts of a run, beside the known frequencies of facts.

Shapes: F facts, N watched tokens, I bins of facts by frequency.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from quanta_corpus.corpus import NO_FACT, Truth, WatchedTruth, World
from scipy.stats import spearmanr

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.laws.quanta.learning_times import frequency_exponent
from megatron_tokscale.results import FittedRun, SpectrumResult
from megatron_tokscale.results.estimate import (
    Estimate,
    Undefined,
    defined_or_reason,
    format_estimate,
)
from megatron_tokscale.results.evidence import ForwardPrediction
from megatron_tokscale.results.laws import FrequencyExponent, TailExponent, TailMinusLaw, read_laws
from megatron_tokscale.results.transfer import FallCovariance, LearningOrder, read_transfer
from megatron_tokscale.results.verdict import ClaimTest
from megatron_tokscale.spectrum.events import learning_times
from megatron_tokscale.store import Run

EDGES: Final = (3.0, 1.0, 0.3, 0.1, 0.05, 0.02)
"""Edges of the bins of facts in exposures a step (our choice: each about a factor of three)."""
_BINS: Final = 24
"""Bins of facts by frequency, with equally many watched tokens. Our choice: a bin then has hundreds
of them, and its median an error of a few percent."""
_LAST: Final = 3  # probes at the end whose mean loss says if a fact is known (our choice)


@dataclass(frozen=True, eq=False)
class FactTokens:
    """The watched objects of facts, and when a run learns each.

    All object tokens fall together, from the unigram entropy to ln(number of objects), when the
    model learns that an object follows a relation. That is an event of their fits too, but nothing
    of the fact is known then: a token is known if its loss ends below half of ln(number of
    objects), and else censored. A known token whose fit has no event has no learning time.

    Attributes:
        fact_N: the fact of each token.
        step_N: the step at which it is learned; infinite if it is censored, NaN without an event.
        last_loss_N: its mean loss at the last three probes, in nats.
    """

    fact_N: Integers
    step_N: Floats
    last_loss_N: Floats

    @property
    def censored_N(self) -> Mask:
        """Mask of the tokens that are not learned by the end."""
        return np.isinf(self.step_N)

    @classmethod
    def of(cls, spectrum: SpectrumResult, watched: WatchedTruth, world: World) -> "FactTokens":
        """Read the tokens of a fitted run whose time is in steps."""
        scored = spectrum.summary.scored
        step_N, last_N = np.full((2, len(watched.fact_N)), np.nan)
        for where, fits, loss_NK in FittedRun.open(spectrum.run).blocks():
            time_N = learning_times(fits, from_x=scored.from_x, to_x=scored.to_x)
            step_N[where], last_N[where] = np.exp(time_N), loss_NK[:, -_LAST:].mean(axis=1)
        is_known_N = last_N < np.log(world.mix.objects) / 2
        step_N = np.where(is_known_N, step_N, np.inf)
        kept_N = (watched.fact_N != NO_FACT) & np.isfinite(last_N)
        return cls(watched.fact_N[kept_N], step_N[kept_N], last_N[kept_N])

    def medians(self, group_N: Integers) -> tuple[Integers, Floats, Integers]:
        """Return the groups that have times, the median step of each, and its tokens with one."""
        timed_N = ~np.isnan(self.step_N)
        step_N, group_N = self.step_N[timed_N], group_N[timed_N]
        groups, inverse_N, counts = np.unique(group_N, return_inverse=True, return_counts=True)
        medians = [float(np.median(step_N[inverse_N == i])) for i in range(len(groups))]
        return groups, np.array(medians), counts


def learning_order(tokens: FactTokens, world: World) -> dict[str, float]:
    """Return the rank correlations of learning times with rarity, of facts and of bins of facts.

    The time of a fact or a bin is the median over its watched tokens; those that are not learned
    come last. A bin has equally many tokens of about one frequency: beside the frequency, a fact's
    time depends on its share of its topic, which a bin averages.
    """
    facts, step_I, _ = tokens.medians(tokens.fact_N)
    of_bins, _, rate_I = _bins(tokens, world)
    return {
        "facts": len(facts),
        "rho": float(spearmanr(-world.frequency_F[facts], step_I).statistic),
        "bins": len(of_bins),
        "rho_of_bins": float(spearmanr(-rate_I, of_bins).statistic),
        "without_event": int(np.isnan(tokens.step_N).sum()),
    }


def _bins(tokens: FactTokens, world: World) -> tuple[Floats, Integers, Floats]:
    """Return the median step, the tokens and the mean frequency of bins of facts by frequency."""
    frequency_N = world.frequency_F[tokens.fact_N]
    edges = np.unique(np.quantile(frequency_N, np.linspace(0, 1, _BINS + 1)[1:-1]))
    bin_N = np.searchsorted(edges, frequency_N)
    bins, step_I, count_I = tokens.medians(bin_N)
    frequency_I = [np.exp(np.log(frequency_N[bin_N == i]).mean()) for i in bins]
    return step_I, count_I, np.array(frequency_I)


def by_exposures(tokens: FactTokens, world: World, facts_a_step: float) -> list[dict[str, float]]:
    """Return a row per bin of facts: when they are learned, and how many are not.

    Args:
        tokens: watched objects of facts.
        world: the corpus.
        facts_a_step: triples of a step of the training.
    """
    rate_F = world.frequency_F * facts_a_step
    bin_N = np.searchsorted(-np.array(EDGES), -rate_F[tokens.fact_N])
    rows = []
    for i, at_least in enumerate((*EDGES, 0.0)):
        own_N = bin_N == i
        if not own_N.any():
            continue
        step = float(np.nanmedian(tokens.step_N[own_N]))
        rows.append(
            {
                "at_least": at_least,
                "facts": len(np.unique(tokens.fact_N[own_N])),
                "tokens": int(own_N.sum()),
                "censored": float(tokens.censored_N[own_N].mean()),
                "step": step,
                "exposures": step * float(np.median(rate_F[tokens.fact_N[own_N]])),
                "last_loss": float(tokens.last_loss_N[own_N].mean()),
            }
        )
    return rows


def known_onset(
    tokens: FactTokens, world: World, facts_a_step: float, end: float
) -> dict[str, object]:
    """Fit learning time = onset + E frequency^-b to bins of facts of known frequency.

    Args:
        tokens: watched objects of facts.
        world: the corpus.
        facts_a_step: triples of a step, so that frequencies are in exposures a step.
        end: last step at which a learning time is not biased.
    """
    step_I, count_I, frequency_I = _bins(tokens, world)
    rate_I = frequency_I * facts_a_step
    law = defined_or_reason(lambda: frequency_exponent(rate_I, step_I, weight_I=count_I, end=end))
    return _law(law)


def what_was_learned(
    run: Path, source: Path | None, truth: Truth, world: World, facts_a_step: float
) -> dict[str, object]:
    """Return what the verbs found in a run with a spectrum and laws, beside the truth.

    Args:
        run: the run.
        source: the run of another seed whose learning times were tested on it; None without one.
        truth: truth about the documents that it watches.
        world: the corpus.
        facts_a_step: triples of a step of the training.
    """
    spectrum = SpectrumResult.open(Run.open(run))
    tokens = FactTokens.of(spectrum, truth.of(spectrum.run.probe_set), world)
    laws = read_laws(spectrum.run, spectrum.fit)
    assert laws is not None
    scored, overall = spectrum.summary.scored, spectrum.summary.overall
    # A fact is certain, so what its tokens have not lost by the end is still ahead.
    ahead = float(tokens.last_loss_N.sum()) / overall.n_tokens
    end = float(np.exp(min(scored.to_x, spectrum.summary.certain_to_x)))
    return {
        "scored": scored.describe(spectrum.time),
        "order": learning_order(tokens, world),
        "by_exposures": by_exposures(tokens, world, facts_a_step),
        "law": known_onset(tokens, world, facts_a_step, end),
        "law_of_ids": _law(laws.quanta.frequency),
        "locality": _outcome(spectrum.evidence.widths.test),
        **_pair(spectrum, source),
        "forecast": _forecast(spectrum.evidence.forward),
        "tail": format_estimate(_exponent(laws.tail)),
        "tail_minus_law": _tested(laws.tail_minus_law),
        "ahead": {"expected": format_estimate(overall.expected_nats), "known": ahead},
    }


def _law(law: FrequencyExponent | Undefined) -> dict[str, object]:
    if isinstance(law, Undefined):
        return {"b": f"undefined: {law.undefined}"}
    return {
        "b": _outcome(law.test),
        "onset": law.onset,
        "exposures": law.exposures,
        "without_onset": format_estimate(law.b_without_onset),
        "groups": law.n_groups,
        "censored": law.n_censored,
    }


def _pair(spectrum: SpectrumResult, source: Path | None) -> dict[str, object]:
    """Return the two primary tests that need a second run."""
    found = read_transfer(spectrum.run, spectrum.fit)
    if source is None:
        return {}
    transfer = next(each for each in found if each.source == source.name)
    return {"order_of_runs": _tested(transfer.order), "covariance": _tested(transfer.falls)}


def _forecast(forward: ForwardPrediction | Undefined) -> dict[str, object]:
    if isinstance(forward, Undefined):
        return {"undefined": forward.undefined}
    return {
        "fall": format_estimate(forward.fall),
        "tokens": format_estimate(forward.tokens.fall),
        "power law": format_estimate(forward.power_law.fall),
        "uniform": format_estimate(forward.uniform.fall),
    }


def _exponent(tail: TailExponent | Undefined) -> Estimate | Undefined:
    return tail if isinstance(tail, Undefined) else tail.exponent


def _tested(result: LearningOrder | FallCovariance | TailMinusLaw | Undefined) -> str:
    if isinstance(result, Undefined):
        return f"undefined: {result.undefined}"
    return _outcome(result.test)


def _outcome(test: ClaimTest) -> str:
    return f"{format_estimate(test.estimate)}, claimed {test.claim.rule}: {test.verdict}"

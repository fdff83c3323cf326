"""The map from a training's consumed tokens to the reference run's time axis.

Shapes: D datasets, K probe steps, G grid points, E points in time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight.learnability import read_spectra
from megatron_tokscale.store import Run


class TokenTimeMap(Protocol):
    """A map from ln(consumed tokens) of the training to the x of the reference run."""

    @property
    def end(self) -> float:
        """ln(consumed tokens) of the training at which the map ends."""

    def x(self, log_tokens_E: Floats) -> Floats:
        """Return x of the reference run, at most its last x."""


@dataclass(frozen=True)
class SameTokens:
    """The map by equal tokens: the training learns as the reference run did at as many tokens.

    Attributes:
        end: ln(consumed tokens) of the reference run at its last probe.
    """

    end: float

    def x(self, log_tokens_E: Floats) -> Floats:
        """Return the same ln(consumed tokens)."""
        return np.minimum(log_tokens_E, self.end)


@dataclass(frozen=True, eq=False)
class LearnedByTime:
    """The drop that a run has learned by each count of consumed tokens.

    Attributes:
        log_tokens_G: ln(consumed tokens), ascending to its last probe.
        learned_G: drop in nats per token learned by then; it never decreases.
    """

    log_tokens_G: Floats
    learned_G: Floats

    @classmethod
    def from_run(cls, run: Run, names: Sequence[str], base_D: Floats) -> Self:
        """Read the learned drop from the spectrum of a run.

        Args:
            run: the run.
            names: its datasets to use.
            base_D: weights of these datasets in the mean.

        Raises:
            TokscaleError: the run has no spectrum, watched other data, or has no record of its
                consumed tokens.
        """
        spectra = read_spectra(run).select(names)
        log_tokens_K = run.x_K("tokens")[-len(spectra.x_K) :].astype(np.float64)
        if not np.isfinite(log_tokens_K).all() or (np.diff(log_tokens_K) <= 0).any():
            raise TokscaleError(
                f"the probes of {run.path} do not hold the consumed tokens; expected "
                "ascending counts; give another run as --time-map"
            )
        log_tokens_G = np.interp(spectra.x_G, spectra.x_K, log_tokens_K)
        return cls(log_tokens_G, base_D @ spectra.learned_DG)


@dataclass(frozen=True, eq=False)
class ByRank:
    """The map by rank in the learning order, not by absolute step (the construction is our choice).

    The other run is of the size to train. Where it has learned a share of the whole drop, the
    training is mapped to the point at which the reference run had learned the same share. The whole
    drop is the larger of the drops that the two runs learned by their ends. So the other run may
    end early: the first part of a training can map the training itself.

    Attributes:
        learned: drop that the other run has learned by each number of tokens.
        x_G: ln(consumed tokens) of the reference run, ascending to its end.
        learned_G: drop in nats per token that the reference run had learned by then; it never
            decreases.
        run: path of the other run, for the plan's provenance; None if it is not known.
    """

    learned: LearnedByTime
    x_G: Floats
    learned_G: Floats
    run: str | None = None

    def __post_init__(self) -> None:
        if not self._total > 0:
            raise TokscaleError(
                "the run of the time map learned nothing; expected a loss that falls; give another "
                "run as --time-map"
            )

    @property
    def _total(self) -> float:
        return float(self.learned.learned_G[-1])

    @property
    def end(self) -> float:
        """ln(consumed tokens) at which the other run ends."""
        return float(self.learned.log_tokens_G[-1])

    def x(self, log_tokens_E: Floats) -> Floats:
        """Return x of the reference run at the same rank."""
        learned_G = self.learned_G - self.learned_G[0]
        whole_drop = max(self._total, learned_G[-1])
        learned_E = np.interp(log_tokens_E, self.learned.log_tokens_G, self.learned.learned_G)
        # Of several x at the same rank keep the first: np.interp needs ascending ranks.
        rises = np.concatenate([[True], np.diff(learned_G) > 0])
        at_most = learned_G[-1] if learned_G[-1] > 0 else 1.0
        rank_G = learned_G[rises] / at_most
        return np.asarray(np.interp(learned_E / whole_drop, rank_G, self.x_G[rises]))

"""When a training is where on the axis of the reference run.

Shapes: D datasets, K probe steps, G grid points, E points in time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight.learnability import read_spectra
from megatron_tokscale.store import Run


class Clock(Protocol):
    """Turns ln(consumed tokens) of the training into the x of the reference run."""

    @property
    def end(self) -> float:
        """ln(consumed tokens) of the training up to which the clock can tell."""

    def x(self, log_tokens_E: Floats) -> Floats:
        """x of the reference run; at most that of its end."""


@dataclass(frozen=True)
class SameTokens:
    """The training learns as the reference run did at the same number of tokens.

    Attributes:
        end: ln(consumed tokens) of the reference run at its last probe.
    """

    end: float

    def x(self, log_tokens_E: Floats) -> Floats:
        """The same ln(consumed tokens)."""
        return np.minimum(log_tokens_E, self.end)


@dataclass(frozen=True, eq=False)
class Progress:
    """How much another run has learned by when.

    Attributes:
        log_tokens_G: ln(consumed tokens), ascending to its last probe.
        learned_G: drop in nats per token learned by then; not falling.
    """

    log_tokens_G: Floats
    learned_G: Floats

    @staticmethod
    def from_run(run: Run, names: Sequence[str], base_D: Floats) -> "Progress":
        """Read it from the spectrum of a run, datasets counting by their base weights.

        Raises:
            TokscaleError: the run has no spectrum, watched other data, or does not know its
                consumed tokens.
        """
        spectra = read_spectra(run).select(names)
        log_tokens_K = run.x_K("tokens")[-len(spectra.x_K) :].astype(np.float64)
        if not np.isfinite(log_tokens_K).all() or (np.diff(log_tokens_K) <= 0).any():
            raise TokscaleError(
                f"the probes of {run.path} do not tell how many tokens were consumed"
            )
        log_tokens_G = np.interp(spectra.x_G, spectra.x_K, log_tokens_K)
        return Progress(log_tokens_G, base_D @ spectra.learned_DG)


@dataclass(frozen=True, eq=False)
class ByRank:
    """Transfer by rank in the learning order, not by absolute step (our choice of how).

    When another run, of the size to train, has learned a share of all that there is to learn, the
    training is where the reference run was when it had learned the same share. All that there is to
    learn is what the run had learned by its end, or what the reference had if that is more: then
    the run is taken to have ended early. So the first part of a training can be its clock.

    Attributes:
        progress: of the other run.
        x_G: ln(consumed tokens) of the reference run, ascending to its end.
        learned_G: drop in nats per token that it had learned by then; not falling.
    """

    progress: Progress
    x_G: Floats
    learned_G: Floats

    def __post_init__(self) -> None:
        if not self._total > 0:
            raise TokscaleError("nothing was learned in the run that is to be the clock")

    @property
    def _total(self) -> float:
        return float(self.progress.learned_G[-1])

    @property
    def end(self) -> float:
        """Where the other run ends."""
        return float(self.progress.log_tokens_G[-1])

    def x(self, log_tokens_E: Floats) -> Floats:
        """x of the reference run at the same rank."""
        learned_G = self.learned_G - self.learned_G[0]
        everything = max(self._total, learned_G[-1])
        rank_E = np.interp(log_tokens_E, self.progress.log_tokens_G, self.progress.learned_G)
        # Of x at which nothing more is learned, the first: np.interp wants ascending ranks.
        rises = np.concatenate([[True], np.diff(learned_G) > 0])
        at_most = learned_G[-1] if learned_G[-1] > 0 else 1.0
        rank_G = learned_G[rises] / at_most
        return np.asarray(np.interp(rank_E / everything, rank_G, self.x_G[rises]))

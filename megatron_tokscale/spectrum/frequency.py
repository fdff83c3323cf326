"""Losses and learning times by token frequency, for the tests of theories in `laws`.

Shapes: N tokens, E learning events, K probe steps, F groups by frequency (deciles), I fine bins of
frequency, V ids of tokens, R resamples (the first is the data as they are).
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.spectrum.events import events_of
from megatron_tokscale.spectrum.evidence.skill import GroupSums
from megatron_tokscale.spectrum.groups import deciles, log_frequency
from megatron_tokscale.spectrum.sums import loss_sums
from megatron_tokscale.store import WatchedTokens

_BINS = 40  # of ln frequency over its range: enough for a slope, each with many events (our choice)


@dataclass(frozen=True)
class FrequencyMeans:
    """Means over tokens of about the same frequency.

    Attributes:
        loss_RFK: mean losses of the deciles, in nats.
        share_F: share of the tokens in each decile.
        frequency_I: frequency in each fine bin with events, as a share of all tokens: the
            drop-weighted geometric mean.
        time_I: learning time in each fine bin, the drop-weighted geometric mean.
        events_I: number of learning events in each fine bin.
    """

    loss_RFK: Floats
    share_F: Floats
    frequency_I: Floats
    time_I: Floats
    events_I: Integers


class FrequencySums:
    """Sums over the tokens that miss no loss, by the frequency of the token in the probe set.

    Without labels there are no frequencies, and the means have no groups.
    """

    def __init__(self, tokens: WatchedTokens, units: Units, scored: ScoredRange):
        self._scored = scored
        self._n_probes = 0
        log_count_N, count_V = log_frequency(tokens), tokens.label_count_V
        self._is_known = log_count_N is not None and count_V is not None
        if log_count_N is None or count_V is None:
            return
        self._log_share_N = log_count_N - np.log(count_V.sum())
        self._losses = GroupSums(deciles(log_count_N), units)
        edges = np.linspace(self._log_share_N.min(), self._log_share_N.max(), _BINS + 1)[1:-1]
        self._bin_N = np.searchsorted(edges, self._log_share_N)
        self._sum_3I = np.zeros((3, _BINS))  # of 1, ln frequency and x, weighted by the drops
        self._events_I = np.zeros(_BINS, np.int64)

    def add(self, at: slice, fits: SigmoidFits, loss_NK: Floats32) -> None:
        """Add the tokens in the slice."""
        self._n_probes = loss_NK.shape[1]
        if not self._is_known:
            return
        whole_N = fits.complete_N
        cell_N, n_cells = self._losses.cells(at)[whole_N], self._losses.n_cells
        self._losses.add("tokens", np.bincount(cell_N, minlength=n_cells)[:, None].astype(float))
        self._losses.add("loss", loss_sums(loss_NK[whole_N], cell_N, n_cells))
        events = events_of(fits, from_x=self._scored.from_x, to_x=self._scored.to_x).learned
        bin_E = self._bin_N[at][events.token_E]
        self._events_I += np.bincount(bin_E, minlength=_BINS)
        log_share_E = self._log_share_N[at][events.token_E]
        for row, value_E in enumerate((1.0, log_share_E, events.midpoint_E)):
            self._sum_3I[row] += np.bincount(bin_E, value_E * events.drop_E, _BINS)

    def means(self, weight_RU: Floats) -> FrequencyMeans:
        """Return the means under each row of weights."""
        if not self._is_known:
            loss_RFK = np.zeros((len(weight_RU), 0, self._n_probes))
            none = np.zeros(0)
            return FrequencyMeans(loss_RFK, none, none, none, np.zeros(0, np.int64))
        share_RF, loss_RFK = self._losses.means("loss", weight_RU)
        has_events_I = self._sum_3I[0] > 0
        drop_I, log_share_I, midpoint_I = self._sum_3I[:, has_events_I]
        return FrequencyMeans(
            loss_RFK=loss_RFK,
            share_F=share_RF[0],
            frequency_I=np.exp(log_share_I / drop_I),
            time_I=np.exp(midpoint_I / drop_I),
            events_I=self._events_I[has_events_I],
        )

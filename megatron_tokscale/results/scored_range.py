"""The scored range of a run: where spectra and their tests count, and why."""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from megatron_tokscale.core.arrays import Floats, Mask


class RangeStart(StrEnum):
    """Reason why a scored range starts where it does."""

    UNIGRAM_PHASE = "the end of the unigram phase"
    NO_LABELS = "the first probe, as the labels are not known"
    NEVER_BELOW = "the first probe, as the mean loss stays above the entropy of the labels"
    FEW_PROBES = "the first probe, as too few probes follow the unigram phase"


class RangeEnd(StrEnum):
    """Reason why a scored range ends where it does."""

    LAST_PROBE = "the last probe"
    DECAY = "the last probe before the learning rate falls below half its peak"
    NO_RATES = "the last probe, as the learning rates are not known"
    FEW_PROBES = "the last probe, as too few probes precede the decay of the learning rate"
    UNCERTAIN = "two widths of a transition before the last probe"


@dataclass(frozen=True)
class ScoredRange:
    """The range of x in which spectra and their tests count.

    Attributes:
        from_x: x of its first probe.
        to_x: x of its last probe.
        start_reason: why it starts there.
        end_reason: why it ends there.
        label_entropy: entropy of the labels in nats, which ends the unigram phase; None if the
            labels are not known.
    """

    from_x: float
    to_x: float
    start_reason: RangeStart
    end_reason: RangeEnd
    label_entropy: float | None = None

    def holds(self, x: Floats) -> Mask:
        """Return a mask of the values of x in the range."""
        return np.asarray((x >= self.from_x) & (x <= self.to_x))

    def describe(self, time: str) -> str:
        """Return the range and its reasons in one line."""
        start = str(self.start_reason)
        if self.start_reason is RangeStart.UNIGRAM_PHASE:
            start += f" (a mean loss of {self.label_entropy:.2f} nats, the entropy of the labels)"
        return (
            f"{time} {math.exp(self.from_x):.4g} to {math.exp(self.to_x):.4g}, "
            f"from {start} to {self.end_reason}"
        )

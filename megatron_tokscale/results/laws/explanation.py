"""The table of explanations: the claims of each theory on a run, and their verdicts."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class ClaimVerdict(StrEnum):
    """Outcome of a claim: it holds if a test could have refuted it and did not."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    UNDECIDED = "undecided"

    @classmethod
    def from_test(cls, holds: bool | None) -> Self:
        """Return the verdict for a test's outcome; None gives "undecided"."""
        return cls({True: "holds", False: "does not hold", None: "undecided"}[holds])


@dataclass(frozen=True)
class ExplanationRow:
    """One claim of one explanation.

    Attributes:
        explanation: name of the theory.
        claim: the claim, in words.
        predicted: the prediction, in words; "-" without a prediction.
        measured: the measured number, or why it is undefined, in words.
        verdict: outcome of the claim.
    """

    explanation: str
    claim: str
    predicted: str
    measured: str
    verdict: ClaimVerdict

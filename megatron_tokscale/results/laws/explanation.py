"""The table of explanations: the claims of each theory on a run, and their verdicts."""

from dataclasses import dataclass

from megatron_tokscale.results.verdict import Verdict


@dataclass(frozen=True)
class ExplanationRow:
    """One claim of one explanation.

    Attributes:
        explanation: name of the theory.
        claim: the claim, in words.
        predicted: the prediction and its margin, in words; "-" without a prediction.
        measured: the measured number, or why it is undefined, in words.
        verdict: outcome of the claim, corrected for the number of claims in the table (Holm).
        p_value: p-value of the verdict before the correction; NaN where the number has no interval.
    """

    explanation: str
    claim: str
    predicted: str
    measured: str
    verdict: Verdict
    p_value: float

    @property
    def outcome(self) -> str:
        """Prediction and measurement in words, or the reason why there is neither."""
        if self.predicted == "-":
            return f"not determined: {self.measured}"
        return f"predicted {self.predicted}; measured {self.measured}"

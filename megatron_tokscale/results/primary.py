"""The three primary tests: the claims that decide if learning is in steps of single tokens.

Each claim is false in worlds without steps (benchmarks/results/evidence.md): tokens that all follow
one power law, or one power law from an onset that their frequency sets. They are not corrected for
each other; every other test of a run is corrected within its family (`verdict.holm`).
"""

from typing import Final

from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.verdict import Claim

LOCALITY: Final = Claim(
    "transitions of single tokens are narrower than if each followed its group", most=0.95
)
"""On the ratio of median 10-90% widths. The margin covers the null model's own error."""
ORDER: Final = Claim(
    "the order of learning agrees between two runs, beyond frequency, position and mean loss",
    least=0.1,
)
"""On the partial rank correlation. Worlds without steps reach 0.04."""
COVARIANCE: Final = Claim(
    "a token that falls in one octave of time does not fall in octaves far from it", most=0.0
)
"""On the covariance of falls in octaves far apart, over the variance of falls in an octave."""
NEEDS_SECOND_RUN: Final = Undefined(
    "needs a second run: `megatron-tokscale spectrum RUN --source OTHER-RUN`"
)

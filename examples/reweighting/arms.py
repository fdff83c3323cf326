"""Arms: the plans that a study compares. All of them draw from the same strata of documents.

- uniform: the baseline, with each stratum at its share, in the keyed order that all plans have.
- fall: the policy `fall`, from the scores alone.
- fall-live: the same plan, corrected every `replan_every` steps by the losses of the job itself.
- frontier: the policy `frontier`, by learning times, on the strata of the other arms.
- permuted: the weights of `fall`, each given to another stratum of about the same size: as much
  change, and no information.

A study adds arms of its own, such as one from a known truth.
"""

from dataclasses import dataclass

UNIFORM = "uniform"


@dataclass(frozen=True)
class Arm:
    """A plan that `megatron-tokscale plan build` makes, and what a job under it is given.

    Attributes:
        build: words behind `plan build`: the policy and its flags.
        is_live: whether the job corrects the weights by its own losses.
        scores: folder of the scores, within the study's folder.
        quantiles: strata of documents; None for those of the other arms.
    """

    build: tuple[str, ...]
    is_live: bool = False
    scores: str = "scores"
    quantiles: int | None = None


ARMS = {
    UNIFORM: Arm(("fall", "--control", "uniform")),
    "fall": Arm(("fall",)),
    "fall-live": Arm(("fall",), is_live=True),
    "frontier": Arm(("frontier", "--strata", "documents")),
    "permuted": Arm(("fall", "--control", "permuted")),
}

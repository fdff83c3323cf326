"""Zero-sum learning (Mircea et al.): how far tokens' changes of loss cancel in the mean."""

from dataclasses import dataclass

from megatron_tokscale.results.estimate import Estimate


@dataclass(frozen=True)
class ZeroSumPair:
    """Metrics of one pair of probes, with 95% percentiles over documents.

    Attributes:
        from_step: step of the first probe.
        to_step: step of the second probe, near twice the first.
        interference: D, from 0 to 1; NaN where no token moved.
        movement: M, in nats per token.
        change: mean change of the loss, in nats per token; negative where the mean loss falls.
    """

    from_step: float
    to_step: float
    interference: Estimate
    movement: Estimate
    change: Estimate


@dataclass(frozen=True)
class ZeroSumResult:
    """Metrics of every pair of a probe and the one nearest to twice its step, ascending."""

    pairs: tuple[ZeroSumPair, ...]

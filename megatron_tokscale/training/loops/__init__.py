"""The training loops that call a `TokscaleCallback`: Megatron's own, and Megatron-Bridge's."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tokscale.training.loops.loop import Loop


def loop_of(context: Any) -> "Loop":
    """Return the loop that calls a callback with this context: Bridge's context has a `state`."""
    if hasattr(context, "state"):
        from megatron_tokscale.training.loops.bridge_loop import BridgeLoop

        return BridgeLoop(context.state)
    from megatron_tokscale.training.loops.megatron_loop import MegatronLoop

    return MegatronLoop()

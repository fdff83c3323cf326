"""A job of `megatron_tokscale.pretrain` whose loop calls a callback, as a Megatron after 0.19 does.

    python callback_job.py '{"tokscale_probe_set": ...}' <Megatron flags>

The installed Megatron has no callbacks. Its functions are wrapped here so that each event comes
where the newer loop has it: `on_train_step_end` after `train_step`, before the step is counted.
The context is one object with the fields of the newer one: no config, no counter, no forward step.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CallbackContext:
    """The long-lived context that the loop changes between events."""

    model: list[Any]
    user_state: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    scheduler: Any = None
    loss_dict: Any = None
    grad_norm: Any = None
    skipped_iter: Any = None


def call_back(callback: Any) -> None:
    """Wrap Megatron's functions so that they send the events."""
    from megatron.training import training

    found: dict[str, Any] = {}
    setup, train, train_step = (
        training.setup_model_and_optimizer,
        training.train,
        training.train_step,
    )

    def set_up(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **kwargs)
        found["context"] = CallbackContext(model, {}, optimizer, scheduler)
        callback.on_data_init_start(found["context"])
        return model, optimizer, scheduler

    def trained(
        forward_step_func: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        callback.on_train_start(found["context"])
        result = train(forward_step_func, model, optimizer, opt_param_scheduler, *args, **kwargs)
        callback.on_train_end(found["context"])
        return result

    def stepped(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        found["context"].loss_dict = result[0]
        callback.on_train_step_end(found["context"])
        return result

    training.setup_model_and_optimizer = set_up
    training.train = trained
    training.train_step = stepped


def main() -> None:
    settings = json.loads(sys.argv.pop(1))
    from megatron_tokscale import cpu

    sys.argv += cpu.required_flags(sys.argv)
    sys.argv.remove(cpu.FLAG)
    cpu.enable()
    from megatron_tokscale import pretrain
    from megatron_tokscale.callback import TokscaleCallback, TokscaleConfig
    from megatron_tokscale.training.upstream import mend_compile_helpers

    mend_compile_helpers()
    call_back(TokscaleCallback(TokscaleConfig(**settings)))
    pretrain.train()


if __name__ == "__main__":
    main()

"""Scalars for TensorBoard and W&B, logged by the last rank, which holds their writers.

The others may wait for that rank in a collective, so an error of a writer must not end it alone:
it is printed (`reported`). TensorBoard raises what its thread has met on the disk, at a later call;
W&B raises once it is finished, as it is when a loop's callback takes the probe of a job that ends.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron.training import global_vars

from megatron_tokscale.core.errors import say


def log_scalars(values: Mapping[str, float], step: int, consumed_samples: int) -> None:
    """Log values as `tokscale/NAME`, and to TensorBoard against consumed samples too."""
    keyed = {f"tokscale/{name}": value for name, value in values.items()}
    if writer := global_vars.get_tensorboard_writer():
        with reported(f"the scalars of step {step} are not in TensorBoard"):
            for key, value in keyed.items():
                writer.add_scalar(key, value, step)
                writer.add_scalar(f"{key} vs samples", value, consumed_samples)
    if wandb := global_vars.get_wandb_writer():
        with reported(f"the scalars of step {step} are not in W&B"):
            wandb.log(keyed, step)


def flush_scalars() -> None:
    """Write out TensorBoard's scalars, which a job that ends would lose; W&B writes its own."""
    if writer := global_vars.get_tensorboard_writer():
        with reported("the last scalars are not in TensorBoard"):
            writer.flush()


@contextmanager
def reported(loss: str) -> Iterator[None]:
    """Print an error of the block, which may be of any kind, after `loss`: what it has cost."""
    try:
        yield
    except Exception as error:
        say(f"{loss}: {error}")

"""Scalars for TensorBoard and W&B, logged by the last rank, which holds their writers."""

from collections.abc import Mapping

from megatron.training import global_vars

from megatron_tokscale.core.errors import say


def log_scalars(values: Mapping[str, float], step: int, consumed_samples: int) -> None:
    """Log values as `tokscale/NAME`, and to TensorBoard against consumed samples too."""
    keyed = {f"tokscale/{name}": value for name, value in values.items()}
    if writer := global_vars.get_tensorboard_writer():
        for key, value in keyed.items():
            writer.add_scalar(key, value, step)
            writer.add_scalar(f"{key} vs samples", value, consumed_samples)
    if wandb := global_vars.get_wandb_writer():
        wandb.log(keyed, step)


def flush_scalars() -> None:
    """Write out TensorBoard's scalars, which a job that ends would lose; W&B writes its own.

    One rank has a writer, and the others may wait for it in a collective: an error of the disk must
    not end that rank alone.
    """
    if writer := global_vars.get_tensorboard_writer():
        try:
            writer.flush()
        except Exception as error:  # of the writer's thread, which may fail in any way
            say(f"the last scalars of TensorBoard are lost: {error}")

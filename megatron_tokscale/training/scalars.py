"""Scalars for TensorBoard and W&B, logged by the last rank, which holds their writers."""

from collections.abc import Mapping

from megatron.training import global_vars


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
    """Write out TensorBoard's scalars, which a job that ends would lose; W&B writes its own."""
    if writer := global_vars.get_tensorboard_writer():
        writer.flush()

"""Per-token losses on disk: one writer during training, any number of readers after it."""

from megatron_tokscale.store.losses import LossRecord
from megatron_tokscale.store.reader import Run
from megatron_tokscale.store.writer import RunWriter

__all__ = ["LossRecord", "Run", "RunWriter"]

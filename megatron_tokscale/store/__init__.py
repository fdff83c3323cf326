"""Per-token losses on disk, written by one job while it trains and read by any number of others."""

from megatron_tokscale.store.background import BackgroundWriter
from megatron_tokscale.store.identity import Identity
from megatron_tokscale.store.launches import Batch, Launch, LearningRates
from megatron_tokscale.store.losses import LossRecord
from megatron_tokscale.store.paths import RunPaths
from megatron_tokscale.store.reader import Run, check_different_runs, check_same_tokens
from megatron_tokscale.store.tokens import WatchedTokens
from megatron_tokscale.store.writer import RunWriter

__all__ = [
    "BackgroundWriter",
    "Batch",
    "Identity",
    "Launch",
    "LearningRates",
    "LossRecord",
    "Run",
    "RunPaths",
    "RunWriter",
    "WatchedTokens",
    "check_different_runs",
    "check_same_tokens",
]

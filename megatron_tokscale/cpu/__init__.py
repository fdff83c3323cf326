"""Megatron without a GPU: its own training loop on gloo, for a laptop, the demo and the tests."""

from megatron_tokscale.cpu.runtime import (
    FLAG,
    enable,
    gpu_refusal,
    is_enabled,
    is_requested,
    required_flags,
)
from megatron_tokscale.cpu.wheel import mend_compile_helpers

__all__ = [
    "FLAG",
    "enable",
    "gpu_refusal",
    "is_enabled",
    "is_requested",
    "mend_compile_helpers",
    "required_flags",
]

"""Megatron's own training loop without a GPU, on gloo: for a laptop, the demo and the tests."""

from megatron_tokscale.cpu.runtime import (
    FLAG,
    enable,
    gpu_refusal,
    is_enabled,
    is_requested,
    required_flags,
)

__all__ = [
    "FLAG",
    "enable",
    "gpu_refusal",
    "is_enabled",
    "is_requested",
    "required_flags",
]

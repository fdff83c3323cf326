"""Values beside the parameters that forward passes write, and that the training reads or logs.

The trackers of auxiliary losses (MoE, multi-token prediction, sparse attention) need no restoring:
Megatron writes them in training mode alone. The verification hashes them.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from megatron.training import get_timers, training

_LOSS_SCALERS: Final = (
    ("megatron.core.transformer.moe.moe_utils", "MoEAuxLossAutoScaler"),
    ("megatron.core.transformer.multi_token_prediction", "MTPLossAutoScaler"),
    ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossAutoScaler"),
)
_LOSS_TRACKERS: Final = (
    ("megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper"),
    ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossLoggingHelper"),
)
_MOE_LOGGING: Final = "megatron.core.transformer.moe.moe_logging"


@contextmanager
def restored_timers() -> Iterator[None]:
    """Restore Megatron's timers, some of which the user's forward step runs."""
    timers: dict[str, Any] = get_timers()._timers
    before = {name: dict(vars(timer)) for name, timer in timers.items()}
    try:
        yield
    finally:
        for name, timer in timers.items():
            if name in before:
                vars(timer).update(before[name])
            else:
                timer.reset()


@contextmanager
def no_straggler_times() -> Iterator[None]:
    """Turn the straggler detector off: it counts every forward pass as training."""
    detector = training.stimer
    measures = detector.start, detector.stop, detector.bdata
    detector.start = detector.stop = detector.null_method
    try:
        yield
    finally:
        detector.start, detector.stop, detector.bdata = measures


@contextmanager
def restored_attention_logits(model: Sequence[Any]) -> Iterator[None]:
    """Restore the largest attention logits since the last step, for the log and for qk-clip."""
    logits = [(module, module.current_max_attn_logits) for module in attentions(model)]
    try:
        yield
    finally:
        for module, value in logits:
            module.current_max_attn_logits = value


def attentions(model: Sequence[Any]) -> list[Any]:
    """Return the modules that keep their largest attention logit."""
    modules = [module for chunk in model for module in chunk.modules()]
    return [module for module in modules if hasattr(module, "current_max_attn_logits")]


@contextmanager
def restored_sequence_lengths() -> Iterator[None]:
    """Restore the lengths of packed sequences, from which Megatron computes a step's FLOPs."""
    sums, is_active = sequence_lengths()
    saved = None if sums is None else sums.clone()
    try:
        yield
    finally:
        if hasattr(training, "_seqlen_stats_active"):
            if sums is not None and saved is not None:
                sums.copy_(saved)
            training._seqlen_stats_in_iteration, training._seqlen_stats_active = sums, is_active


def sequence_lengths() -> tuple[torch.Tensor | None, bool]:
    """Return Megatron's sums over the sequence lengths of a step, and whether it has summed any."""
    sums: torch.Tensor | None = getattr(training, "_seqlen_stats_in_iteration", None)
    return sums, bool(getattr(training, "_seqlen_stats_active", False))


@contextmanager
def restored_loss_scales() -> Iterator[None]:
    """Restore the scales of auxiliary losses, which the schedules set in evaluation too."""
    scalers = loss_scalers()
    scales = [scaler.main_loss_backward_scale for scaler in scalers]
    values = [None if scale is None else scale.clone() for scale in scales]
    try:
        yield
    finally:
        for scaler, scale, value in zip(scalers, scales, values, strict=True):
            scaler.main_loss_backward_scale = scale if scale is None else scale.copy_(value)


def loss_scalers() -> list[Any]:
    """Return the classes that hold the scale of an auxiliary loss, of the loaded modules."""
    found = _loaded(_LOSS_SCALERS)
    return [scaler for scaler in found if hasattr(scaler, "main_loss_backward_scale")]


def loss_trackers() -> list[Any]:
    """Return the values of the auxiliary losses that Megatron has gathered for its log."""
    gathered = [
        value for helper in _loaded(_LOSS_TRACKERS) for value in sorted(helper.tracker.items())
    ]
    moe = getattr(sys.modules.get(_MOE_LOGGING), "_MOE_METRICS_TRACKER", None)
    metrics = sorted(moe.metrics.items()) if moe else []
    return [*gathered, *((name, entry.values) for name, entry in metrics)]


def _loaded(names: Sequence[tuple[str, str]]) -> list[Any]:
    """Return the attributes of modules that are loaded; no module is imported for it."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return [each for each in found if each is not None]

"""Launches of a run, from the arguments of the jobs that trained it."""

import secrets
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from megatron.core import num_microbatches_calculator

from megatron_tokscale.store import Batch, Launch, LearningRates
from megatron_tokscale.training.history.counts import canonical_group
from megatron_tokscale.training.history.past import Past
from megatron_tokscale.training.history.saved import SavedCheckpoint


def launch_of_saved(saved: SavedCheckpoint, past: Past) -> Launch:
    """Return the launch that saved a checkpoint, as if it had started at `past`."""
    launch = launch_of_args(saved.args, saved.scheduler or {}, past)
    return replace(launch, past="read in a checkpoint")


def launch_of_job(
    args: Namespace,
    scheduler: Any,
    optimizer: Any,
    past: Past,
    *,
    schedule: str,
    versions: Mapping[str, str],
) -> Launch:
    """Return this job's launch, at its start.

    Args:
        args: Megatron's arguments.
        scheduler: the learning rate's scheduler, after a checkpoint has been loaded.
        optimizer: Megatron's optimizer, after a checkpoint has been loaded; the rates are those of
            its first group with the default settings.
        past: past of the run.
        schedule: the probe schedule.
        versions: versions of the packages, by name.
    """
    group = canonical_group(optimizer) or {}
    state = {name: value for name, value in vars(scheduler).items() if name != "optimizer"}
    state |= {name: group[name] for name in ("max_lr", "min_lr") if group.get(name) is not None}
    launch = launch_of_args(args, state, replace(past, scheduler_samples=int(scheduler.num_steps)))
    if not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        # Megatron-core from 0.18 on takes --rampup-batch-size and ignores it.
        launch = replace(launch, batch=replace(launch.batch, rampup_batch_size=None))
    own = secrets.token_hex(8)
    return replace(launch, schedule=schedule, versions=dict(versions), launch_id=own)


def launch_of_args(args: Namespace, scheduler: Mapping[str, Any], past: Past) -> Launch:
    """Return a launch from a job's arguments and the known values of its scheduler."""
    logits = getattr(args, "logit_dtype", None)
    return Launch(
        step=past.step,
        consumed_samples=past.samples,
        consumed_tokens=past.tokens,
        lr_sum=past.lr_sum,
        scheduler_samples=past.scheduler_samples,
        past=past.source,
        seq_length=int(args.seq_length),
        batch=_batch(args),
        learning_rate=_learning_rates(args, scheduler),
        seed=getattr(args, "seed", None),
        layout=_layout(args),
        logit_dtype=None if logits is None else str(logits).removeprefix("torch."),
    )


def _batch(args: Namespace) -> Batch:
    rampup = getattr(args, "rampup_batch_size", None)
    ranks = int(args.data_parallel_size) * int(getattr(args, "gtp_weight_remat_size", 1) or 1)
    return Batch(
        global_batch_size=int(args.global_batch_size),
        micro_batch_size=int(args.micro_batch_size),
        data_parallel_size=ranks,
        rampup_batch_size=[int(word) for word in rampup] if rampup else None,
        step_batch_size_schedule=getattr(args, "step_batch_size_schedule", None),
        decrease_batch_size_if_needed=bool(getattr(args, "decrease_batch_size_if_needed", False)),
        # A job that counts in samples also has a number of steps, computed from them.
        train_iters=None
        if getattr(args, "train_samples", None)
        else _int_or_none(getattr(args, "train_iters", None)),
        train_samples=_int_or_none(getattr(args, "train_samples", None)),
    )


def _learning_rates(args: Namespace, scheduler: Mapping[str, Any]) -> LearningRates:
    """Return the schedule of Megatron's flags; its scheduler's values, where known, replace them.

    Flags in iterations count in steps of the global batch size.
    """
    in_samples = bool(getattr(args, "train_samples", None))
    unit = "samples" if in_samples else "iters"
    scale = 1 if in_samples else int(args.global_batch_size)
    length = getattr(args, f"lr_decay_{unit}", None) or getattr(args, f"train_{unit}", None) or 0
    fraction = getattr(args, "lr_warmup_fraction", None)
    warmup = getattr(args, f"lr_warmup_{unit}", None) or 0
    wsd = getattr(args, f"lr_wsd_decay_{unit}", None)
    made: dict[str, Any] = {
        "max_lr": args.lr,
        "min_lr": getattr(args, "min_lr", 0.0),
        "init_lr": getattr(args, "lr_warmup_init", 0.0),
        "lr_decay_style": getattr(args, "lr_decay_style", "linear"),
        "lr_warmup_steps": (warmup if fraction is None else fraction * length) * scale,
        "lr_decay_steps": length * scale,
        "wsd_decay_steps": None if wsd is None else wsd * scale,
        "lr_wsd_decay_style": getattr(args, "lr_wsd_decay_style", None),
    }
    held = made | {name: scheduler[name] for name in made if scheduler.get(name) is not None}
    return LearningRates(
        peak=float(held["max_lr"]),
        minimum=float(held["min_lr"] or 0.0),
        initial=float(held["init_lr"] or 0.0),
        decay_style=str(held["lr_decay_style"]),
        warmup_samples=float(held["lr_warmup_steps"]),
        decay_samples=float(held["lr_decay_steps"]),
        wsd_decay_style=held["lr_wsd_decay_style"],
        wsd_decay_samples=_float_or_none(held["wsd_decay_steps"]),
        warmup_iters=None if in_samples or fraction is not None else _int_or_none(warmup),
        warmup_fraction=_float_or_none(fraction),
        decay_iters=None if in_samples else _int_or_none(length),
        wsd_decay_iters=None if in_samples else _int_or_none(wsd),
        overrides_checkpoint=bool(getattr(args, "override_opt_param_scheduler", False)),
        uses_checkpoint=bool(getattr(args, "use_checkpoint_opt_param_scheduler", False)),
    )


def _int_or_none(value: Any) -> int | None:
    return None if value is None else int(value)


def _float_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


_LAYOUT: Final = {
    "world_size": "world_size",
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "data": "data_parallel_size",
    "padded_vocab_size": "padded_vocab_size",
}


def _layout(args: Namespace) -> dict[str, int | None]:
    return {name: _int_or_none(getattr(args, flag, None)) for name, flag in _LAYOUT.items()}

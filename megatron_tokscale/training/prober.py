"""When a probe is due, take it, write it, log it: the state of the probe in a training job."""

import contextlib
import importlib.metadata
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.training import get_timers, global_vars, print_rank_0, print_rank_last
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet, Schedule
from megatron_tokscale.store import LossRecord, RunWriter
from megatron_tokscale.training import probe_pass
from megatron_tokscale.training.clock import LearningRateSum, learning_rate
from megatron_tokscale.training.config import TokscaleConfig, run_directory
from megatron_tokscale.training.isolation import isolated, synced_parameters, verified
from megatron_tokscale.training.support import check_probe

logger = logging.getLogger(__name__)
_TIMER = "tokscale-probe"


class Prober:
    """Takes the probes of one job. All ranks hold one and act together."""

    def __init__(self, config: TokscaleConfig, args: Namespace):
        """Check everything that can be checked before the model is built.

        Raises:
            TokscaleError: the probe set does not fit the job, or a setting is not supported.
        """
        assert config.tokscale_probe_set is not None
        check_probe(args)
        self._config = config
        self._args = args
        self._schedule = Schedule.parse(config.tokscale_schedule)
        self._probe_set = ProbeSet.load(Path(config.tokscale_probe_set))
        _check_fit(self._probe_set, config.tokscale_probe_set, args)
        self._writer = RunWriter(run_directory(config, args))
        self._writer.check(self._probe_set, _model_info(args))
        self._lr_sum = LearningRateSum(args)
        self._loss_dict: Mapping[str, torch.Tensor] = {}
        self._forward_step: Callable[..., Any] | None = None
        self._is_active = True

    def note_training_loss(self, loss_dict: Mapping[str, torch.Tensor]) -> None:
        """Remember the losses of the step just taken; they are read only when a probe is due."""
        self._loss_dict = loss_dict

    def on_train_start(
        self, forward_step: Callable[..., Any], model: Sequence[Any], optimizer: Any, scheduler: Any
    ) -> None:
        """Open the run, and take the probe of the first step if it is due and not on disk."""
        self._forward_step = forward_step
        step = int(self._args.iteration)
        is_due = self._schedule.is_due(step, self._args.train_iters)
        is_taken = False
        error: OSError | None = None
        if probe_pass.is_writer():
            try:
                self._writer.open(self._probe_set, self._run_info(optimizer), step)
                is_taken = self._writer.has(step)
            except OSError as caught:
                error = caught
        failed, taken = _sum_over_ranks(float(error is not None), float(is_taken))
        if failed:
            self._stop_probing(error)
        elif is_due and not taken:
            self._probe(step, model, optimizer, scheduler)

    def on_step(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take a probe if one is due after `step` optimizer steps."""
        if not self._is_active or not self._schedule.is_due(step, self._args.train_iters):
            return
        interval = get_timers()("interval-time")
        interval.stop()
        self._probe(step, model, optimizer, scheduler)
        get_timers()("interval-time", log_level=0).start(barrier=True)

    def _probe(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        assert self._forward_step is not None
        timers = get_timers()
        timers(_TIMER, log_level=0).start(barrier=True)
        started = time.perf_counter()
        check = (
            verified(model, optimizer, step)
            if self._config.tokscale_verify_isolation
            else contextlib.nullcontext()
        )
        with synced_parameters(model, optimizer, self._args), check, isolated(model):
            loss_BS = probe_pass.run(self._probe_set, self._forward_step, model, self._args)
        mean, error = 0.0, None
        if loss_BS is not None:
            loss_N = loss_BS[self._probe_set.mask_BS]
            mean = float(np.mean(loss_N, dtype=np.float64))
            duration = time.perf_counter() - started
            error = self._write(loss_N, self._record(step, duration, optimizer, scheduler))
        timers(_TIMER).stop()
        failed, mean = _sum_over_ranks(float(error is not None), mean)
        self._log(step, mean)
        timers.log([_TIMER])
        if failed:
            self._stop_probing(error)

    def _write(self, loss_N: NDArray[np.float32], record: LossRecord) -> OSError | None:
        try:
            self._writer.write(loss_N.astype(self._config.tokscale_loss_dtype), record)
        except OSError as error:
            return error
        return None

    def _record(self, step: int, duration: float, optimizer: Any, scheduler: Any) -> LossRecord:
        samples = int(self._args.consumed_train_samples)
        return LossRecord(
            step=step,
            consumed_samples=samples,
            consumed_tokens=samples * int(self._args.seq_length),
            learning_rate=learning_rate(optimizer),
            lr_sum=self._lr_sum(scheduler, optimizer),
            training_loss=float(self._loss_dict.get("lm loss", float("nan"))),
            wall_time=time.time(),
            duration=duration,
            probe_fingerprint=self._probe_set.fingerprint,
            versions=", ".join(f"{name} {version}" for name, version in _versions().items()),
        )

    def _stop_probing(self, error: OSError | None) -> None:
        reason = f": {error}" if error else " (see the rank that writes)"
        message = f"losses cannot be written to {self._writer.folder}{reason}"
        if self._config.tokscale_on_write_error == "abort":
            raise TokscaleError(message)
        self._is_active = False
        if error:
            logger.error("tokscale: %s; NO MORE PROBES are taken", message)
        print_rank_0(f"tokscale: {message}; training goes on WITHOUT probes")

    def _log(self, step: int, mean: float) -> None:
        print_rank_last(
            f" tokscale probe at step {step} | {self._probe_set.n_tokens} tokens"
            f" | mean loss: {mean:.6E}"
        )
        samples = self._args.consumed_train_samples
        if writer := global_vars.get_tensorboard_writer():
            writer.add_scalar("tokscale/probe loss", mean, step)
            writer.add_scalar("tokscale/probe loss vs samples", mean, samples)
        if wandb := global_vars.get_wandb_writer():
            wandb.log({"tokscale/probe loss": mean}, step)

    def _run_info(self, optimizer: Any) -> dict[str, Any]:
        args = self._args
        group: dict[str, Any] = next(iter(optimizer.param_groups), {})
        return {
            "probe_fingerprint": self._probe_set.fingerprint,
            "schedule": self._config.tokscale_schedule,
            "model": _model_info(args),
            "layout": {
                "world_size": args.world_size,
                "tensor": args.tensor_model_parallel_size,
                "pipeline": args.pipeline_model_parallel_size,
                "virtual_pipeline": args.virtual_pipeline_model_parallel_size,
                "context": args.context_parallel_size,
                "expert": args.expert_model_parallel_size,
                "data": args.data_parallel_size,
                "padded_vocab_size": args.padded_vocab_size,
            },
            "batch": {
                "global_batch_size": args.global_batch_size,
                "micro_batch_size": args.micro_batch_size,
                "train_iters": args.train_iters,
            },
            "learning_rate": {
                "peak": float(group.get("max_lr") or args.lr),
                "minimum": args.min_lr,
                "decay_style": args.lr_decay_style,
                "decay_iters": args.lr_decay_iters,
                "warmup_iters": args.lr_warmup_iters,
            },
            "seed": args.seed,
            "versions": _versions(),
        }


def _check_fit(probe_set: ProbeSet, path: str, args: Namespace) -> None:
    if probe_set.seq_length != args.seq_length:
        raise TokscaleError(
            f"probe set {path} has sequences of {probe_set.seq_length} tokens, the job trains on "
            f"--seq-length {args.seq_length}; build a probe set for that length"
        )
    vocab_size = args.vocab_size or global_vars.get_tokenizer().vocab_size
    if probe_set.vocab_size != vocab_size:
        raise TokscaleError(
            f"probe set {path} is for a vocabulary of {probe_set.vocab_size}, the job has "
            f"{vocab_size}; build a probe set with the job's tokenizer"
        )


def _model_info(args: Namespace) -> dict[str, Any]:
    """What stays the same when a run is resumed in another layout."""
    return {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_experts": args.num_experts,
        "seq_length": args.seq_length,
    }


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name)
        for name in ("megatron-tokscale", "megatron-core", "torch")
        if _is_installed(name)
    }


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _sum_over_ranks(*values: float) -> list[float]:
    """Sum over all ranks, so that all decide alike."""
    tensor = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()

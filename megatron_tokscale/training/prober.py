"""When a probe is due, take it, write it, log it: the state of the probe in a training job."""

import gc
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_timers, global_vars, print_rank_0, print_rank_last
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.probe import Moment, ProbeSet
from megatron_tokscale.store import BackgroundWriter, LossRecord, RunWriter
from megatron_tokscale.training import probe_pass
from megatron_tokscale.training.clock import LearningRateSum, learning_rate
from megatron_tokscale.training.config import TokscaleConfig, run_directory, schedule_of
from megatron_tokscale.training.isolation import isolated, synced_parameters, verified
from megatron_tokscale.training.metrics import Metrics
from megatron_tokscale.training.ranks import first_of_all_ranks, sum_over_ranks
from megatron_tokscale.training.scalars import log_scalars
from megatron_tokscale.training.size import model_size
from megatron_tokscale.training.support import check_probe, probe_set_misfits, raise_first
from megatron_tokscale.training.versions import find_megatron

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
        self._schedule = schedule_of(config, args)
        self._verifies = config.tokscale_verify_isolation and not config.tokscale_replay
        self._probe_set = ProbeSet.load(Path(config.tokscale_probe_set))
        vocab_size = args.vocab_size or global_vars.get_tokenizer().vocab_size
        raise_first(
            probe_set_misfits(
                self._probe_set, config.tokscale_probe_set, args.seq_length, vocab_size
            )
        )
        self._writer = RunWriter(run_directory(config, args))
        self._writer.check(self._probe_set, _model_info(args))
        self._background = BackgroundWriter(self._writer)
        self.is_writer = probe_pass.is_writer()
        self._metrics = Metrics(
            self._probe_set,
            config.tokscale_fall_threshold,
            _tokenizer_of_text(args) if self.is_writer else None,
        )
        self._lr_sum = LearningRateSum(args)
        self._loss_dict: Mapping[str, torch.Tensor] = {}
        self._forward_step: Callable[..., Any] | None = None
        self._is_active = True
        self.last_step = -1
        self._tokens = -1
        self._previous_N: NDArray[np.float32] | None = None

    @property
    def probe_set(self) -> ProbeSet:
        """The watched tokens."""
        return self._probe_set

    def note_training_loss(self, loss_dict: Mapping[str, torch.Tensor]) -> None:
        """Remember the losses of the step just taken; they are read only when a probe is due."""
        self._loss_dict = loss_dict

    def open(
        self,
        forward_step: Callable[..., Any],
        model: Sequence[Any],
        optimizer: Any,
        resume_step: int | None,
    ) -> None:
        """Open the run's directory, on the rank that writes, and agree on how that went.

        Args:
            forward_step: the user's forward step.
            model: for the record of its size.
            optimizer: for the record of the learning rate's schedule.
            resume_step: where training goes on; None in a replay, which abandons no losses.

        Raises:
            TokscaleError: another job has the directory, or it cannot be written and the job is to
                stop for that.
        """
        self._forward_step = forward_step
        size = model_size(model, self._args)
        refusal, failure = None, None
        if self.is_writer:
            try:
                info = self._run_info(optimizer)
                info |= {"size": size, "is_replay": resume_step is None}
                self._writer.open(self._probe_set, info, resume_step)
                if resume_step is not None:
                    self._previous_N = self._writer.latest(resume_step)
            except TokscaleError as error:
                refusal = str(error)
            except OSError as error:
                failure = str(error)
        if message := first_of_all_ranks(refusal):
            raise TokscaleError(message)
        if message := first_of_all_ranks(failure):
            self._stop_probing(message)

    def on_train_start(
        self, forward_step: Callable[..., Any], model: Sequence[Any], optimizer: Any, scheduler: Any
    ) -> None:
        """Open the run, and take the probe of the first step if it is due and not on disk."""
        step = int(self._args.iteration)
        self.open(forward_step, model, optimizer, step)
        self._tokens = self._consumed_tokens()
        batch = get_current_global_batch_size() * int(self._args.seq_length)
        before = self._tokens - batch if step > 0 else -1
        if self._is_active and self._is_due(step, before) and not self.is_on_disk(step):
            self.take(step, model, optimizer, scheduler)

    def steps_on_disk(self) -> list[int]:
        """The steps whose losses are on disk, ascending; all ranks agree."""
        own = json.dumps(self._writer.steps()) if self.is_writer else None
        steps: list[int] = json.loads(first_of_all_ranks(own) or "[]")
        return steps

    def note(self, event: str, **values: Any) -> None:
        """Write an event into the run's journal, as far as that can be written."""
        if self.is_writer and self._is_active:
            with suppress(OSError):  # the losses' own errors are met at the next probe
                self._writer.journal(event, **values)

    def is_on_disk(self, step: int) -> bool:
        """Whether the losses of `step` are on disk already; all ranks agree."""
        return sum_over_ranks(float(self.is_writer and self._writer.has(step)))[0] > 0

    def is_on_schedule(self, step: int, *, is_last: bool) -> bool:
        """Whether the schedule has the checkpoint of `step`, for a replay."""
        moment = Moment(step=step, is_checkpoint=True, is_last=is_last, tokens_before=0)
        return self._schedule.is_due(moment)

    def on_step(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take a probe if one is due after `step` optimizer steps."""
        before, self._tokens = self._tokens, self._consumed_tokens()
        if self._is_active and self._is_due(step, before):
            self._take_between_steps(step, model, optimizer, scheduler)

    def on_exit(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take the probe of a job that ends in order after `step`, if it is asked for."""
        if not self._is_active or step == self.last_step:
            return
        moment = Moment(
            step=step,
            tokens=self._tokens,
            tokens_before=self._tokens,
            is_checkpoint=bool(self._args.save),
        )
        if self._config.tokscale_probe_at_exit or self._schedule.is_due(moment):
            self._take_between_steps(step, model, optimizer, scheduler)

    def _is_due(self, step: int, tokens_before: int) -> bool:
        args = self._args
        is_last = step == args.train_iters
        interval = args.save_interval if args.save else None
        moment = Moment(
            step=step,
            tokens=self._tokens,
            tokens_before=tokens_before,
            is_last=is_last,
            is_checkpoint=step > 0
            and bool(args.save)
            and (is_last or bool(interval and step % interval == 0)),
        )
        at_exit = is_last and self._config.tokscale_probe_at_exit
        return at_exit or self._schedule.is_due(moment)

    def _consumed_tokens(self) -> int:
        return int(self._args.consumed_train_samples) * int(self._args.seq_length)

    def _take_between_steps(
        self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any
    ) -> None:
        """Take a probe that does not count in Megatron's time per step and energy per step."""
        interval = get_timers()("interval-time", log_level=0)
        interval.stop()
        counts_energy = getattr(self._args, "log_energy", False)
        energy = global_vars.get_energy_monitor() if counts_energy else None
        if energy:
            energy.pause()
        self.take(step, model, optimizer, scheduler)
        if self._args.manual_gc and getattr(self._args, "manual_gc_eval", False):
            gc.collect(generation=0)
        if energy:
            energy.resume()
        interval.start(barrier=True)

    def take(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take the probe of `step`, and hand its losses over to be written.

        Raises:
            TokscaleError: the forward step does not fit, the probe has changed the training's state
                (with --tokscale-verify-isolation), or losses cannot be written and the job is to
                stop for that.
        """
        assert self._forward_step is not None
        write_error = self._background.join()
        timers = get_timers()
        timers(_TIMER, log_level=0).start(barrier=True)
        started = time.perf_counter()
        loss_N, refusal = None, None
        with (
            synced_parameters(model, optimizer, self._args),
            verified(model, optimizer, step, is_on=self._verifies),
            isolated(model),
        ):
            try:
                loss_N = probe_pass.run(self._probe_set, self._forward_step, model, self._args)
            except TokscaleError as error:
                refusal = str(error)
        values_V = np.zeros(self._metrics.n_values)
        losses_N = None if loss_N is None else loss_N.cpu().numpy()
        if losses_N is not None:
            values_V = self._metrics.measure(losses_N, self._previous_N)
            self._previous_N = losses_N
        timers(_TIMER).stop()
        failed, refused, *summed_V = sum_over_ranks(
            float(write_error is not None), float(refusal is not None), *values_V
        )
        if refused and (message := first_of_all_ranks(refusal)):
            raise TokscaleError(message)
        self.last_step = step
        self._log(step, self._metrics.named(np.array(summed_V)))
        timers.log([_TIMER])
        if failed:
            self._stop_probing(first_of_all_ranks(str(write_error) if write_error else None))
        elif losses_N is not None:
            duration = time.perf_counter() - started
            record = self._record(step, duration, optimizer, scheduler)
            self._background.submit(losses_N.astype(self._config.tokscale_loss_dtype), record)

    def before_checkpoint(self) -> None:
        """Wait until the losses so far are on disk: a resumed job must not miss what came before.

        An error is remembered for the next probe, where the ranks agree what to do about it.
        """
        self._background.wait()

    def close(self) -> None:
        """Wait for the last losses, say so if they are lost, and give the directory back.

        This rank alone; no other need be alive.

        Raises:
            TokscaleError: losses could not be written and the job is to stop for that.
        """
        error = self._background.join()
        self._writer.close()
        if error:
            self._is_active = False
            message = self._unwritable(str(error))
            if self._stops_on_write_error:
                raise TokscaleError(message)
            print(f"megatron-tokscale: {message}", file=sys.stderr, flush=True)

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

    @property
    def _stops_on_write_error(self) -> bool:
        """A replay has nothing to go on with."""
        is_replay = self._config.tokscale_replay is not None
        return is_replay or self._config.tokscale_on_write_error == "abort"

    def _unwritable(self, reason: str | None) -> str:
        return f"losses cannot be written to {self._writer.folder}: {reason}"

    def _stop_probing(self, reason: str | None) -> None:
        """Follow --tokscale-on-write-error; all ranks come here together."""
        message = self._unwritable(reason)
        if self._stops_on_write_error:
            raise TokscaleError(message)
        self._is_active = False
        print_rank_0(f"tokscale: {message}; training goes on WITHOUT probes")

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"{name}: {value:.6E}" for name, value in metrics.items()]
        print_rank_last(
            f" tokscale probe at step {step} | {self._probe_set.n_tokens} tokens | "
            + " | ".join(parts)
        )
        log_scalars(metrics, step, self._args)

    def _run_info(self, optimizer: Any) -> dict[str, Any]:
        args = self._args
        group: dict[str, Any] = next(iter(optimizer.param_groups), {})
        return {
            "probe_fingerprint": self._probe_set.fingerprint,
            "schedule": self._schedule.spec,
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
                "peak": group.get("max_lr") or args.lr,
                "minimum": args.min_lr,
                "decay_style": args.lr_decay_style,
                "decay_iters": args.lr_decay_iters,
                "warmup_iters": args.lr_warmup_iters,
            },
            "seed": args.seed,
            "versions": _versions(),
        }


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


def _tokenizer_of_text(args: Namespace) -> Any:
    """Megatron's tokenizer, if it stands for a text."""
    is_null = str(args.tokenizer_type).startswith("Null")
    return None if is_null else global_vars.get_tokenizer()


def _versions() -> dict[str, str]:
    megatron = find_megatron()
    return {
        "megatron-tokscale": __version__,
        "megatron-core": megatron.version if megatron else "of unknown version",
        "torch": str(torch.__version__),
    }

"""When a probe is due, take it, write it, log it: the state of the probe in a training job."""

import gc
import json
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.training import get_timers, global_vars, print_rank_0, print_rank_last
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.core.errors import AgreedError, TokscaleError, say
from megatron_tokscale.corpus.names import renamed
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.probe import Moment, ProbeSet
from megatron_tokscale.store import BackgroundWriter, Launch, LossRecord, RunWriter
from megatron_tokscale.training.config import TokscaleConfig, run_directory, schedule_of
from megatron_tokscale.training.history.counts import NOTE, Clock, Past, learning_rate, noted
from megatron_tokscale.training.history.reckon import RECKONED, Saved, launch_of_job, past_of_job
from megatron_tokscale.training.probe import probe_pass
from megatron_tokscale.training.probe.isolation import isolated, synced_parameters, verified
from megatron_tokscale.training.probe.metrics import Metrics
from megatron_tokscale.training.probe.size import model_size
from megatron_tokscale.training.ranks import (
    first_of_all_ranks,
    refuse_together,
    sum_over_ranks,
    together,
)
from megatron_tokscale.training.scalars import log_scalars
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
        self._writer.check(self._probe_set, model_info(args))
        self._background = BackgroundWriter(self._writer)
        self.is_writer = probe_pass.is_writer()
        self._metrics = Metrics(
            self._probe_set,
            config.tokscale_fall_threshold,
            _tokenizer_of_text(args) if self.is_writer else None,
            _names_in_log(self._probe_set, args),
        )
        self._clock = Clock(Past(step=0, samples=0), args.seq_length)
        self._launches: tuple[Launch, ...] = ()
        self._saved: Saved | None = None
        self._loss_dict: Mapping[str, torch.Tensor] = {}
        self._forward_step: Callable[..., Any] | None = None
        self._is_active = True
        self.is_open = False
        self.untraced_from: int | None = None
        self.last_step = -1
        self._step = -1
        self._previous_N: NDArray[np.float32] | None = None

    @property
    def probe_set(self) -> ProbeSet:
        """The watched tokens."""
        return self._probe_set

    def note_training_loss(self, loss_dict: Mapping[str, torch.Tensor]) -> None:
        """Remember the losses of the step just taken; they are read only when a probe is due."""
        self._loss_dict = loss_dict

    def note_checkpoint(self, state: Any) -> None:
        """Remember what a checkpoint that is being loaded holds of the run's past."""
        saved = Saved.from_state_dict(state)
        known = self._saved
        if saved and not (known and known.step == saved.step and saved.scheduler is None):
            self._saved = saved

    def open(
        self,
        forward_step: Callable[..., Any],
        model: Sequence[Any],
        launches: Sequence[Launch],
        resume_step: int | None,
    ) -> None:
        """Open the run's directory, on the rank that writes, and agree on how that went.

        Args:
            forward_step: the user's forward step.
            model: for the record of its size.
            launches: of the run, the present one as the last.
            resume_step: where training goes on; None in a replay, which abandons no losses.

        Raises:
            TokscaleError: another job has the directory, or it cannot be written and the job is to
                stop for that.
        """
        self._forward_step, self.is_open = forward_step, True
        size = model_size(model, self._args)
        refusal, failure, parted = None, None, None
        if self.is_writer:
            try:
                info = model_info(self._args)
                parted = self._writer.open(self._probe_set, info, launches, resume_step, size=size)
                if resume_step is not None:
                    self._previous_N = self._writer.latest(resume_step)
            except TokscaleError as error:
                refusal = str(error)
            except OSError as error:
                failure = str(error)
        refuse_together(refusal)
        if message := first_of_all_ranks(failure):
            self._stop_probing(message)
        if text := first_of_all_ranks(json.dumps(parted.to_json()) if parted else None):
            self._note_parting(Launch.from_json(json.loads(text)))

    def _note_parting(self, launch: Launch) -> None:
        """Say that losses were set aside; from that launch's first sample on they tell no data."""
        self.untraced_from = launch.consumed_samples
        print_rank_0(
            f"tokscale: the losses in {self._writer.folder} from after step {launch.step} are not "
            "of the steps that have led to this job's checkpoint, and are set aside; give each "
            "branch a --tokscale-dir of its own"
        )

    def on_train_start(
        self, forward_step: Callable[..., Any], model: Sequence[Any], optimizer: Any, scheduler: Any
    ) -> None:
        """Open the run, and take the probe of the first step if it is due and not on disk.

        Due is also one that the run has missed since its last probe.

        Raises:
            TokscaleError: see `open`; or the schedule counts tokens, and it is not known how many
                the run has consumed.
        """
        step = int(self._args.iteration)
        past = self._agree_on_past(step, optimizer, scheduler)
        self._clock = Clock(past, int(self._args.seq_length), scheduler, optimizer)
        self.open(forward_step, model, self._launches, step)
        if step and self._is_active and not self._is_noted(step) and self.steps_on_disk():
            print_rank_0(
                f"tokscale: a job without the plugin saved the checkpoint of step {step}, which "
                f"does not tell its run; the losses in {self._writer.folder} are taken for this "
                "run's; if they are not, give another --tokscale-dir"
            )
        before = self._tokens if past.tokens_before is None else past.tokens_before
        self._step, tokens_before = self._last_moment(step, before)
        is_checkpoint = step > 0 and bool(self._args.save)
        is_due = self._is_active and self._is_due(step, tokens_before, is_checkpoint=is_checkpoint)
        if is_due and not self.is_on_disk(step):
            self.take(step, model, optimizer, scheduler)
        self._step = step

    def check_launches(self, launches: Sequence[Launch], step: int) -> None:
        """Refuse a run directory of another run than that of a checkpoint; on the writer alone.

        Raises:
            TokscaleError: see `RunWriter.check_launches`.
        """
        self._writer.check_launches(launches, step)

    def _is_noted(self, step: int) -> bool:
        """Return whether the checkpoint that the job has loaded tells the launches before it."""
        samples = int(self._args.consumed_train_samples)
        past = noted(self._saved.args, step, samples) if self._saved else None
        return bool(past and past.launches)

    def _last_moment(self, step: int, tokens_before: int) -> tuple[int, int]:
        """Return the step and the tokens up to which the run at `step` has its probes.

        Args:
            step: where the job starts.
            tokens_before: training tokens consumed before the last step.
        """
        if step == 0 or not self._is_active:
            return step - 1, -1
        on_disk = [known for known in self.steps_on_disk() if known <= step]
        moment = step - 1, tokens_before
        if not on_disk:
            missed = Moment(step=moment[0], step_before=-1, tokens=moment[1])
            if self._schedule.is_due(missed):
                print_rank_0(
                    f"tokscale: no probe from before step {step} is in {self._writer.folder}, and "
                    "those that were due cannot be taken any more; --tokscale-replay probes saved "
                    "checkpoints"
                )
            return moment
        tokens = first_of_all_ranks(self._tokens_on_disk(on_disk[-1]) if self.is_writer else None)
        return min(on_disk[-1], moment[0]), min(int(tokens or moment[1]), moment[1])

    def _tokens_on_disk(self, step: int) -> str | None:
        """Return the tokens consumed by the probe of `step`, None if they cannot be read."""
        record = self._writer.record(step)
        tokens = None if record is None else record.consumed_tokens
        return None if tokens is None else str(tokens)

    def _agree_on_past(self, step: int, optimizer: Any, scheduler: Any) -> Past:
        """Find out what the run has done before, on the rank that writes, and tell all ranks.

        Raises:
            AgreedError: the run directory cannot be read; or the schedule counts tokens, and the
                past ones are not known.
        """

        def found() -> str:
            samples = int(self._args.consumed_train_samples)
            known = (self._writer.record(step), self._writer.launches())
            past = past_of_job(step, samples, self._saved, *known)
            launch = launch_of_job(
                self._args,
                scheduler,
                optimizer,
                past,
                schedule=self._schedule.spec,
                versions=_versions(),
            )
            return json.dumps(replace(past, launches=(*past.launches, launch)).to_json())

        text = first_of_all_ranks(together(found, where=self.is_writer))
        past = Past.from_json(json.loads(text or "null"))
        self._launches = past.launches
        if past.tokens is None and self._schedule.in_tokens:
            raise AgreedError(
                f"--tokscale-probe-schedule {self._schedule.spec} counts tokens, and how many were "
                f"consumed by step {step} is unknown: the checkpoint's settings do not tell; give "
                "a schedule in steps"
            )
        _say_what_is_reckoned(past)
        return past

    def note_history(self, step: int, optimizer: Any, scheduler: Any) -> None:
        """Put on Megatron's args what the checkpoint of `step` is to hold of the run's past."""
        if self._launches:
            samples = int(self._args.consumed_train_samples)
            self._clock.advance(samples, scheduler, optimizer)
            setattr(self._args, NOTE, self._clock.note(step, samples, self._launches))

    def steps_on_disk(self) -> list[int]:
        """The steps whose losses are on disk, ascending; all ranks agree."""
        own = None
        with suppress(OSError):  # of a directory that is gone: the next probe meets it too
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
        return step in self.steps_on_disk()

    def is_on_schedule(self, step: int, *, is_last: bool) -> bool:
        """Whether the schedule has the checkpoint of `step`, for a replay."""
        moment = Moment(step=step, is_checkpoint=True, is_last=is_last, tokens_before=0)
        return self._schedule.is_due(moment)

    def on_step(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take a probe if one is due after `step` optimizer steps."""
        if self._is_now_due(step, optimizer, scheduler, is_checkpoint=self._saves_at(step)):
            self._take_between_steps(step, model, optimizer, scheduler)

    def on_train_end(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take a probe that is due at the end, if the job has skipped its last steps.

        Raises:
            AgreedError: losses could not be written and the job is to stop for that: on all ranks,
                before one of them has left the others waiting.
        """
        if step > self._step:
            interval = self._args.save_interval
            is_saved = bool(self._args.save and interval and step % interval)
            if self._is_now_due(step, optimizer, scheduler, is_checkpoint=is_saved):
                self.take(step, model, optimizer, scheduler)
        error = self._background.join()
        if error and not self._stops_on_write_error:
            self._is_active = False
            say(self._unwritable(str(error)))
            error = None
        refuse_together(self._unwritable(str(error)) if error else None)

    def after_checkpoint(
        self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any
    ) -> None:
        """Take the probe of a checkpoint that was not foreseen, such as one before an exit."""
        if not self._schedule.checkpoints or not self._is_active or step in (0, self.last_step):
            return
        if not self.is_on_disk(step):
            self._take_between_steps(step, model, optimizer, scheduler)

    def on_exit(self, step: int, model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
        """Take the probe of a job that ends in order after `step`, if it is asked for."""
        if self._is_active and self._config.tokscale_probe_at_exit and step != self.last_step:
            self._take_between_steps(step, model, optimizer, scheduler)

    def _is_now_due(
        self, step: int, optimizer: Any, scheduler: Any, *, is_checkpoint: bool
    ) -> bool:
        """Count what was consumed by `step`; return whether a probe is due since the last count."""
        tokens_before = self._tokens
        self._clock.advance(int(self._args.consumed_train_samples), scheduler, optimizer)
        is_due = self._is_active and self._is_due(step, tokens_before, is_checkpoint=is_checkpoint)
        self._step = step
        return is_due

    def _is_due(self, step: int, tokens_before: int, *, is_checkpoint: bool) -> bool:
        is_last = step >= self._args.train_iters
        moment = Moment(
            step=step,
            step_before=self._step,
            tokens=self._tokens,
            tokens_before=tokens_before,
            is_last=is_last,
            is_checkpoint=is_checkpoint,
        )
        at_exit = is_last and self._config.tokscale_probe_at_exit
        return at_exit or self._schedule.is_due(moment)

    @property
    def _tokens(self) -> int:
        """Training tokens consumed; 0 where that is unknown, and no schedule counts them."""
        return self._clock.tokens or 0

    def _saves_at(self, step: int) -> bool:
        """Return whether Megatron saves a checkpoint after `step`, whatever else happens."""
        args = self._args
        intervals = args.save_interval, getattr(args, "non_persistent_save_interval", None)
        is_regular = any(interval and step % interval == 0 for interval in intervals)
        return bool(args.save) and (is_regular or step >= args.train_iters)

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
            raise AgreedError(message)
        self.last_step = step
        self._log(step, self._metrics.named(np.array(summed_V)))
        timers.log([_TIMER])
        if failed:
            self._stop_probing(first_of_all_ranks(str(write_error) if write_error else None))
        elif losses_N is not None:
            duration = time.perf_counter() - started
            record = self._record(step, duration, optimizer)
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
        self.is_open = False
        if error:
            self._is_active = False
            message = self._unwritable(str(error))
            if self._stops_on_write_error:
                raise TokscaleError(message)
            say(message)

    def take_saved(self, past: Past, model: Sequence[Any]) -> None:
        """Take the probe of a checkpoint that was loaded, of which `past` is known."""
        rate = float("nan")
        if past.launches and past.scheduler_samples is not None:
            rate = past.launches[-1].learning_rate.at(past.scheduler_samples)
        optimizer = SimpleNamespace(param_groups=[{"lr": rate}])
        self._clock = Clock(past, int(self._args.seq_length))
        self.take(past.step, model, optimizer, None)

    def _record(self, step: int, duration: float, optimizer: Any) -> LossRecord:
        return LossRecord(
            step=step,
            consumed_samples=int(self._args.consumed_train_samples),
            consumed_tokens=self._clock.tokens,
            learning_rate=learning_rate(optimizer),
            lr_sum=self._clock.lr_sum,
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
            raise AgreedError(message)
        self._is_active = False
        print_rank_0(f"tokscale: {message}; training goes on WITHOUT probes")

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"{name}: {value:.6E}" for name, value in metrics.items()]
        print_rank_last(
            f" tokscale probe at step {step} | {self._probe_set.n_tokens} tokens | "
            + " | ".join(parts)
        )
        log_scalars(metrics, step, self._args)


def _say_what_is_reckoned(past: Past) -> None:
    """Print where a run's past is from, unless the plugin has counted it."""
    is_known = past.tokens is not None and past.lr_sum is not None
    if past.step == 0 or (is_known and past.source != RECKONED):
        return
    tokens = "unknown" if past.tokens is None else str(past.tokens)
    lr_sum = "unknown" if past.lr_sum is None else f"{past.lr_sum:g}"
    source = past.source if past.source == RECKONED else "the checkpoint's settings do not tell"
    print_rank_0(
        f"tokscale: before step {past.step}: consumed tokens {tokens}, summed learning rate "
        f"{lr_sum} ({source})"
    )


def model_info(args: Namespace) -> dict[str, Any]:
    """What stays the same when a run is resumed in another layout."""
    return {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_experts": args.num_experts,
        "seq_length": args.seq_length,
    }


def _names_in_log(probe_set: ProbeSet, args: Namespace) -> list[str]:
    """Return the datasets' names, numbered as the job's training data, whose plan is logged too.

    The probe set may be of the validation part, whose datasets can come in another order.
    """
    try:
        known = DataSource.from_flags(args).names("train")
    except TokscaleError:  # a replay has no data
        return list(probe_set.datasets)
    return renamed(probe_set.prefixes, probe_set.datasets, known)


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

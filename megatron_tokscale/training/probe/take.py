"""One probe: the pass over the probe set, its metrics in the log, its losses on their way to disk.

Shapes: N watched tokens, V values of one probe.
"""

import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from megatron.training import get_timers, global_vars, print_rank_last

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.core.errors import AgreedError, TokscaleError
from megatron_tokscale.corpus.names import renamed
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import LossRecord
from megatron_tokscale.training.events import TrainingState
from megatron_tokscale.training.history.counts import TrainingCounts, learning_rate
from megatron_tokscale.training.probe import probe_pass
from megatron_tokscale.training.probe.isolation import isolated, synced_parameters, verified
from megatron_tokscale.training.probe.metrics import Detokenizer, Metrics
from megatron_tokscale.training.probe.probe_store import ProbeStore
from megatron_tokscale.training.ranks import first_of_all_ranks, sum_over_ranks
from megatron_tokscale.training.scalars import log_scalars
from megatron_tokscale.training.settings import JobProbeSettings
from megatron_tokscale.training.versions import installed_versions

_TIMER: Final = "tokscale-probe"


class ProbeTaker:
    """Takes probes. All ranks hold one and act together.

    Attributes:
        last_step: step of the last probe taken; -1 before the first.
        previous_N: losses of the last probe, on the rank that writes.
    """

    def __init__(
        self, settings: JobProbeSettings, probe_set: ProbeSet, store: ProbeStore, args: Namespace
    ) -> None:
        self._settings, self._probe_set, self._store = settings, probe_set, store
        self._metrics = Metrics(
            probe_set,
            settings.fall_threshold,
            _tokenizer_of_text(args) if store.is_writer else None,
            _names_in_log(probe_set, args),
        )
        self.last_step = -1
        self.previous_N: Floats32 | None = None

    def take(
        self,
        state: TrainingState,
        counts: TrainingCounts,
        losses: Mapping[str, torch.Tensor],
        *,
        before_first_step: bool = False,
    ) -> None:
        """Take the probe of the present step, and hand its losses over to be written.

        Args:
            state: state of the training.
            counts: counts of the training, for the record.
            losses: losses of the last training step, for the record.
            before_first_step: True if the job has not taken a training step yet.

        Raises:
            TokscaleError: the forward step does not fit, the probe has changed the training's state
                (with --tokscale-verify-isolation), or losses cannot be written and the job is to
                stop in that case.
        """
        write_error = self._store.join()
        timers = get_timers()
        timers(_TIMER, log_level=0).start(barrier=True)
        started = time.perf_counter()
        loss_N, refusal = self._run_pass(state, before_first_step)
        values_V = np.zeros(self._metrics.n_values)
        if loss_N is not None:
            values_V = self._metrics.measure(loss_N, self.previous_N)
            self.previous_N = loss_N
        timers(_TIMER).stop()
        # One message gives all ranks the outcome of each rank, and the metrics.
        failed, refused, *summed_V = sum_over_ranks(
            float(write_error is not None), float(refusal is not None), *values_V
        )
        if refused and (message := first_of_all_ranks(refusal)):
            raise AgreedError(message)
        self.last_step = state.step
        self._log(state, self._metrics.named(np.array(summed_V)))
        # Megatron's `timers.log` would gather the times of all ranks on every rank.
        seconds = timers(_TIMER).elapsed()
        print_rank_last(f"    time (ms) on the last rank | {_TIMER}: {1000 * seconds:.2f}")
        if failed:
            self._store.stop_probing(first_of_all_ranks(str(write_error) if write_error else None))
        elif loss_N is not None:
            duration = time.perf_counter() - started
            record = self._record(state, counts, losses, duration)
            self._store.submit(loss_N.astype(self._settings.loss_dtype), record)

    def _run_pass(
        self, state: TrainingState, before_first_step: bool
    ) -> tuple[Floats32 | None, str | None]:
        """Return loss_N, on the rank that writes, and the refusal by a rank's forward step."""
        assert state.forward_step is not None
        model, optimizer, args = state.model, state.optimizer, state.args
        with (
            synced_parameters(model, optimizer, args, before_first_step=before_first_step),
            verified(model, optimizer, state.step, is_on=self._settings.verifies_isolation),
            isolated(model, args),
        ):
            try:
                return probe_pass.run(self._probe_set, state.forward_step, model, args), None
            except TokscaleError as error:
                return None, str(error)

    def _record(
        self,
        state: TrainingState,
        counts: TrainingCounts,
        losses: Mapping[str, torch.Tensor],
        duration: float,
    ) -> LossRecord:
        return LossRecord(
            step=state.step,
            consumed_samples=state.consumed_samples,
            consumed_tokens=counts.tokens,
            learning_rate=learning_rate(state.optimizer),
            lr_sum=counts.lr_sum,
            training_loss=float(losses.get("lm loss", float("nan"))),
            wall_time=time.time(),
            duration=duration,
            probe_fingerprint=self._probe_set.fingerprint,
            versions=", ".join(f"{name} {v}" for name, v in installed_versions().items()),
        )

    def _log(self, state: TrainingState, metrics: Mapping[str, float]) -> None:
        parts = [f"{name}: {value:.6E}" for name, value in metrics.items()]
        print_rank_last(
            f" tokscale probe at step {state.step} | {self._probe_set.n_tokens} tokens | "
            + " | ".join(parts)
        )
        log_scalars(metrics, state.step, state.consumed_samples)


def _names_in_log(probe_set: ProbeSet, args: Namespace) -> list[str]:
    """Return the datasets' names, numbered as in the job's training data and its logged plan.

    The probe set may come from the validation part, whose datasets can have another order.
    """
    try:
        known = DataSource.from_flags(args).names("train")
    except TokscaleError:  # a replay has no data
        return list(probe_set.datasets)
    return renamed(probe_set.prefixes, probe_set.datasets, known)


def _tokenizer_of_text(args: Namespace) -> Detokenizer | None:
    """Return Megatron's tokenizer, if its ids stand for a text."""
    is_null = str(args.tokenizer_type).startswith("Null")
    tokenizer: Detokenizer | None = None if is_null else global_vars.get_tokenizer()
    return tokenizer

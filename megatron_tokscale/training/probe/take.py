"""A probe: a pass over each probe set, its metrics in the log, its losses on their way to disk.

Shapes: N watched tokens, V values of one probe set.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from megatron.training import get_timers, print_rank_last

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import AgreedError, TokscaleError
from megatron_tokscale.store import LossRecord
from megatron_tokscale.training.events import TrainingState
from megatron_tokscale.training.history.counts import TrainingCounts, learning_rate
from megatron_tokscale.training.probe import probe_pass
from megatron_tokscale.training.probe.isolation import isolated, synced_parameters, verified
from megatron_tokscale.training.probe.watched_set import WatchedSet
from megatron_tokscale.training.ranks import first_of_all_ranks, sum_over_ranks
from megatron_tokscale.training.scalars import log_scalars
from megatron_tokscale.training.settings import JobProbeSettings
from megatron_tokscale.training.versions import installed_versions


class _Pass(NamedTuple):
    """The outcome of the pass over one probe set on one rank.

    Attributes:
        loss_N: losses in nats, on the rank that writes.
        values_V: the metrics; zeros on the other ranks.
        refusal: the refusal by this rank's forward step.
        seconds: time that the pass took.
    """

    loss_N: Floats32 | None
    values_V: Floats
    refusal: str | None
    seconds: float


class ProbeTaker:
    """Takes probes. All ranks hold one and act together.

    Attributes:
        last_step: step of the last probe taken; -1 before the first.
    """

    def __init__(self, settings: JobProbeSettings) -> None:
        self._settings = settings
        self.last_step = -1

    def take(
        self,
        state: TrainingState,
        counts: TrainingCounts,
        losses: Mapping[str, torch.Tensor],
        sets: Sequence[WatchedSet],
        *,
        before_first_step: bool = False,
    ) -> None:
        """Take the probe of the present step, and hand its losses over to be written.

        Args:
            state: state of the training.
            counts: counts of the training, for the record.
            losses: losses of the last training step, for the record.
            sets: the probe sets whose losses at this step are wanted.
            before_first_step: True if the job has not taken a training step yet.

        Raises:
            TokscaleError: the forward step does not fit, the probe has changed the training's state
                (with --tokscale-verify-isolation), or losses cannot be written and the job is to
                stop in that case.
        """
        errors = [each.store.join() for each in sets]
        passes = self._run_passes(state, sets, before_first_step)
        # One message gives all ranks the outcome of each rank, and the metrics.
        n_failed, n_refused, *summed = sum_over_ranks(
            float(any(errors)),
            float(any(each.refusal for each in passes)),
            *(value for each in passes for value in each.values_V),
        )
        if n_refused:
            refusals = (each.refusal for each in passes if each.refusal)
            raise AgreedError(first_of_all_ranks(next(refusals, None)) or "")
        self.last_step = state.step
        _log(state, sets, np.array(summed))
        if n_failed:
            _stop_probing(sets, errors)
            return
        for each, found in zip(sets, passes, strict=True):
            if found.loss_N is not None:
                record = _record(state, counts, losses, each, found.seconds)
                each.store.submit(found.loss_N.astype(self._settings.loss_dtype), record)

    def _run_passes(
        self, state: TrainingState, sets: Sequence[WatchedSet], before_first_step: bool
    ) -> list[_Pass]:
        """Run the passes over the probe sets, one after the other.

        The parameters are made current once. Each pass is isolated by itself, so that the losses of
        a set do not depend on the sets before it.
        """
        model, optimizer, args = state.model, state.optimizer, state.args
        with (
            synced_parameters(model, optimizer, args, before_first_step=before_first_step),
            verified(model, optimizer, state.step, is_on=self._settings.verifies_isolation),
        ):
            return [_run_pass(state, each) for each in sets]


def _run_pass(state: TrainingState, watched: WatchedSet) -> _Pass:
    """Run the pass over one probe set, timed."""
    assert state.forward_step is not None
    timer = get_timers()(watched.timer, log_level=0)
    timer.start(barrier=True)
    started = time.perf_counter()
    loss_N, refusal = None, None
    with isolated(state.model, state.args):
        try:
            loss_N = probe_pass.run(watched.probe_set, state.forward_step, state.model, state.args)
        except TokscaleError as error:
            refusal = str(error)
    values_V = watched.measure(state.step, loss_N)
    timer.stop()
    return _Pass(loss_N, values_V, refusal, time.perf_counter() - started)


def _stop_probing(sets: Sequence[WatchedSet], errors: Sequence[OSError | None]) -> None:
    """Follow --tokscale-on-write-error for the sets whose losses a rank could not write.

    Raises:
        AgreedError: the job is to stop.
    """
    for each, error in zip(sets, errors, strict=True):
        if message := first_of_all_ranks(str(error) if error else None):
            each.store.stop_probing(message)


def _log(state: TrainingState, sets: Sequence[WatchedSet], values: Floats) -> None:
    """Log the metrics of all sets: their values one after the other."""
    ends = np.cumsum([each.n_values for each in sets])
    logged: dict[str, float] = {}
    for each, values_V in zip(sets, np.split(values, ends[:-1]), strict=True):
        metrics = each.named(values_V)
        logged |= metrics
        print_rank_last(
            f" tokscale probe at step {state.step} | {each.probe_set.n_tokens} tokens | "
            + " | ".join(f"{name}: {value:.6E}" for name, value in metrics.items())
        )
    log_scalars(logged, state.step, state.consumed_samples)
    # Megatron's `timers.log` would gather the times of all ranks on every rank.
    timers = get_timers()
    times = [f"{each.timer}: {1000 * timers(each.timer).elapsed():.2f}" for each in sets]
    print_rank_last(f"    time (ms) on the last rank | {' | '.join(times)}")


def _record(
    state: TrainingState,
    counts: TrainingCounts,
    losses: Mapping[str, torch.Tensor],
    watched: WatchedSet,
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
        probe_fingerprint=watched.probe_set.fingerprint,
        versions=", ".join(f"{name} {v}" for name, v in installed_versions().items()),
    )

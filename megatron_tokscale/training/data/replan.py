"""Weights decided while the job trains, from the losses so far (`--tokscale-replan-interval N`).

At the first probe at or after every N steps the rank that writes the losses starts a process of its
own (`megatron_tokscale.reweight.live`: no analysis code is loaded into the job). A fixed number of
steps later all ranks take its answer, waiting for it if they must, and the new weights hold from a
sample on that no data loader can have fetched. So the training data depend on the losses and not on
the speed of any process. Decisions are on disk before a checkpoint that comes after them; a job
that resumes from an earlier checkpoint makes the later decisions again.
"""

import json
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_timers, print_rank_0

from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.data import Decision
from megatron_tokscale.training.data.follower import Follower
from megatron_tokscale.training.events import JobPart, TrainingState
from megatron_tokscale.training.probe.prober import Prober
from megatron_tokscale.training.ranks import first_of_all_ranks, while_others_wait
from megatron_tokscale.training.settings import DECISION_STEPS

_PREFETCH_FACTOR: Final = 2
"""Microbatches that a worker of torch's DataLoader fetches ahead, by its default."""

_SHOWN_CHARACTERS: Final = 500  # from the end of the process's error, which names the cause
_SHOWN_OF_ANSWER: Final = 200  # characters shown of an answer that cannot be read

_PATIENCE_SECONDS: Final = 600
"""Seconds that a job waits for the process when the weights are due. Our choice: the process takes
seconds, a minute from a slow disk; a job that stands still for longer costs more than new weights
are worth."""

_KILL_SECONDS: Final = 5
"""Seconds that a job waits for the process to end after SIGKILL. Our choice: a process that still
runs then waits for a disk or a network."""

_TIMER: Final = "tokscale-replan-interval"


@dataclass(frozen=True)
class Answer:
    """Answer of the process that computes the weights.

    Attributes:
        weights: weights of the plan's datasets.
        within: weights of the strata within their datasets; None leaves those that hold.
        reason: why there are no weights; empty if there are.
    """

    weights: tuple[float, ...] = ()
    within: tuple[float, ...] | None = None
    reason: str = ""


class Replanner(JobPart):
    """Requests weights after probes, and adds the answers to the plan. All ranks hold one."""

    def __init__(
        self, interval: int, run: Path, follower: Follower, prober: Prober, args: Namespace
    ) -> None:
        self._interval, self._run = interval, run
        self._follower, self._prober, self._args = follower, prober, args
        self._process: subprocess.Popen[str] | None = None
        self._failure = ""
        self._asked: int | None = None  # probe step of the request that is not decided yet
        self._last_probe = 0

    def on_train_start(self, state: TrainingState) -> None:
        """Repeat the request that was pending at the checkpoint from which the job resumes."""
        self._prober.wait_for_losses()
        step, asked = state.step, -1
        for probe_step in self._prober.steps_on_disk():
            if probe_step <= step:
                asked = probe_step if self._is_due(probe_step) else asked
                self._last_probe = probe_step
        decided = {decision.step for decision in self._follower.followed.decisions}
        if asked >= 0 and asked not in decided and step < asked + DECISION_STEPS:
            self._ask(asked)

    def on_step(self, state: TrainingState) -> None:
        """Apply a request that is DECISION_STEPS old; make a new one after a probe, if due."""
        if self._asked is not None and state.step >= self._asked + DECISION_STEPS:
            self._decide(state)
        self._ask_if_due(state.step)

    def after_checkpoint(self, state: TrainingState) -> None:
        """Make a request after the probe of this checkpoint, if one was taken and is due."""
        if self._prober.is_open:  # not for the checkpoint after the training
            self._ask_if_due(state.step)

    def _ask_if_due(self, step: int) -> None:
        """Make a request if a probe was taken at `step` that is the first of its interval."""
        if self._prober.last_step == step > self._last_probe:
            if self._is_due(step):
                self._prober.wait_for_losses()
                self._ask(step)
            self._last_probe = step

    def _is_due(self, probe_step: int) -> bool:
        return self._last_probe < probe_step // self._interval * self._interval

    def _ask(self, step: int) -> None:
        self.close()  # an earlier request that is not decided yet
        self._asked = step
        if self._prober.is_writer:
            module = "megatron_tokscale.reweight.live"
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, str(self._run), "--until", str(step)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            except OSError as error:  # no memory for one more process
                self._failure = str(error)

    def _decide(self, state: TrainingState) -> None:
        """Take the answer to the pending request, and follow it if the plan allows it."""
        timers, step = get_timers(), state.step
        timers(_TIMER, log_level=0).start(barrier=True)
        asked, self._asked = self._asked, None
        assert asked is not None
        self._follower.refuse_edits()
        # All ranks take the answer from the rank that started the process, and wait for it there.
        own = while_others_wait(
            lambda: json.dumps(to_json(self._answer())), where=self._prober.is_writer
        )
        text = first_of_all_ranks(own)
        assert text is not None, "the rank that writes the losses has an answer"
        answer = from_json(Answer, json.loads(text))
        consumed = state.consumed_samples
        start = self._first_unfetched(consumed)
        decision = Decision(asked, start, answer.weights, answer.within)
        reason = answer.reason or self._follower.add(decision, consumed)
        # Report the decision in the log and in the journal.
        if reason:
            print_rank_0(f"tokscale: no new weights at step {step}: {reason}")
            self._prober.note("plan kept", step=step, losses_until=asked, reason=reason)
        else:
            fingerprint = self._follower.plan.fingerprint
            print_rank_0(
                f"tokscale: from sample {decision.start} on the datasets weigh "
                f"{' '.join(f'{weight:.4f}' for weight in decision.weights)}"
                f"{', and the strata within them have new weights' if decision.within else ''} "
                f"(plan {fingerprint}, from losses up to step {asked})"
            )
            self._prober.note(
                "plan changed",
                step=step,
                losses_until=asked,
                start=decision.start,
                weights=decision.weights,
                within=decision.within,
                plan=fingerprint,
            )
        timers(_TIMER).stop()

    def _answer(self) -> Answer:
        """Return the answer of the process, waiting for it; a reason, if it has failed."""
        if self._process is None:
            return Answer(reason=f"the process that decides cannot be started: {self._failure}")
        try:
            output, errors = self._process.communicate(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            return Answer(
                reason=f"the process that decides has not ended within {_PATIENCE_SECONDS} s of "
                "the decision; expected seconds; look at the disk that holds the losses"
            )
        code, self._process = self._process.returncode, None
        if code:
            said = " ".join(errors.split())[-_SHOWN_CHARACTERS:]
            return Answer(reason=said or f"exit code {code}")
        try:
            return from_json(Answer, json.loads(output.splitlines()[-1]))
        except (IndexError, ValueError):
            shown = output[-_SHOWN_OF_ANSWER:]
            return Answer(reason=f"the process that decides has answered {shown!r}")

    def _first_unfetched(self, consumed: int) -> int:
        """Return the first sample of a global batch that no data loader has requested."""
        args = self._args
        microbatches = max(int(args.num_workers), 0) * _PREFETCH_FACTOR + 1
        ranks = int(mpu.get_data_parallel_world_size())
        fetched = microbatches * int(args.micro_batch_size) * ranks
        batch = int(get_current_global_batch_size())
        return consumed + -(-fetched // batch) * batch

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # it hangs in a file system: leave it there
                self._process.communicate(timeout=_KILL_SECONDS)
            self._process = None

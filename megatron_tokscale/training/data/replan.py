"""Weights decided while the job trains, from the losses so far (`--tokscale-replan-interval N`).

At the first probe at or after every N steps a process of its own is started on the rank that writes
the losses (`megatron_tokscale.reweight.live`: no analysis code is loaded into the job). A fixed
number of steps later all ranks take what it has found, waiting for it if they must, and the weights
hold from a sample on that no data loader can have fetched. So what is trained on depends on the
losses and not on how fast anything was. Decisions are on disk before a checkpoint that comes after
them; a job that goes on from an earlier one makes the later ones again.
"""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Final

from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_timers, print_rank_0

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Decision
from megatron_tokscale.training.data.provider import Follower
from megatron_tokscale.training.probe.prober import Prober
from megatron_tokscale.training.ranks import first_of_all_ranks

# Steps between the probe and the decision: time for the process beside the training (our choice).
LAG: Final = 4

# Microbatches that a worker of torch's DataLoader fetches ahead, by its default.
_PREFETCH_FACTOR: Final = 2


def check_interval(steps: int) -> int:
    """Return the steps from one decision to the next.

    Raises:
        TokscaleError: there are too few for a decision to be made.
    """
    if steps <= LAG:
        raise TokscaleError(
            f"--tokscale-replan-interval is {steps}; expected steps above {LAG}, which a decision "
            "takes; give more"
        )
    return steps


class Replanner:
    """Asks for weights after probes, and adds the answers to the plan. All ranks hold one."""

    def __init__(
        self, interval: int, run: Path, follower: Follower, prober: Prober, args: Namespace
    ) -> None:
        self._interval, self._run = interval, run
        self._follower, self._prober, self._args = follower, prober, args
        self._process: subprocess.Popen[str] | None = None
        self._failure = ""
        self._asked: int | None = None
        self._last_probe = 0

    def on_train_start(self) -> None:
        """Ask again for what was asked before the step to go on from, and not yet decided."""
        self._prober.before_checkpoint()  # what was just taken is on disk too
        step, asked = int(self._args.iteration), -1
        for probe_step in self._prober.steps_on_disk():
            if probe_step <= step:
                asked = probe_step if self._is_due(probe_step) else asked
                self._last_probe = probe_step
        decided = {decision.step for decision in self._follower.decisions}
        if asked >= 0 and asked not in decided and step < asked + LAG:
            self._ask(asked)

    def on_step(self, step: int) -> None:
        """Decide, if it is time; then ask, if it is."""
        if self._asked is not None and step >= self._asked + LAG:
            self._decide(step)
        self.after_probe(step)

    def after_probe(self, step: int) -> None:
        """Ask, if a probe was taken at `step` that is the first since a multiple of N."""
        if self._prober.last_step == step > self._last_probe:
            if self._is_due(step):
                self._prober.before_checkpoint()
                self._ask(step)
            self._last_probe = step

    def _is_due(self, probe_step: int) -> bool:
        return self._last_probe < probe_step // self._interval * self._interval

    def _ask(self, step: int) -> None:
        self.close()  # of what was asked before and is not decided yet
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

    def _decide(self, step: int) -> None:
        timers = get_timers()
        timers("tokscale-replan-interval", log_level=0).start(barrier=True)
        asked, self._asked = self._asked, None
        assert asked is not None
        self._follower.refuse_edits()
        answer = json.dumps(self._answer()) if self._prober.is_writer else None
        text = first_of_all_ranks(answer)
        assert text is not None, "the rank that writes the losses has an answer"
        found = json.loads(text)
        reason, weights = found.get("reason"), found.get("weights", [])
        decision = Decision(asked, self._first_unfetched(), tuple(weights))
        if not reason:
            reason = self._follower.add(decision)
        if reason:
            print_rank_0(f"tokscale: no new weights at step {step}: {reason}")
            self._prober.note("plan kept", step=step, losses_until=asked, reason=reason)
        else:
            fingerprint = self._follower.plan.fingerprint
            print_rank_0(
                f"tokscale: from sample {decision.start} on the datasets weigh "
                f"{' '.join(f'{weight:.4f}' for weight in weights)} (plan {fingerprint}, from "
                f"losses up to step {asked})"
            )
            self._prober.note(
                "plan changed",
                step=step,
                losses_until=asked,
                start=decision.start,
                weights=weights,
                plan=fingerprint,
            )
        timers("tokscale-replan-interval").stop()

    def _answer(self) -> dict[str, object]:
        """Return what the process has found, waiting for it; a reason, if it has failed."""
        if self._process is None:
            return {"reason": f"the process that decides cannot be started: {self._failure}"}
        output, errors = self._process.communicate()
        code, self._process = self._process.returncode, None
        if code:
            return {"reason": " ".join(errors.split())[-500:] or f"exit code {code}"}
        try:
            answer: dict[str, object] = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            return {"reason": f"the process that decides has answered {output[-200:]!r}"}
        return answer

    def _first_unfetched(self) -> int:
        """The first sample, at the beginning of a global batch, that no loader has asked for."""
        args = self._args
        microbatches = max(int(args.num_workers), 0) * _PREFETCH_FACTOR + 1
        ranks = int(mpu.get_data_parallel_world_size())
        fetched = microbatches * int(args.micro_batch_size) * ranks
        batch = int(get_current_global_batch_size())
        return int(args.consumed_train_samples) + -(-fetched // batch) * batch

    def close(self) -> None:
        """End a process that is still at work."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

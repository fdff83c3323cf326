"""A Megatron job that measures itself, and prints one line of JSON with what it has measured.

    GPU_CHECK_INSPECT=probes|steps python -m gpu_check.inspect_job <Megatron flags>

`probes`: after three steps, probes and Megatron's own evaluation of the same sequences in turns:
mean losses, times, memory. `steps`: copies and waits of the steps 6 to 35, by torch's profiler.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

MARK: Final = "gpu_check: "

_WARM_STEPS: Final = 3
"""Steps before the measurement, in which kernels are chosen and memory is reserved (our choice)."""
_ROUNDS: Final = 20
"""Probes in a row, our choice: enough to show memory that a probe leaks."""
_PROFILED: Final = (6, 35)
_WAITS: Final = ("Synchronize", "Memcpy")


def _say(record: dict[str, Any]) -> None:
    print(MARK + json.dumps(record), flush=True)


def read_record(output: str) -> dict[str, Any]:
    """Return the record in a job's output.

    Raises:
        ValueError: the output has no record.
    """
    lines = [line for line in output.splitlines() if MARK in line]
    if not lines:
        raise ValueError("the job has printed no record")
    record: dict[str, Any] = json.loads(lines[-1].split(MARK)[1])
    return record


class _Memory:
    """The device's memory in bytes; zero on a CPU."""

    def __init__(self) -> None:
        import torch

        from megatron_tokscale import cpu

        self._cuda = None if cpu.is_enabled() else torch.cuda

    def peak_since_reset(self) -> int:
        if not self._cuda:
            return 0
        peak = int(self._cuda.max_memory_allocated())
        self._cuda.reset_peak_memory_stats()
        return peak

    def reserved(self) -> int:
        return int(self._cuda.memory_reserved()) if self._cuda else 0


def inspect_probes() -> None:
    """Add a part to the job that measures after the warm steps."""
    from megatron_tokscale.training import parts
    from megatron_tokscale.training.events import JobPart, TrainingState
    from megatron_tokscale.training.probe.prober import Prober

    make_parts = parts.parts_of_job

    class Inspector(JobPart):
        def __init__(self, prober: Prober) -> None:
            self._prober, self._memory = prober, _Memory()

        def on_step(self, state: TrainingState) -> None:
            if state.step == _WARM_STEPS:
                training_peak = self._memory.peak_since_reset()
                _say({"training peak": training_peak} | self._measure(state))

        def _measure(self, state: TrainingState) -> dict[str, Any]:
            record: dict[str, Any] = {"evaluate": [], "probe": [], "peak": [], "reserved": []}
            for turn in range(_ROUNDS):
                if turn < 5:  # enough for a median; the other probes show the memory
                    seconds, record["mean"] = _timed(lambda: self._evaluate(state))
                    record["evaluate"].append(seconds)
                    self._memory.peak_since_reset()
                probed = replace(state, step=state.step + turn)
                seconds, _ = _timed(lambda state=probed: self._prober.take(state))
                record["probe"].append(seconds)
                record["peak"].append(self._memory.peak_since_reset())
                record["reserved"].append(self._memory.reserved())
            return record

        def _evaluate(self, state: TrainingState) -> float:
            """Return the mean loss that Megatron's `evaluate` finds on the probe set."""
            from megatron.core.utils import get_model_config
            from megatron.training import training

            args, rows = state.args, self._prober.probe_set.n_sequences
            kept, args.eval_global_batch_size = args.eval_global_batch_size, rows
            has_hooks = training.should_disable_forward_pre_hook(args)
            if has_hooks:
                training.disable_forward_pre_hook(state.model, state.optimizer)
            losses, *_ = training.evaluate(
                state.forward_step,
                _rows(self._prober, args.micro_batch_size),
                state.model,
                None,
                get_model_config(state.model[0]),
                eval_iters=1,
            )
            if has_hooks:
                training.enable_forward_pre_hook(state.model)
            args.eval_global_batch_size = kept
            return float(losses["lm loss"])

    def with_inspector(*args: Any, **kwargs: Any) -> Sequence[JobPart]:
        made = make_parts(*args, **kwargs)
        prober = next(part for part in made if isinstance(part, Prober))
        return [*made, Inspector(prober)]

    parts.parts_of_job = with_inspector


def _rows(prober: Any, micro_batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield the probe set's sequences as Megatron's data loader would, all tokens counted."""
    import torch

    probe_set = prober.probe_set
    positions_S = torch.arange(probe_set.seq_length)
    mask_SS = torch.ones(probe_set.seq_length, probe_set.seq_length).triu(1).bool()
    for first in range(0, probe_set.n_sequences, micro_batch_size):
        part = slice(first, first + micro_batch_size)
        tokens_bS = torch.from_numpy(probe_set.tokens_BS[part]).long()
        yield {
            "tokens": tokens_bS,
            "labels": torch.from_numpy(probe_set.labels_BS[part]).long(),
            "loss_mask": torch.ones(tokens_bS.shape),
            "position_ids": positions_S.repeat(len(tokens_bS), 1),
            "attention_mask": mask_SS.repeat(len(tokens_bS), 1, 1, 1),
        }


def _timed[Value](action: Callable[[], Value]) -> tuple[float, Value]:
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    value = action()
    torch.cuda.synchronize()
    return time.perf_counter() - started, value


def inspect_steps() -> None:
    """Profile the job's steps, whether the plugin is on or off."""
    from megatron.training import training
    from torch.profiler import ProfilerActivity, profile

    from megatron_tokscale import cpu

    activities = [ProfilerActivity.CPU]
    if not cpu.is_enabled():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    step, log = training.train_step, training.training_log
    count, started = 0, 0.0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count, started
        count += 1
        if count == _PROFILED[0]:
            started = time.perf_counter()
            profiler.__enter__()
        return step(*args, **kwargs)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = log(*args, **kwargs)
        if count == _PROFILED[1]:
            profiler.__exit__(None, None, None)
            names = Counter(event.name for event in profiler.events())
            waits = {name: n for name, n in names.items() if any(w in name for w in _WAITS)}
            _say({"waits": waits, "seconds": time.perf_counter() - started})
        return result

    training.train_step, training.training_log = train_step, training_log


def main() -> None:
    """Install the measurement that GPU_CHECK_INSPECT names, and train."""
    from megatron_tokscale import pretrain

    pretrain.prepare()
    {"probes": inspect_probes, "steps": inspect_steps}[os.environ["GPU_CHECK_INSPECT"]]()
    pretrain.train()


if __name__ == "__main__":
    main()

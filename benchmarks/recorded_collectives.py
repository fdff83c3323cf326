"""A Megatron job that notes every collective call of the plugin, with its bytes.

    recorded_collectives.py OUT TRANSCRIPT ROLE RANK RANKS <flags of megatron_tokscale.pretrain>

A call is noted as it reaches torch's dispatcher, whoever makes it and however: its name, the bytes
that this rank hands in and the bytes that it gets. The calls of each rank go to a file in OUT.

On real ranks (ROLE "real") the values that ranks send each other are written to TRANSCRIPT too. On
torch's fake process group (ROLE "rank 0", "writer" or "other") there is one process, whose
collectives return at once and bring nothing: it gets the values of the transcript in their place.
So it runs the code, and makes the calls, of rank RANK in a job of RANKS ranks.
"""

import functools
import json
import os
import pickle
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

START, PROBE, FORWARD, DECISION, LOG = "start-up", "a probe", "forward", "a decision", "a log line"


def n_bytes(tensors: Any) -> int:
    """Return the bytes of all tensors in a nested list."""
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))


class Recorder(TorchDispatchMode):
    """Notes the collectives of each phase, and the peak of the bytes that its tensors hold.

    Attributes:
        deliver: fills the tensors of a call with the values that other ranks would send.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self.calls: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        self.peak: dict[str, int] = defaultdict(int)
        self.deliver: Callable[[str, Any], None] = lambda name, args: None
        self._live, self._before, self._known = 0, 0, set[int]()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Note the calls of a block under `phase`; a repeated phase replaces the one before."""
        outer, before = self.phase, self._before
        self.phase, self._before = phase, self._live
        if phase in (PROBE, DECISION, LOG):
            self.calls[phase], self.peak[phase] = [], 0
        try:
            yield
        finally:
            self.phase, self._before = outer, before

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Note the calls of a function under `phase`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        setattr(owner, name, call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            if self.phase:
                self.calls[self.phase].append((name, *sent_and_received(name, args)))
            self.deliver(name, args)
        self._count(result)
        return result

    def _count(self, result: Any) -> None:
        """Follow the bytes of the tensors that are alive."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self._live += size
                    weakref.finalize(storage, self._forget, key, size)
        if self.phase:
            peak = max(self.peak[self.phase], self._live - self._before)
            self.peak[self.phase] = peak

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def sent_and_received(name: str, args: Any) -> tuple[int, int]:
    """Return the bytes that this rank hands to a collective, and those that it gets."""
    first = n_bytes(args[0])
    if name == "allreduce":
        return first, first
    if name == "broadcast":
        return (first, 0) if is_root(args) else (0, first)
    if name == "send":
        return first, 0
    if name == "recv":
        return 0, first
    if name in ("gather", "allgather", "allgather_base", "reduce_scatter", "reduce_scatter_base"):
        return n_bytes(args[1]), first
    if name == "barrier":
        return 0, 0
    raise ValueError(f"the collective {name} is not known here; expected one of those above")


def is_root(args: Any) -> bool:
    """Return whether this rank is the root of a broadcast."""
    group = torch.distributed.ProcessGroup.unbox(args[1])
    return bool(group.rank() == args[2])


class Transcript:
    """Values that the ranks of a job send each other, in their order; the same on every rank.

    An entry is the role of the rank that sends, and the value; the role None stands for the finding
    that no rank has a message.
    """

    def __init__(self, entries: list[tuple[str | None, Any]] | None = None) -> None:
        self.entries = entries or []
        self._next = 0

    def add(self, role: str | None, value: Any) -> None:
        """Note what one call has given."""
        self.entries.append((role, value))

    def peek(self) -> tuple[str | None, Any]:
        """Return the next entry."""
        return self.entries[self._next]

    def next(self) -> tuple[str | None, Any]:
        """Return the next entry, and go on behind it."""
        self._next += 1
        return self.entries[self._next - 1]

    def answer(self) -> dict[str, Any]:
        """Return the last answer of the process that decides on weights."""
        texts = [value for _, value in self.entries if isinstance(value, str)]
        found = [json.loads(text) for text in texts if text.startswith("{")]
        answer: dict[str, Any] = next(row for row in found if {"weights", "reason"} <= set(row))
        return answer


def writer_rank() -> int:
    """Return the rank that writes the losses: the first of the last pipeline stage."""
    from megatron.core import mpu

    stages = int(mpu.get_pipeline_model_parallel_world_size())
    return torch.distributed.get_world_size() // stages * (stages - 1)


def replace_everywhere(old: Any, new: Any) -> None:
    """Put a function in the place of another, in every module of the plugin that has it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_tokscale."):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def note_values(transcript: Transcript) -> None:
    """Write down what ranks agree on, in a job of real ranks."""
    from megatron_tokscale.training import ranks

    first_of_all_ranks, broadcast = ranks.first_of_all_ranks, ranks._broadcast

    def first(message: str | None) -> str | None:
        place = len(transcript.entries)
        found = first_of_all_ranks(message)
        if found is None:
            transcript.entries.insert(place, (None, None))
        return found

    def noted(value: Any, sender: int) -> Any:
        found = broadcast(value, sender)
        transcript.add("rank 0" if sender == 0 else "writer", found)
        return found

    replace_everywhere(first_of_all_ranks, first)
    replace_everywhere(broadcast, noted)


def play_values(transcript: Transcript, recorder: Recorder, role: str) -> None:
    """Let a process of torch's fake process group get the values of the transcript."""
    from megatron_tokscale.training import ranks

    first_of_all_ranks, broadcast = ranks.first_of_all_ranks, ranks._broadcast
    pending: list[torch.Tensor] = []

    def deliver(name: str, args: Any) -> None:
        is_mine = pending and (name == "allreduce" or (name == "broadcast" and not is_root(args)))
        if is_mine:
            args[0][0].copy_(pending.pop(0))

    def first(message: str | None) -> str | None:
        sender, _ = transcript.peek()
        if sender is None:
            assert not message, message
            transcript.next()
            return first_of_all_ranks(None)
        pending.append(torch.tensor([0 if sender == "rank 0" else writer_rank()]))
        return first_of_all_ranks(message if sender == role else None)

    def played(value: Any, sender: int) -> Any:
        _, known = transcript.next()
        if sender != torch.distributed.get_rank():
            content = torch.frombuffer(bytearray(pickle.dumps(known)), dtype=torch.uint8)
            pending.extend([torch.tensor([content.numel()]), content])
        return broadcast(value, sender)

    recorder.deliver = deliver
    replace_everywhere(first_of_all_ranks, first)
    replace_everywhere(broadcast, played)
    ranks._value_when_set = lambda store, key: ""


def mark_phases(recorder: Recorder) -> None:
    """Note the plugin's calls under their phases."""
    from megatron_tokscale.training import ranks
    from megatron_tokscale.training.data import follower, held_out, plan_monitor, replan
    from megatron_tokscale.training.probe import probe_pass, prober, take

    together = ranks.together

    def at_start(action: Any, *, where: bool = True) -> Any:
        """Note the first agreement, which no part has called, under the start-up."""
        if recorder.phase is not None:
            return together(action, where=where)
        with recorder.during(START):
            return together(action, where=where)

    ranks.together = at_start
    for part in (follower.Follower, held_out.HeldOutNote, prober.Prober, replan.Replanner):
        recorder.wrap(part, "on_data", START)
        recorder.wrap(part, "on_train_start", START)
    recorder.wrap(take.ProbeTaker, "take", PROBE)
    recorder.wrap(replan.Replanner, "_decide", DECISION)
    recorder.wrap(plan_monitor.PlanMonitor, "on_step", LOG)
    get_pass = probe_pass.get_forward_backward_func

    def get_marked_pass() -> Any:
        forward = get_pass()

        def call(**kwargs: Any) -> Any:
            with recorder.during(FORWARD):
                return forward(**kwargs)

        return call

    probe_pass.get_forward_backward_func = get_marked_pass


def use_fake_group(transcript: Transcript) -> None:
    """Allow --fake-process-group, and let the parts of the job bear its empty answers."""
    from torch.testing._internal.distributed import fake_pg

    from megatron_tokscale.core.errors import TokscaleError
    from megatron_tokscale.training import support
    from megatron_tokscale.training.data import replan
    from megatron_tokscale.training.probe import probe_pass

    fake_pg.FakeStore = torch.distributed.HashStore
    support._REFUSED_FOR_PROBE = tuple(
        row for row in support._REFUSED_FOR_PROBE if row.flag != "--fake-process-group"
    )
    run = probe_pass.run

    def run_or_zeros(probe_set: Any, *args: Any) -> Any:
        try:
            return run(probe_set, *args)
        except (TokscaleError, RuntimeError, IndexError):  # nothing has come from the other ranks
            return np.zeros(probe_set.n_tokens, np.float32) if probe_pass.is_writer() else None

    def answer(self: Any) -> Any:
        self.close()
        known = transcript.answer()
        return replan.Answer(tuple(known["weights"]), reason=known["reason"])

    probe_pass.run = run_or_zeros
    replan.Replanner._answer = answer


def main() -> None:
    """Run the job, and write down its calls."""
    out, transcript_file, role, rank, n_ranks = (sys.argv.pop(1) for _ in range(5))
    out, transcript_file, is_real = Path(out), Path(transcript_file), role == "real"
    if not is_real:
        os.environ |= {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": str(int(rank) % 8)}
        os.environ |= {"LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    rank = os.environ["RANK"]
    from megatron_tokscale import cpu

    cpu.enable()
    recorder = Recorder()
    if is_real:
        transcript = Transcript()
        note_values(transcript)
    else:
        transcript = Transcript(pickle.loads(transcript_file.read_bytes()))
        play_values(transcript, recorder, role)
        use_fake_group(transcript)
    mark_phases(recorder)
    from megatron_tokscale import pretrain

    with recorder:
        pretrain.main()
    if is_real and rank == "1":
        transcript_file.write_bytes(pickle.dumps(transcript.entries))
    content = {
        "calls": recorder.calls,
        "peak": recorder.peak,
        "is_writer": rank == str(writer_rank()),
    }
    (out / f"{rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()

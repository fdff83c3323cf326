"""The launches of a run: the settings of each job that trained it, and the step it starts at.

A run is trained by one job or by several, each started with flags of its own. Step number k (the
k-th optimizer step) belongs to the last launch that starts before it.

Shapes: T steps.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, cast

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import JSON, from_json, to_json

_SUFFIXES: Final = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples per step, and the planned length of the training.

    Attributes:
        global_batch_size: samples per step, at the end of a ramp-up.
        micro_batch_size: samples of one forward pass.
        data_parallel_size: ranks that share a step's samples.
        rampup_batch_size: start, increment and samples of Megatron's --rampup-batch-size.
        step_batch_size_schedule: Megatron's --step-batch-size-schedule; its thresholds are in
            tokens.
        decrease_batch_size_if_needed: round down to a multiple of micro-batch times ranks.
        train_iters: planned number of steps.
        train_samples: planned number of samples; None for a job that counts in steps.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int = 1
    rampup_batch_size: list[int] | None = None
    step_batch_size_schedule: str | None = None
    decrease_batch_size_if_needed: bool = False
    train_iters: int | None = None
    train_samples: int | None = None

    @property
    def is_constant(self) -> bool:
        """True if every step has as many samples."""
        return not (self.rampup_batch_size or self.step_batch_size_schedule)

    def size(self, consumed_samples: int, seq_length: int) -> int:
        """Return the number of samples of the step that starts after `consumed_samples`.

        The formulas are those of Megatron's num_microbatches_calculator.py.

        Raises:
            TokscaleError: the schedule of batch sizes cannot be read.
        """
        if self.step_batch_size_schedule:
            return self._scheduled(consumed_samples, seq_length)
        size = self.global_batch_size
        if self.rampup_batch_size:
            start, increment, samples = self.rampup_batch_size
            if consumed_samples <= samples and size > start:
                done = int(consumed_samples / (samples / ((size - start) // increment)))
                size = start + done * increment
        if self.decrease_batch_size_if_needed:
            size -= size % (self.micro_batch_size * self.data_parallel_size)
        return size

    def _scheduled(self, consumed_samples: int, seq_length: int) -> int:
        text = self.step_batch_size_schedule or ""
        try:
            pairs = [entry.split(":") for entry in text.replace(",", " ").split()]
            points = sorted((_number(at) // seq_length, _number(size)) for at, size in pairs)
            return [size for at, size in points if at <= consumed_samples][-1]
        except (ValueError, IndexError) as error:
            raise TokscaleError(
                f"the --step-batch-size-schedule '{text}' of a launch cannot be read; expected "
                "TOKENS:SIZE, TOKENS:SIZE, ..."
            ) from error


def _number(text: str) -> int:
    """Return the number that a text such as 250B stands for."""
    last = text[-1:].upper()
    return int(float(text[:-1]) * _SUFFIXES[last]) if last in _SUFFIXES else int(float(text))


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """A learning-rate schedule, in samples, as Megatron's scheduler holds it.

    Attributes:
        peak: highest rate.
        minimum: lowest rate after the warm-up.
        initial: rate at the first step of the warm-up.
        decay_style: constant, linear, cosine, inverse-square-root or WSD.
        warmup_samples: samples until the peak.
        decay_samples: samples until the minimum.
        wsd_decay_style: linear, cosine, exponential or minus_sqrt, for WSD.
        wsd_decay_samples: samples of the decay at the end, for WSD.
        warmup_iters: --lr-warmup-iters; None if the job sets the warm-up by another flag.
        warmup_fraction: share of the decay that is warm-up.
        decay_iters: steps until the minimum.
        wsd_decay_iters: steps of the decay at the end.
        overrides_checkpoint: --override-opt_param-scheduler.
        uses_checkpoint: --use-checkpoint-opt_param-scheduler.
    """

    peak: float
    minimum: float
    initial: float
    decay_style: str
    warmup_samples: float
    decay_samples: float
    wsd_decay_style: str | None = None
    wsd_decay_samples: float | None = None
    warmup_iters: int | None = None
    warmup_fraction: float | None = None
    decay_iters: int | None = None
    wsd_decay_iters: int | None = None
    overrides_checkpoint: bool = False
    uses_checkpoint: bool = False

    def at(self, samples: float) -> float:
        """Return the rate of the step that the scheduler takes at its count `samples`.

        The formulas are those of Megatron's optimizer_param_scheduler.py.

        Raises:
            TokscaleError: the decay style is not one of Megatron's.
        """
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.initial + (self.peak - self.initial) * samples / self.warmup_samples
        if self.decay_style == "constant":
            return self.peak
        if samples > self.decay_samples:
            return self.minimum
        if self.decay_style == "inverse-square-root":
            rate = self.peak * math.sqrt(max(self.warmup_samples, 1)) / math.sqrt(max(samples, 1))
            return max(self.minimum, rate)
        return self.minimum + (self.peak - self.minimum) * self._height(samples)

    def _height(self, samples: float) -> float:
        """Return the height above the minimum as a share of the peak's height above it."""
        if self.decay_style == "WSD":
            length = self.wsd_decay_samples or 1.0
            past = (samples - (self.decay_samples - length)) / length
            return 1.0 if past <= 0 else _fall(self.wsd_decay_style, past)
        length = max(self.decay_samples - self.warmup_samples, 1)
        return _fall(self.decay_style, (samples - self.warmup_samples) / length)


def _fall(style: str | None, past: float) -> float:
    """Return the height at a share `past` of the decay: 1 at its start, 0 at its end."""
    match style:
        case "linear":
            return 1.0 - past
        case "cosine":
            return 0.5 * (math.cos(math.pi * past) + 1.0)
        case "exponential":
            return 2.0 * math.pow(0.5, past) - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(past)
    raise TokscaleError(
        f"the learning-rate schedule {style} is not known; expected one of megatron-core 0.17 to "
        "0.19"
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The settings of one job of a run, and the step of the run at which it starts.

    Attributes:
        step: optimizer steps completed at its start.
        consumed_samples: training samples consumed by then.
        consumed_tokens: training tokens consumed by then; None if unknown.
        lr_sum: sum of the learning rates of the steps taken by then; None if unknown.
        scheduler_samples: the count of the learning rate's scheduler by then; None if unknown.
        past: source of the counts above, in words.
        seq_length: tokens per sample.
        batch: samples per step.
        learning_rate: the schedule of the learning rate.
        seed: seed of the training.
        layout: sizes of the parallel layout, by name.
        logit_dtype: precision of the output logits, where it is not that of the model; with fp32
            the losses have other last bits.
        schedule: the probe schedule; None if the job had none.
        versions: versions of the packages, by name.
        launch_id: drawn at random by the job; empty for a job without the plugin.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int | None
    lr_sum: float | None
    scheduler_samples: int | None
    past: str
    seq_length: int
    batch: Batch
    learning_rate: LearningRates
    seed: int | None = None
    layout: dict[str, int | None] = field(default_factory=dict)
    logit_dtype: str | None = None
    schedule: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    launch_id: str = ""

    def to_json(self) -> dict[str, JSON]:
        """Return the launch as plain JSON values."""
        return cast("dict[str, JSON]", to_json(self))

    @classmethod
    def from_json(cls, content: JSON) -> Self:
        """Return the launch that `to_json` turned into `content`.

        Raises:
            ValueError: a value is missing or of the wrong type; the message names it.
        """
        return from_json(cls, content, "launch")

    def batches(self) -> Iterator[int]:
        """Yield the number of samples of each step, without end."""
        consumed = self.consumed_samples
        while True:
            size = self.batch.size(consumed, self.seq_length)
            consumed += size
            yield size

    def rates(self, n_steps: int) -> Floats:
        """Return learning_rate_T of the first `n_steps` steps, if none of them is skipped.

        Raises:
            TokscaleError: the start of the scheduler, or the schedule, is not known.
        """
        if self.scheduler_samples is None:
            raise TokscaleError(
                f"the state of the learning rate's scheduler at step {self.step} is not known; "
                "the run's learning rates cannot be computed"
            )
        count, rate_T = self.scheduler_samples, np.empty(n_steps)
        for t, size in zip(range(n_steps), self.batches(), strict=False):
            rate_T[t] = self.learning_rate.at(count)
            count += size
        return rate_T

    def planned_samples(self) -> int | None:
        """Return the samples consumed at the planned end of the job; None if it has none."""
        if self.batch.train_samples:
            return self.batch.train_samples
        if self.batch.train_iters is None:
            return None
        n_steps = max(self.batch.train_iters - self.step, 0)
        if self.batch.is_constant:
            size = self.batch.size(self.consumed_samples, self.seq_length)
            return self.consumed_samples + n_steps * size
        sizes = zip(range(n_steps), self.batches(), strict=False)
        return self.consumed_samples + sum(size for _, size in sizes)

    def trains_like(self, other: "Launch") -> bool:
        """Return whether both launches have the same settings of training; layouts may differ."""
        return self._settings() == other._settings()

    def _settings(self) -> tuple[int, Batch, LearningRates, int | None]:
        return (self.seq_length, self.batch, self.learning_rate, self.seed)


def parting(
    on_disk: Sequence[Launch], past: Sequence[Launch], step: int, *, is_whole: bool = True
) -> Launch | None:
    """Return the first launch that only one of two histories up to `step` has; None if both agree.

    From that launch on, the histories belong to two branches or two runs. Launches of
    jobs without the plugin have no id and are not compared.

    Args:
        on_disk: launches in a run directory.
        past: launches that led to a checkpoint.
        step: step of the checkpoint.
        is_whole: true if the directory has all launches of its run.
    """
    known = [launch for launch in on_disk if launch.step < step and launch.launch_id]
    taken = [launch for launch in past if launch.step < step and launch.launch_id]
    known_ids, taken_ids = ({launch.launch_id for launch in rows} for rows in (known, taken))
    alone = [launch for launch in known if launch.launch_id not in taken_ids]
    if is_whole:
        alone += [launch for launch in taken if launch.launch_id not in known_ids]
    return min(alone, key=lambda launch: launch.step, default=None)


def launch_of(launches: Sequence[Launch], step: int) -> Launch:
    """Return the launch that took step number `step`; the first launch for all earlier steps.

    Raises:
        ValueError: there is no launch.
    """
    if not launches:
        raise ValueError("no launch is known")
    before = [launch for launch in launches if launch.step < step]
    return before[-1] if before else launches[0]


def read_launches(content: JSON) -> tuple[Launch, ...]:
    """Return a run's launches from plain JSON values.

    Raises:
        ValueError: a value is missing or wrong, or the launches do not ascend.
    """
    launches = from_json(tuple[Launch, ...], content, "launches")
    check_starts(launches)
    return launches


def check_starts(launches: Sequence[Launch]) -> None:
    """Refuse launches whose first steps do not ascend from 0 on.

    Raises:
        ValueError: the first steps do not ascend.
    """
    steps = [launch.step for launch in launches]
    if steps != sorted(set(steps)) or min(steps, default=0) < 0:
        raise ValueError(f"launches start at steps {steps}, which do not ascend")

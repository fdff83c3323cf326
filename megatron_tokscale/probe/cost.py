"""The cost of probing: forward FLOPs, as Megatron counts them, and bytes on disk.

Training is three times its forward pass, so the share of the probes in the training FLOPs is
probes x sequences / (3 x training samples), whatever the model.
"""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe.schedule import ProbeSchedule

BACKWARD_AND_FORWARD = 3
"""FLOPs of a training step over FLOPs of its forward pass; Megatron's convention."""


@dataclass(frozen=True, kw_only=True)
class GptShape:
    """The shape of a GPT model. Fields are Megatron's arguments, with its defaults.

    Multi-latent attention, multi-token prediction and hybrid (Mamba) models are not counted.

    Raises:
        TokscaleError: on construction, if a size is below 1.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int
    ffn_hidden_size: int | None = None
    kv_channels: int | None = None
    num_query_groups: int | None = None
    swiglu: bool = False
    num_experts: int | None = None
    moe_router_topk: int = 2
    moe_layer_freq: str = "1"
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    tensor_model_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "seq_length",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise TokscaleError(
                    f"{flag} {getattr(self, name)} is too small; expected 1 or more; give the job's"
                )

    def forward_flops(self) -> int:
        """Return the FLOPs of the forward pass over one sequence.

        As in `num_floating_point_operations` of Megatron's training.py (megatron-core 0.19), which
        counts a multiply-add as two and half of the attention matrix.

        Raises:
            TokscaleError: the pattern of MoE layers cannot be read.
        """
        attention = self.num_layers * self._attention()
        n_moe = 0 if self.num_experts is None else self._n_moe_layers()
        mlp = (self.num_layers - n_moe) * self._mlp(self._ffn_hidden_size) + n_moe * self._moe()
        logits = self.hidden_size * self._padded_vocab_size
        return 2 * self.seq_length * (attention + mlp + logits)

    def _n_moe_layers(self) -> int:
        """Return the number of expert layers, from an interval or a pattern like "[0]+[1]*23"."""
        text = self.moe_layer_freq
        if text.isdecimal() and int(text) > 0:
            return -(-self.num_layers // int(text))
        try:
            pattern = _list_of(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError) as error:
            raise TokscaleError(
                f"--moe-layer-freq {text} cannot be read; give a number or a pattern like "
                "[0]+[1]*23"
            ) from error
        if len(pattern) != self.num_layers:
            raise TokscaleError(
                f"--moe-layer-freq {text} is for {len(pattern)} layers; expected --num-layers "
                f"{self.num_layers}; give the job's flags"
            )
        return sum(pattern)

    def _attention(self) -> int:
        """Return the multiply-adds per token and layer of the projections and the attention."""
        channels = self.kv_channels or self.hidden_size // self.num_attention_heads
        query = channels * self.num_attention_heads
        key_and_value = 2 * channels * (self.num_query_groups or self.num_attention_heads)
        return self.hidden_size * (2 * query + key_and_value) + self.seq_length * query

    def _moe(self) -> int:
        experts = self.moe_router_topk * self._mlp(
            self.moe_ffn_hidden_size or self._ffn_hidden_size
        )
        return experts + self._mlp(self.moe_shared_expert_intermediate_size or 0)

    def _mlp(self, width: int) -> int:
        return (3 if self.swiglu else 2) * self.hidden_size * width

    @property
    def _ffn_hidden_size(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return (
            int((4 * self.hidden_size * 2 / 3) / 64) * 64 if self.swiglu else 4 * self.hidden_size
        )

    @property
    def _padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


def _list_of(node: ast.expr) -> list[int]:
    """Return the list of 0s and 1s that an expression of lists, + and * stands for."""
    match node:
        case ast.List(elts=items):
            return [int(bool(ast.literal_eval(item))) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _list_of(left) + _list_of(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))):
            return _list_of(left) * times
    raise ValueError("not a pattern of layers")


@dataclass(frozen=True, kw_only=True)
class TrainingLength:
    """The length of a training and its batches. Fields are Megatron's arguments.

    Give `train_iters` or `train_samples`. `micro_batch_size` and `data_parallel_size` round a
    probe's sequences up to whole microbatches on every rank.

    Raises:
        TokscaleError: on construction, if the length is given twice or not at all, or a size is
            below 1.
    """

    seq_length: int
    global_batch_size: int
    train_iters: int | None = None
    train_samples: int | None = None
    save_interval: int | None = None
    micro_batch_size: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        if (self.train_iters is None) == (self.train_samples is None):
            raise TokscaleError("give the length of the training: --train-iters or --train-samples")
        if min(self.global_batch_size, self.micro_batch_size, self.data_parallel_size) < 1:
            raise TokscaleError("a batch size or the data-parallel size is below 1; give 1 or more")
        if self.steps < 1:
            raise TokscaleError("the job is shorter than one step; give more --train-samples")

    @property
    def steps(self) -> int:
        """Optimizer steps of the job."""
        if self.train_iters is not None:
            return self.train_iters
        assert self.train_samples is not None
        return self.train_samples // self.global_batch_size

    @property
    def samples(self) -> int:
        """Training samples that the job consumes."""
        return self.steps * self.global_batch_size

    def probe_steps(self, schedule: ProbeSchedule) -> list[int]:
        """Return the steps of the job's probes."""
        return schedule.steps(
            self.steps, self.global_batch_size * self.seq_length, self.save_interval
        )

    def rows(self, n_sequences: int) -> int:
        """Return the sequences that a probe runs: the set's, padded to whole microbatches."""
        at_once = self.micro_batch_size * self.data_parallel_size
        return -(-n_sequences // at_once) * at_once


def share_of_training(n_sequences: int, n_probes: int, length: TrainingLength) -> float:
    """Return the FLOPs of all probes over the FLOPs of the training."""
    return n_probes * length.rows(n_sequences) / (BACKWARD_AND_FORWARD * length.samples)


def sequences_within(share: float, schedule: ProbeSchedule, length: TrainingLength) -> int:
    """Return the largest number of sequences whose probes cost at most `share` of the training.

    Raises:
        TokscaleError: the share is not between 0 and 1 or too small for one sequence, or the
            schedule has no probe within the job.
    """
    if not 0 < share < 1:
        raise TokscaleError(
            f"--budget {share:g} is not between 0 and 1; give a share of the training FLOPs, like "
            "0.001"
        )
    n_probes = len(length.probe_steps(schedule))
    if n_probes == 0:
        raise TokscaleError(
            f"probe schedule '{schedule.spec}' has no point within the job; give a denser "
            "--tokscale-probe-schedule"
        )
    affordable = math.floor(share * BACKWARD_AND_FORWARD * length.samples / n_probes)
    n_sequences = affordable - affordable % length.rows(1)
    if n_sequences < 1:
        least = share_of_training(1, n_probes, length)
        raise TokscaleError(
            f"--budget {share:g} is too small: {n_probes} probes of {length.rows(1)} sequences "
            f"cost {least:.2g} of the training; give more, or a sparser --tokscale-probe-schedule"
        )
    return n_sequences


class SetSize(NamedTuple):
    """The size of a probe set: its sequences, and its watched tokens."""

    n_sequences: int
    n_tokens: int


def describe_cost(
    model: GptShape, length: TrainingLength, schedule: ProbeSchedule, sizes: Sequence[SetSize]
) -> str:
    """Return the cost of probing in words, a line per quantity.

    Args:
        model: shape of the model.
        length: length and batches of the training.
        schedule: the probe schedule.
        sizes: size of each probe set; a probe fills whole microbatches of each.
    """
    steps = length.probe_steps(schedule)
    n_sequences, n_tokens = (sum(counts) for counts in zip(*sizes, strict=True))
    rows = sum(length.rows(size.n_sequences) for size in sizes)
    forward = model.forward_flops()
    training = BACKWARD_AND_FORWARD * forward * length.samples
    padding = f" (run as {rows:,}, to fill microbatches)" if rows > n_sequences else ""
    return "\n".join(
        [
            f"training: {length.steps:,} steps, {length.samples * length.seq_length:,} tokens, "
            f"{training:.3g} FLOP",
            f"probes: {len(steps):,}, at steps {_shortened(steps)}",
            f"one probe: {n_tokens:,} tokens in {n_sequences:,} sequences of "
            f"{model.seq_length}{padding}, {forward * rows:.3g} FLOP, forward only",
            f"all probes: {forward * rows * len(steps):.3g} FLOP, "
            f"{forward * rows * len(steps) / training:.3%} of the training",
            f"on disk: {_bytes(4 * n_tokens * len(steps))} in float32 "
            f"({_bytes(4 * n_tokens)} a probe), {_bytes(2 * n_tokens * len(steps))} in float16",
        ]
    )


def _shortened(steps: list[int]) -> str:
    if len(steps) <= 8:
        return ", ".join(f"{step:,}" for step in steps) or "none"
    ends = [", ".join(f"{step:,}" for step in some) for some in (steps[:4], steps[-2:])]
    return ", ..., ".join(ends)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"

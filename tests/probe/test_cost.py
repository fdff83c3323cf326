"""The cost of probing is Megatron's own count of FLOPs, and the plain product of its parts."""

import argparse
import dataclasses

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSchedule
from megatron_tokscale.probe.cost import (
    GptShape,
    SetSize,
    TrainingLength,
    describe_cost,
    sequences_within,
    share_of_training,
)

SMALL = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "seq_length": 1024,
    "vocab_size": 50257,
}
SIX_B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 10240,
    "swiglu": True,
    "seq_length": 4096,
    "vocab_size": 128256,
}
MODELS = {
    "gpt2": SMALL,
    "6B": SIX_B,
    "swiglu, default width": {**SMALL, "swiglu": True},
    "wide heads": {**SMALL, "kv_channels": 128, "num_query_groups": 4},
    "mixture": {**SMALL, "num_experts": 8, "moe_router_topk": 3, "moe_ffn_hidden_size": 512},
    "mixture in every third layer": {**SMALL, "num_experts": 4, "moe_layer_freq": "3"},
    "mixture with a shared expert": {
        **SIX_B,
        "num_experts": 64,
        "moe_router_topk": 6,
        "moe_ffn_hidden_size": 1408,
        "moe_shared_expert_intermediate_size": 2816,
        "moe_layer_freq": "[0]+[1]*31",
    },
    "padded for tensor parallelism": {
        **SMALL,
        "tensor_model_parallel_size": 8,
        "make_vocab_size_divisible_by": 100,
    },
}


def megatron_flops(batch_size, **shape):
    """Megatron's count for one training step, with the defaults of its argument parser."""
    from megatron.training.arguments import moe_freq_type
    from megatron.training.training import num_floating_point_operations
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
    swiglu = shape.get("swiglu", False)
    width = int((4 * hidden * 2 / 3) / 64) * 64 if swiglu else 4 * hidden
    defaults = {
        "ffn_hidden_size": width,
        "kv_channels": hidden // heads,
        "swiglu": swiglu,
        "group_query_attention": "num_query_groups" in shape,
        "num_query_groups": None,
        "num_experts": None,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": shape.get("ffn_hidden_size", width),
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "attention_output_gate": False,
        "experimental_attention_variant": None,
        "hybrid_layer_pattern": None,
        "padded_vocab_size": calculate_padded_vocab_size(
            shape["vocab_size"],
            shape.get("make_vocab_size_divisible_by", 128),
            shape.get("tensor_model_parallel_size", 1),
            logging_enabled=False,
        ),
    }
    frequency = {"moe_layer_freq": moe_freq_type(shape.get("moe_layer_freq", 1))}
    args = argparse.Namespace(**{**defaults, **shape, **frequency})
    return num_floating_point_operations(args, batch_size)


@pytest.mark.parametrize("name", MODELS)
def test_three_forward_passes_are_megatrons_training_step(name):
    shape = MODELS[name]
    assert 3 * 8 * GptShape(**shape).forward_flops() == pytest.approx(
        megatron_flops(8, **shape), rel=1e-12
    )


LONG = TrainingLength(seq_length=4096, global_batch_size=1024, train_samples=300 * 10**9 // 4096)


def test_a_million_tokens_cost_a_6b_model_little():
    """6B parameters, 300B tokens, 1M watched tokens, 160 probes: well under 0.1%."""
    schedule = ProbeSchedule.parse("list:" + ",".join(str(440 * i) for i in range(160)))
    n_sequences = -(-(10**6) // 4096)
    probes = 160 * n_sequences * megatron_flops(1, **SIX_B) / 3
    training = LONG.steps * megatron_flops(1024, **SIX_B)
    share = share_of_training(n_sequences, len(LONG.probe_steps(schedule)), LONG)
    assert share == pytest.approx(probes / training)
    assert share == pytest.approx(160 * 1e6 / (3 * 300e9), rel=0.01)
    assert share < 0.0002
    text = describe_cost(GptShape(**SIX_B), LONG, schedule, [SetSize(n_sequences, 10**6)])
    assert "probes: 160," in text
    assert f"{probes:.3g} FLOP, 0.018% of the training" in text
    assert "640 MB in float32 (4 MB a probe), 320 MB in float16" in text


@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.02])
@pytest.mark.parametrize("ranks", [1, 48])
@pytest.mark.parametrize("spec", ["log:per-octave=8", "linear:1000+last", "tokens:linear:2e9"])
def test_a_budget_is_used_up_and_not_exceeded(share, ranks, spec):
    schedule = ProbeSchedule.parse(spec)
    batch = dataclasses.replace(LONG, micro_batch_size=2, data_parallel_size=ranks)
    try:
        n_sequences = sequences_within(share, schedule, batch)
    except TokscaleError:
        n_sequences = 0
    n_probes = len(batch.probe_steps(schedule))
    if n_sequences:
        assert share_of_training(n_sequences, n_probes, batch) <= share
    assert share_of_training(n_sequences + 1, n_probes, batch) > share


def test_microbatches_are_filled_up_as_the_probe_pass_fills_them():
    from megatron_tokscale.training.probe.microbatches import deal_rows

    generator = np.random.default_rng(0)
    for n, micro, ranks in generator.integers(1, 20, (50, 3)).tolist():
        batch = TrainingLength(
            seq_length=8,
            global_batch_size=1,
            train_iters=1,
            micro_batch_size=micro,
            data_parallel_size=ranks,
        )
        assert batch.rows(n) == deal_rows(n, micro, ranks, 1).size


def test_steps_of_a_job_in_samples_are_megatrons():
    assert LONG.steps == (300 * 10**9 // 4096) // 1024 == 71525
    assert TrainingLength(seq_length=4, global_batch_size=8, train_iters=10).samples == 80


BAD = {
    "--train-iters or --train-samples": lambda: TrainingLength(seq_length=8, global_batch_size=8),
    "shorter than one step": lambda: TrainingLength(
        seq_length=8, global_batch_size=8, train_samples=7
    ),
    "1 or more": lambda: TrainingLength(seq_length=8, global_batch_size=0, train_iters=7),
    "--hidden-size 0": lambda: GptShape(**{**SMALL, "hidden_size": 0}),
    "--moe-layer-freq": lambda: GptShape(
        **SMALL, num_experts=2, moe_layer_freq="exit()"
    ).forward_flops(),
    "is for 3 layers": lambda: GptShape(
        **SMALL, num_experts=2, moe_layer_freq="[1,0]+[0]"
    ).forward_flops(),
    "give a share": lambda: sequences_within(7, ProbeSchedule.parse("last"), LONG),
    "too small": lambda: sequences_within(1e-9, ProbeSchedule.parse("linear:1"), LONG),
    "no point within": lambda: sequences_within(0.1, ProbeSchedule.parse("list:10000000"), LONG),
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_costs_and_schedules_are_refused(message):
    with pytest.raises(TokscaleError, match=message):
        BAD[message]()

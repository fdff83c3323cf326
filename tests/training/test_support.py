"""Settings that are refused and settings that are not; the flags in the refusals are Megatron's."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest
from megatrons import INSTALLED, OLD, VERSIONS, scan

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training import support
from megatron_tokscale.training.support import (
    check_plan,
    check_probe,
    check_replayed_step,
    check_samples,
    plan_refusals,
    probe_refusals,
    replayed_step_refusals,
    sample_refusals,
)

REFUSED_FOR_PROBE = [
    "--cuda-graph-impl local",
    "--cuda-graph-impl full_iteration",
    "--enable-cuda-graph",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--sft",
    "--dataloader-inter-document-masking",
    "--hybrid-context-parallel",
    "--perform-rl-step",
    "--vision-pretraining",
    "--position-embedding-type mrope",
    "--logits-save-dir",
    "--moe-router-force-load-balancing",
    "--moe-router-force-biased",
    "--moe-expert-rank-capacity-factor",
    "--moe-routing-trace-path",
    "--fine-grained-activation-offloading",
    "--fake-process-group",
    "--yaml-cfg",
    "--decoder-seq-length 16",
    "--tensor-parallel-num-weight-shards",
    "--expert-tensor-parallel-num-weight-shards",
]
ALLOWED_FOR_PROBE = [
    "--cuda-graph-impl transformer_engine",
    "--external-cuda-graph",
    "--optimizer-cuda-graph",
    "--fp8-format hybrid --fp8-recipe delayed",
    "--position-embedding-type rope",
    "--rampup-batch-size 2 2 8",
    "--logits-load-dir logits",
    "--reset-position-ids --reset-attention-mask --eod-mask-loss",
    "--moe-expert-capacity-factor 1.0",
    "--save-activations-interval 2",
    "--qk-clip",
    "--log-max-attention-logit",
    "--log-straggler",
    "--defer-embedding-wgrad-compute",
    "--tensor-parallel-num-weight-shards 2 --tensor-model-parallel-size 2",
    "--expert-tensor-parallel-num-weight-shards 2 --expert-tensor-parallel-size 2",
    "--decoder-seq-length 32",
    "--dataloader-type external",
    "--reuse-grad-buf-for-mxfp8-param-ag --overlap-param-gather",
]
REFUSED_FOR_PLAN = [
    "--mock-data",
    "--fim-data",
    "--sft",
    "--perform-rl-step",
    "--hybrid-context-parallel",
    "--yaml-cfg",
    "--dataloader-type single, not cyclic",
    "--dataloader-type single, not external",
]
ALLOWED_FOR_PLAN = [
    "--dataloader-fast-cache-load",
    "--dataloader-defer-npy-index-mmap",
    "--phase-transition-iterations 100",
    "--rampup-batch-size 2 2 8",
    "--dataloader-type single",
    "--full-validation",
    "--reset-position-ids --reset-attention-mask --eod-mask-loss",
]
VALUES = {
    "--moe-router-force-biased": "0.0",
    "--moe-expert-rank-capacity-factor": "1.5",
    "--logits-save-dir": "folder",
    "--moe-routing-trace-path": "folder",
    "--yaml-cfg": "file",
    "--tensor-parallel-num-weight-shards": "2",
    "--expert-tensor-parallel-num-weight-shards": "2",
    "--dataloader-type single, not cyclic": "--dataloader-type cyclic",
    "--dataloader-type single, not external": "--dataloader-type external",
}


@pytest.fixture(scope="module")
def parser():
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return parser


def parse(parser, words):
    given = VALUES.get(words, "")
    words = given if given.startswith("--") else f"{words} {given}"
    return parser.parse_args(["--seq-length", "32", *words.split()])


@pytest.mark.parametrize("words", REFUSED_FOR_PROBE)
def test_a_probe_is_refused_under_settings_that_would_spoil_it(parser, words):
    args = parse(parser, words)
    (refusal,) = probe_refusals(args)
    assert refusal.startswith(f"the probe does not support {words}")
    with pytest.raises(TokscaleError, match=re.escape(refusal)):
        check_probe(args)


@pytest.mark.parametrize("name", ["modelopt_enabled", "export_kd_teacher_load"])
def test_a_probe_is_refused_beside_a_teacher(parser, name):
    """Megatron-LM's script adds these arguments, if ModelOpt is installed."""
    args = parse(parser, "--use-distributed-optimizer")
    for value in (None, False, ""):
        setattr(args, name, value)
        assert probe_refusals(args) == []
    setattr(args, name, "folder")
    (refusal,) = probe_refusals(args)
    assert "--export-kd-teacher-load" in refusal


RECIPES = """
configs:
  half:
    transformer_engine_config_type: TEQuantizationParams
    training_recipe: {fp8_quantization_recipe: tensorwise}
    # no evaluation_recipe here
"""


def test_a_probe_is_refused_in_another_precision_than_the_trainings(parser, tmp_path):
    file = tmp_path / "recipes.yaml"
    args = parse(parser, f"--te-precision-config-file {file}")
    assert probe_refusals(args) == []  # Megatron reports that the file is missing
    file.write_text(RECIPES)
    assert probe_refusals(args) == []
    for line in ("    evaluation_recipe: {}", "  whole: {evaluation_recipe: {}}"):
        file.write_text(f"{RECIPES}{line}\n")
        (refusal,) = probe_refusals(args)
        assert f"--te-precision-config-file {file} with an evaluation_recipe" in refusal


@pytest.mark.parametrize("words", ALLOWED_FOR_PROBE)
def test_a_probe_is_not_refused_without_need(parser, words):
    args = parse(parser, words)
    assert probe_refusals(args) == []
    check_probe(args)


@pytest.mark.parametrize("kind", ["cyclic", "external"])
def test_sample_losses_are_refused_where_another_sampler_deals_the_samples(parser, kind):
    args = parse(parser, f"--dataloader-type {kind}")
    (refusal,) = sample_refusals(args)
    assert f"needs --dataloader-type single, not {kind}" in refusal
    with pytest.raises(TokscaleError, match=re.escape(refusal)):
        check_samples(args)


def test_sample_losses_are_refused_where_samples_move_between_ranks(parser):
    args = parse(parser, "--dataloader-type single")
    assert sample_refusals(args) == []
    args.sequence_packing_scheduler = "dp_balanced"
    (refusal,) = sample_refusals(args)
    assert "--sequence-packing-scheduler" in refusal


@pytest.mark.parametrize("words", ["--fim-data", "--reset-position-ids", "--reset-attention-mask"])
def test_a_replayed_step_is_refused_where_its_samples_would_be_others(parser, words):
    args = parse(parser, words)
    (refusal,) = replayed_step_refusals(args)
    assert refusal.startswith(f"--tokscale-replay-step does not support {words}")
    with pytest.raises(TokscaleError, match=re.escape(refusal)):
        check_replayed_step(args)
    assert replayed_step_refusals(parse(parser, "--eod-mask-loss")) == []


@pytest.mark.parametrize("words", REFUSED_FOR_PLAN)
def test_a_plan_is_refused_for_data_that_it_cannot_order(parser, words):
    args = parse(parser, words)
    (refusal,) = plan_refusals(args)
    assert words in refusal
    with pytest.raises(TokscaleError, match=re.escape(refusal)):
        check_plan(args)


@pytest.mark.parametrize("words", ALLOWED_FOR_PLAN)
def test_a_plan_is_not_refused_without_need(parser, words):
    assert plan_refusals(parse(parser, words)) == []


def test_a_plan_is_refused_where_samples_move_between_ranks(parser):
    args = parse(parser, "")
    assert plan_refusals(args) == []
    args.sequence_packing_scheduler = "dp_balanced"
    (refusal,) = plan_refusals(args)
    assert "--sequence-packing-scheduler: it moves samples between data-parallel ranks" in refusal


def test_all_reasons_are_given_and_the_first_is_raised(parser):
    args = parser.parse_args(
        ["--sft", "--use-torch-fsdp2", "--dataloader-type", "cyclic", "--mock-data"]
    )
    assert [refusal.split()[5].strip(":") for refusal in probe_refusals(args)] == [
        "--use-torch-fsdp2",
        "--sft",
    ]
    assert len(plan_refusals(args)) == 3
    with pytest.raises(TokscaleError, match="--use-torch-fsdp2"):
        check_probe(args)
    check_plan(parser.parse_args(["--seq-length", "32"]))


@pytest.fixture(scope="module")
def by_version():
    """The flags of each supported Megatron with their choices, read by its own parser."""
    return {version: scan(version) for version in VERSIONS}


@pytest.mark.slow
def test_every_flag_that_is_named_is_one_of_megatrons(by_version):
    source = Path(support.__file__).read_text()
    newer = {"--sequence-packing-scheduler"}  # after 0.19
    named = {flag for flag in re.findall(r"--[a-z][a-z0-9-]+", source) if "tokscale" not in flag}
    known = {flag for found in by_version.values() for flag in found["choices"]}
    known.add("--export-kd-teacher-load")  # of Megatron-LM's megatron.post_training, in no wheel
    assert len(named) > 25
    assert named - known == newer


@pytest.mark.slow
def test_every_value_that_is_refused_is_one_of_megatrons(by_version):
    for words in REFUSED_FOR_PROBE:
        flag, _, value = words.partition(" ")
        choices = [found["choices"].get(flag, []) for found in by_version.values()]
        if any(choices):
            assert any(value in known for known in choices), words


@pytest.mark.slow
def test_only_old_megatrons_gather_parameters_from_among_gradients(by_version):
    refused = {version: len(found["refusals"]) for version, found in by_version.items()}
    assert refused == {**dict.fromkeys(OLD, 1), INSTALLED: 0}

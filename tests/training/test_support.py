"""Settings that are refused and settings that are not; the flags in the refusals are Megatron's."""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from jobs import job_environment
from megatrons import INSTALLED, OLD, python_path

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training import support
from megatron_tokscale.training.support import (
    check_plan,
    check_probe,
    plan_refusals,
    probe_refusals,
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
    "--qk-clip",
    "--fine-grained-activation-offloading",
    "--fake-process-group",
    "--yaml-cfg",
    "--decoder-seq-length 16",
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
    "--dataloader-type single, not cyclic": "--dataloader-type cyclic",
    "--dataloader-type single, not external": "--dataloader-type external",
}
PROGRAM = """
import json
from argparse import ArgumentParser, Namespace
from megatron.training.arguments import add_megatron_arguments
from megatron_tokscale.training.support import probe_refusals

parser = ArgumentParser(allow_abbrev=False)
add_megatron_arguments(parser)
choices = {
    flag: [str(choice) for choice in action.choices or ()]
    for action in parser._actions for flag in action.option_strings
}
shared_buffer = Namespace(
    seq_length=32, reuse_grad_buf_for_mxfp8_param_ag=True, overlap_param_gather=True
)
print(json.dumps({"choices": choices, "refusals": probe_refusals(shared_buffer)}))
"""


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


@pytest.mark.parametrize("words", ALLOWED_FOR_PROBE)
def test_a_probe_is_not_refused_without_need(parser, words):
    args = parse(parser, words)
    assert probe_refusals(args) == []
    check_probe(args)


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
    args = parser.parse_args(["--sft", "--qk-clip", "--dataloader-type", "cyclic", "--mock-data"])
    assert [refusal.split()[5].strip(":") for refusal in probe_refusals(args)] == [
        "--sft",
        "--qk-clip",
    ]
    assert len(plan_refusals(args)) == 3
    with pytest.raises(TokscaleError, match="--sft"):
        check_probe(args)
    check_plan(parser.parse_args(["--seq-length", "32"]))


@pytest.fixture(scope="module")
def by_version():
    """The flags of each supported Megatron with their choices, read by its own parser."""

    def read(version):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=job_environment() | {"PYTHONPATH": python_path(version)},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(result.stdout.splitlines()[-1])

    return {version: read(version) for version in [*OLD, INSTALLED]}


def test_every_flag_that_is_named_is_one_of_megatrons(by_version):
    source = Path(support.__file__).read_text()
    newer = {"--sequence-packing-scheduler"}  # after 0.19
    named = {flag for flag in re.findall(r"--[a-z][a-z0-9-]+", source) if "tokscale" not in flag}
    known = {flag for found in by_version.values() for flag in found["choices"]}
    assert len(named) > 25
    assert named - known == newer


def test_every_value_that_is_refused_is_one_of_megatrons(by_version):
    for words in REFUSED_FOR_PROBE:
        flag, _, value = words.partition(" ")
        choices = [found["choices"].get(flag, []) for found in by_version.values()]
        if any(choices):
            assert any(value in known for known in choices), words


def test_only_old_megatrons_gather_parameters_from_among_gradients(by_version):
    refused = {version: len(found["refusals"]) for version, found in by_version.items()}
    assert refused == {**dict.fromkeys(OLD, 1), INSTALLED: 0}

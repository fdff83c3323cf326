"""The parsers take every command, flag and Python block of the documents."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from documents import GUIDES, blocks, commands, read
from gpu_check.__main__ import parser as gpu_check_parser
from reference import flags_parser, verbs, verbs_parser
from runs import log_time, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.store.paths import RunPaths
from megatron_tokscale.store.sample_losses import (
    SamplesFile,
    SamplesHeader,
    make_records,
    samples_name,
)
from megatron_tokscale.training.gpt_flags import megatron_parser

COMMANDS = [
    pytest.param(words, id=f"{block}-{' '.join(words[:3])}")
    for name in GUIDES
    for block in blocks(name, "bash")
    for words in commands(block)
]
PYTHON = [pytest.param(block, id=str(block)) for name in GUIDES for block in blocks(name, "python")]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9](?![\w*-])")
OF_OTHERS = {
    *("--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-backend"),  # of torchrun
    *("--nodes", "--ntasks", "--gpus-per-node", "--kill-on-bad-exit"),  # of srun
    *("--unidiff-zero", "--include"),  # of git apply
    "--until",  # of megatron_tokscale.reweight.live
    "--export-kd-teacher-load",  # of Megatron-LM's megatron.post_training, in no wheel
    "--sequence-packing-scheduler",  # of a Megatron after 0.19
}
EXAMPLES = ("convert", "real_runs")  # scripts whose flags the guides name


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_of_a_verb_is_parsed(words):
    arguments = verbs_parser().parse_args(words)
    assert callable(arguments.verb)


def test_the_guides_name_every_verb():
    text = "\n".join(map(read, GUIDES))
    for verb, _, _ in verbs(verbs_parser()):
        assert f"megatron-tokscale {verb}" in text, verb


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


@pytest.fixture(scope="module")
def known_flags():
    """Flags of verbs, of the plugin in a job, of Megatron, of the check on a GPU, of an example."""
    found = [options(parser) for _, _, parser in verbs(verbs_parser())]
    parsers = (flags_parser(), megatron_parser(), gpu_check_parser())
    example = (FLAG.findall(read(f"examples/real_runs/{name}.py")) for name in EXAMPLES)
    return OF_OTHERS.union(*found, *map(options, parsers), *example)


@pytest.mark.parametrize("name", [name for name in GUIDES if not name.startswith("benchmarks/")])
def test_every_flag_in_a_document_exists(name, known_flags):
    text = read(name)
    if name == "CHANGELOG.md":  # the first column of its table has the old names
        text = re.sub(r"^\| [^|]*(\\\|[^|]*)*\|", "|", text, flags=re.M)
    assert set(FLAG.findall(text)) <= known_flags


@pytest.mark.parametrize("name", GUIDES)
def test_every_target_of_make_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    for words in re.findall(r"(?:`|^    )make ((?:[a-z-]+ ?)+)", read(name), re.M):
        assert set(words.split()) <= targets, words


@pytest.fixture(scope="module")
def fitted_run(tmp_path_factory):
    """A planted run at the path that the documents use, fitted."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    steps = probe_steps(30)
    midpoint_N, drop_N = rng.uniform(2, 8, 1200), rng.uniform(1, 5, 1200)
    curve_NK = expit((midpoint_N[:, None] - log_time(steps)) / 0.3)
    loss_NK = 0.5 + drop_N[:, None] * curve_NK + rng.normal(0, 0.1, curve_NK.shape)
    path = write_run(folder / "checkpoints/my-run", steps, loss_NK).path
    main(["fit", str(path)])
    header = SamplesHeader(run_id="r", launch_id="l", first_step=0, rank=0, ranks=1, seq_length=128)
    file = SamplesFile(RunPaths(path).samples / samples_name(0, 0), header)
    file.create()
    sample_Q, mean_Q = np.arange(8), rng.uniform(2, 8, 8)
    file.append(make_records(1, sample_Q, mean_Q, mean_Q + 1, sample_Q, sample_Q + 1))
    before = Path.cwd()
    os.chdir(folder)
    yield path
    os.chdir(before)


@pytest.mark.parametrize("block", PYTHON)
def test_every_block_of_python_runs(block, fitted_run, capsys):
    exec(compile(block.text, str(block), "exec"), {})
    assert capsys.readouterr().out.strip()

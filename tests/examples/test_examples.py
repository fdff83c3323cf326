"""The launch scripts give Megatron, the plugin and the verbs only what these take."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import job_environment

from megatron_tokscale.cli.entry import main, make_parser
from megatron_tokscale.probe import ProbeSet

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent
# Stands for torchrun or megatron-tokscale: writes its words down, and does nothing.
STUB = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" > "$WORDS"
"""
SIX_B = {"length": 4096, "vocabulary": 128256}
GPT = {"length": 1024, "vocabulary": 50257}


def save_probe_set(path, length, vocabulary):
    shape = (245, length)
    zeros = np.zeros(shape, np.int32)
    ProbeSet(
        *(zeros, zeros, np.ones(shape, bool), zeros, zeros, zeros.astype(np.int16)),
        ("web",),
        vocabulary,
    ).save(path)
    return path


@pytest.fixture(scope="module")
def probe_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    return {
        "6b": save_probe_set(folder / "6b.safetensors", **SIX_B),
        "gpt": save_probe_set(folder / "gpt.safetensors", **GPT),
    }


def run(script, *words, first_on_path=BIN, **variables):
    """Run a launch script with a folder of programs first on PATH."""
    environment = job_environment() | {name: str(value) for name, value in variables.items()}
    environment["PATH"] = os.pathsep.join([str(first_on_path), os.environ["PATH"]])
    command = ["bash", str(EXAMPLES / script), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def started(tmp_path):
    """Run a launch script, and return the words of the command that it starts."""
    for name in ("torchrun", "megatron-tokscale"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)

    def start(script, *words, **variables):
        log = tmp_path / "words"
        done = run(script, *words, first_on_path=tmp_path, WORDS=log, **variables)
        assert done.returncode == 0, done.stderr
        return log.read_text().split("\0")[:-1]

    return start


@pytest.fixture
def doctor(capsys, monkeypatch):
    """A function that runs the doctor on the words of a job, and returns what it prints."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def examine(*words):
        capsys.readouterr()
        main(["doctor", "--", *words])
        return capsys.readouterr().out

    return examine


def assert_refuses_nothing(found, probe_set):
    assert "REFUSED" not in found
    assert "the probe supports all of Megatron's settings" in found
    assert "not among this Megatron's flags" not in found
    assert f"fits: {ProbeSet.load(probe_set).n_tokens} tokens" in found


SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_every_script(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_doctor_refuses_nothing_of_the_6b_job(started, doctor, probe_sets, tmp_path):
    variables = {"ACTION": "doctor", "PROBE": probe_sets["6b"]}
    program, verb, *words = started("train_6b.sh", tmp_path / "run", "1.0", "web", **variables)
    assert (program, verb, words[0]) == ("megatron-tokscale", "doctor", "--")
    assert_refuses_nothing(doctor(*words[1:]), probe_sets["6b"])


def test_the_probes_of_the_6b_job_cost_well_under_a_thousandth(probe_sets, tmp_path):
    variables = {"ACTION": "cost", "PROBE": probe_sets["6b"]}
    job = run("train_6b.sh", tmp_path / "run", "1.0", "web", **variables)
    assert job.returncode == 0, job.stderr
    assert "71,525 steps, 299,997,593,600 tokens" in job.stdout
    share = float(job.stdout.split("% of the training")[0].split()[-1])
    assert 0.01 < share < 0.03


ACTIONS = ["build", "cost", "unseen", "score", "plan", "strata", "prepare", "doctor"]


@pytest.mark.parametrize("action", ACTIONS)
def test_every_verb_of_the_6b_script_is_parsed(started, action):
    variables = {"ACTION": action, "REFERENCE": "REF", "PLAN": "p.json", "STRATA": "s.safetensors"}
    program, *words = started("train_6b.sh", "RUN", "0.7", "web", "0.3", "code", **variables)
    assert program == "megatron-tokscale"
    make_parser().parse_args(words)


def test_a_replay_differs_from_the_training_by_its_flags(started):
    train = started("train_6b.sh", "RUN", "1.0", "web")
    replay = started("train_6b.sh", "RUN", "1.0", "web", ACTION="replay")
    train[train.index("--tokscale-probe-schedule") + 1] = "checkpoints"
    assert replay == [*train, "--tokscale-replay", "RUN", "--tokscale-dir", "RUN/replay"]
    assert "-m megatron_tokscale.run" in " ".join(train)


def test_a_plan_adds_one_flag_to_the_6b_job(started):
    train = started("train_6b.sh", "RUN", "1.0", "web")
    planned = started("train_6b.sh", "RUN", "1.0", "web", PLAN="plan.json")
    assert planned == [*train, "--tokscale-plan", "plan.json"]


def test_the_probe_set_of_strata_corrects_the_plan_of_the_6b_job(started):
    planned = started("train_6b.sh", "RUN", "1.0", "web", PLAN="p.json")
    live = started("train_6b.sh", "RUN", "1.0", "web", PLAN="p.json", STRATA="s.safetensors")
    at = live.index("--tokscale-probe-set") + 2
    assert live == [
        *(*planned[:at], "s.safetensors", *planned[at:]),
        *("--tokscale-replan-interval", "3576"),
    ]


def test_the_reference_of_the_6b_job_has_the_probes_that_falls_need(started):
    """Its checkpoints, which the replay probes, lie at a quarter of its steps and at their end."""
    words = started("train_6b.sh", "REF", "1.0", "web", SIZE="reference")
    steps, every = (int(words[words.index(f"--{x}") + 1]) for x in ("train-iters", "save-interval"))
    assert steps // 4 % every == 0 and steps % every == 0


# Stands for srun: runs the command behind its options on one node.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[7-8]" ]] && printf 'node7\\nnode8\\n'
"""


def test_slurm_starts_the_6b_job_on_every_node(started, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": EXAMPLES.parent, "SLURM_JOB_ID": 1230042}
    slurm |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": 2}
    job = ("RUN", "0.7", "web", "0.3", "code")
    for node in range(2):
        found = started("slurm/train_6b.sbatch", *job, SLURM_NODEID=node, PLAN="p.json", **slurm)
        by_hand = {"NODE_RANK": node, "NUM_NODES": 2, "MASTER_ADDR": "node7", "MASTER_PORT": 20042}
        assert found == started("train_6b.sh", *job, PLAN="p.json", **by_hand)


def test_slurm_asks_for_the_ranks_of_the_6b_job(started):
    words = started("train_6b.sh", "RUN", "1.0", "web")
    text = (EXAMPLES / "slurm/train_6b.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --(\S+?)=(\S+)$", text, re.M))
    assert asked["nodes"] == words[words.index("--nnodes") + 1]
    assert asked["gpus-per-node"] == words[words.index("--nproc_per_node") + 1]
    assert asked["ntasks-per-node"] == "1"


def test_an_unknown_action_is_refused():
    done = run("train_6b.sh", "RUN", "1.0", "web", ACTION="fly")
    assert done.returncode == 2
    assert "ACTION=fly is unknown; give build, cost" in done.stderr


def test_the_doctor_refuses_nothing_of_the_small_job(started, doctor, probe_sets, tmp_path):
    words = started("train_gpt.sh", tmp_path / "run", "web", probe_sets["gpt"])
    at = words.index("megatron_tokscale.run")
    assert words[0] == "torchrun" and words[at - 1] == "-m"
    assert_refuses_nothing(doctor(*words[at + 1 :]), probe_sets["gpt"])


def test_three_marked_lines_are_all_of_the_plugin_in_the_small_job():
    lines = (EXAMPLES / "train_gpt.sh").read_text().splitlines()
    body = [line for line in lines if not line.startswith("#")]
    marked = [line for line in body if "# tokscale: " in line]
    assert [re.search(r"# tokscale: (\d)", line)[1] for line in marked] == ["1", "2", "3"]
    assert [line for line in body if "tokscale" in line.lower()] == marked


def test_the_probe_set_of_the_small_job_is_built_by_the_command_above_it():
    text = (EXAMPLES / "train_gpt.sh").read_text()
    command = re.search(r"megatron-tokscale (probe build.*?\n(?:#.*\\\n)*#[^\n]*)\n", text)[1]
    words = re.sub(r"\\?\n#|\\", " ", command).split("MEGATRON=")[0].split()
    arguments = make_parser().parse_args(words)
    assert (arguments.seq_length, arguments.vocab_size) == (GPT["length"], GPT["vocabulary"])


def test_the_demo_script_trains_as_the_demo_does(started):
    from megatron_tokscale.demo.job import FULL, SPLIT

    words = started("train_demo.sh", "RUN", "DEMO")
    flags = {
        "--num-layers": FULL.n_layers,
        "--hidden-size": FULL.hidden_size,
        "--seq-length": FULL.seq_length,
        "--vocab-size": FULL.vocab_size,
        "--global-batch-size": FULL.global_batch_size,
        "--split": SPLIT,
    }
    for flag, value in flags.items():
        assert words[words.index(flag) + 1] == str(value)
    assert {"DEMO/data/speeches", "DEMO/data/python", "DEMO/probe.safetensors"} <= set(words)


def test_every_verb_of_the_demos_axes_is_parsed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("demo_axes")
    commands = []
    monkeypatch.setattr(example, "tokscale", lambda *words: commands.append([*map(str, words)]))
    example.analyse(tmp_path)
    two_runs = ["compare", "compare", "forecast"]
    expected = [*["fit"] * 8, *["spectrum"] * 4, "laws", *two_runs, "report"]
    assert [words[0] for words in commands] == expected
    for words in commands:
        make_parser().parse_args(words)
    sys.modules.pop("demo_axes")

"""The three entry points, and the refusals of bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import (
    EOD,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Corpus,
    job_environment,
    job_flags,
    run_alone,
    torchrun,
)

import megatron_tokscale
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron

SCRIPT = """
import inspect
{first_line}
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.arguments import parse_and_validate_args
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron_tokscale.pretrain import (
    forward_step, model_provider, train_valid_test_datasets_provider,
)

if __name__ == "__main__":
    config = pretrain_cfg_container_from_args(parse_and_validate_args())
    pretrain(
        config,
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=model_provider,
    )
"""


@pytest.mark.parametrize("way_in", ["run", "adaptor"])
def test_a_script_of_ones_own_is_probed(corpus: Corpus, tmp_path, way_in):
    script = tmp_path / "pretrain_mine.py"
    first_line = "import megatron_tokscale.adaptor" if way_in == "adaptor" else ""
    script.write_text(SCRIPT.format(first_line=first_line))
    launcher = ("-m", "megatron_tokscale.run") if way_in == "run" else ()
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(tmp_path / "run"))
    words = [*launcher, str(script), *job_flags(corpus, "--train-iters", "2", *probe)]
    job = subprocess.run(
        torchrun(1, words), env=job_environment(), capture_output=True, text=True, check=False
    )
    assert job.returncode == 0, job.stderr[-6000:]
    assert Run.open(tmp_path / "run").step_K.tolist() == [0, 1, 2]


@pytest.mark.parametrize("safe", [(), ("-P",)])
def test_the_folder_of_the_script_stands_first_and_no_other_is_lost(tmp_path, safe):
    """Python leaves out the folder of `-m` under -P, so there is no entry to replace then."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/train.py").write_text("import sys; print(sys.path[:3]); import extra")
    (tmp_path / "extra.py").touch()
    path = [str(tmp_path), str(Path(megatron_tokscale.__file__).parents[1])]
    result = subprocess.run(
        [sys.executable, *safe, "-m", "megatron_tokscale.run", "../checkout/train.py"],
        cwd=tmp_path / "checkout",
        env=job_environment() | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == str([str(tmp_path / "checkout"), *path])


def test_without_a_flag_nothing_is_wrapped():
    code = (
        "import sys; sys.argv = ['pretrain.py', '--num-layers', '2']\n"
        "import megatron_tokscale.adaptor\n"
        "import megatron.training.training as t, megatron.training.arguments as a\n"
        "names = ['train', 'pretrain', 'training_log', 'initialize_megatron']\n"
        "names.append('post_training_step_callbacks')\n"
        "assert not any(hasattr(getattr(t, name), '__wrapped__') for name in names)\n"
        "assert not hasattr(a.add_megatron_arguments, '__wrapped__')\n"
        "assert 'megatron_tokscale.training.plugin' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=job_environment(), check=True)


def test_import_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_tokscale, megatron_tokscale.cli\n"
        "assert not {'torch', 'megatron', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def build(corpus: Corpus, path, **changes):
    settings = {
        "data_path": corpus.data_path,
        "split": "900,100,0",
        "seq_length": SEQ_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "n_tokens": 200,
        "eod": EOD,
    }
    build_probe_set(ProbeSettings(**settings | changes)).save(path)


def other_vocabulary(corpus, path):
    build(corpus, path, vocab_size=VOCAB_SIZE + 1)
    return ()


def other_length(corpus, path):
    build(corpus, path, seq_length=SEQ_LENGTH // 2)
    return ()


def missing(corpus, path):
    return ()


def truncated(corpus, path):
    build(corpus, path)
    path.write_bytes(path.read_bytes()[:-100])
    return ()


def bad_schedule(corpus, path):
    build(corpus, path)
    return ("--tokscale-probe-schedule", "log:8")


def plan_with_cyclic_loader(corpus, path):
    build(corpus, path)
    return ("--tokscale-plan", "plan.json", "--dataloader-type", "cyclic")


BAD_INPUT = {
    other_vocabulary: "is for a vocabulary of 256, the job has 255",
    other_length: "has sequences of 16 tokens, the job trains on --seq-length 32",
    missing: "cannot read probe set",
    truncated: "is damaged",
    bad_schedule: "cannot read 'log:8'",
    plan_with_cyclic_loader: "needs --dataloader-type single, not cyclic",
}


@pytest.mark.parametrize("spoil", BAD_INPUT, ids=lambda spoil: spoil.__name__)
def test_bad_input_gets_one_line_before_training_starts(corpus: Corpus, tmp_path, spoil):
    path = tmp_path / "probe.safetensors"
    flags = spoil(corpus, path)
    run = ("--tokscale-dir", str(tmp_path / "run"), "--train-iters", "2")
    job = run_alone(corpus, "--tokscale-probe-set", str(path), *run, *flags)
    ours = [line for line in job.stderr.splitlines() if line.startswith("megatron-tokscale:")]
    assert job.returncode == 2, job.stderr[-3000:]
    assert len(ours) == 1
    assert BAD_INPUT[spoil] in ours[0]
    assert "Traceback" not in job.stderr
    assert "done with setup" not in job.stdout
    assert not (tmp_path / "run").exists()

"""The CPU runtime is on only when asked for, and never where there is a GPU."""

import importlib.util
import subprocess
import sys

import pytest
from jobs import job_environment

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.cpu import enable, is_enabled, is_requested, required_flags
from megatron_tokscale.training.upstream import mend_compile_helpers

pytestmark = pytest.mark.slow


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=job_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_flag_or_environment_request_the_runtime(monkeypatch):
    monkeypatch.delenv("MEGATRON_TOKSCALE_CPU", raising=False)
    assert not is_requested(["pretrain_gpt.py", "--lr", "1"])
    assert is_requested(["pretrain_gpt.py", "--tokscale-cpu"])
    monkeypatch.setenv("MEGATRON_TOKSCALE_CPU", "1")
    assert is_requested([])


def test_flags_that_the_user_gave_are_kept():
    flags = required_flags(["--transformer-impl", "local", "--distributed-backend=gloo"])
    assert "--transformer-impl" not in flags
    assert "--distributed-backend" not in flags
    assert "--use-cpu-initialization" in flags


def test_a_machine_with_a_gpu_refuses_in_one_line():
    job = run_python(
        "import sys, torch\n"
        "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 8\n"
        "sys.argv = ['x', '--tokscale-cpu']\n"
        "import megatron_tokscale.adaptor\n"
    )
    assert job.returncode == 2
    assert job.stderr.startswith("megatron-tokscale: --tokscale-cpu is for machines without a GPU")
    assert job.stderr.count("\n") == 1


def test_the_runtime_refuses_to_come_after_megatron():
    importlib.import_module("megatron.core")
    assert not is_enabled()
    with pytest.raises(TokscaleError, match="comes too late"):
        enable()
    assert not is_enabled()


PLACES = ("torch.zeros(2, device='cuda')", "torch.ones(2).to('cuda:0')", "torch.ones(2).cuda()")


@pytest.fixture(scope="module")
def devices():
    """The device of each of `PLACES`, in one process with the CPU runtime."""
    job = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "from megatron_tokscale import cpu; cpu.enable()\n"
        "import torch\n" + "".join(f"print({place}.device)\n" for place in PLACES)
    )
    return dict(zip(PLACES, job.stdout.split(), strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_cuda_places_are_the_cpu(place, devices):
    assert devices[place] == "cpu"


def test_the_wheels_helpers_are_not_compiled_again(monkeypatch):
    """In a copy of Megatron's module as it is on disk."""
    name = "megatron.core.datasets.utils"
    spec = importlib.util.find_spec(name)
    unmended = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unmended)
    monkeypatch.setattr(name, unmended)
    monkeypatch.setitem(sys.modules, name, unmended)
    with pytest.raises(SystemExit):
        unmended.compile_helpers()
    mend_compile_helpers()
    unmended.compile_helpers()

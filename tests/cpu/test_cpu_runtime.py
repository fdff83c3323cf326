"""The CPU runtime is on only when asked for, and never where there is a GPU."""

import subprocess
import sys

import pytest
from jobs import job_environment

from megatron_tokscale.cpu import is_requested, required_flags


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
    job = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core\n"
        "from megatron_tokscale import cpu\n"
        "try: cpu.enable()\n"
        "except Exception as error: print(error)\n"
    )
    assert "comes too late" in job.stdout


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


def test_the_wheels_helpers_are_not_compiled_again():
    job = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "from megatron_tokscale.training.upstream import mend_compile_helpers\n"
        "mend_compile_helpers()\n"
        "from megatron.core.datasets.utils import compile_helpers\n"
        "compile_helpers(); print('fine')\n"
    )
    assert job.stdout.strip() == "fine", job.stderr

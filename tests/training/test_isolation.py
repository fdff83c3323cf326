"""A probed training is the unprobed training, to the bit."""

import numpy as np
import pytest
import torch
from jobs import Corpus, run_job

from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron

LAYOUTS = {
    "TP2 x PP2": (4, ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")),
    "DP2, sharded optimizer, overlapped gather": (
        2,
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "EP2 mixture of experts with input jitter": (
        2,
        (
            *("--num-experts", "4", "--expert-model-parallel-size", "2", "--moe-router-topk", "2"),
            *("--moe-input-jitter-eps", "0.01", "--moe-aux-loss-coeff", "0.01"),
            *("--moe-router-load-balancing-type", "aux_loss"),
        ),
    ),
}


def differences(left, right, where=""):
    """Paths at which two checkpoint contents differ, but for the arguments they were made with."""
    if isinstance(left, dict):
        keys = (set(left) | set(right)) - {"args"}
        return [
            d for key in keys for d in differences(left.get(key), right.get(key), f"{where}/{key}")
        ]
    if isinstance(left, list | tuple):
        same_length = len(left) == len(right)
        pairs = enumerate(zip(left, right, strict=True)) if same_length else []
        inner = [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
        return inner if same_length else [where]
    if torch.is_tensor(left):
        return [] if torch.is_tensor(right) and torch.equal(left, right) else [where]
    if isinstance(left, np.ndarray):
        return [] if np.array_equal(left, right) else [where]
    return [] if type(left) is type(right) and repr(left) == repr(right) else [where]


def checkpoint_differences(left, right):
    names = [path.relative_to(left) for path in left.glob("iter_*/**/*.pt")]
    assert names
    return [
        difference
        for name in names
        for difference in differences(
            torch.load(left / name, weights_only=False),
            torch.load(right / name, weights_only=False),
            str(name),
        )
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_probes_leave_no_trace_in_the_training(corpus: Corpus, tmp_path, name):
    n_processes, layout = LAYOUTS[name]
    flags = (*layout, "--train-iters", "6", "--save-interval", "6")
    probe = (
        "--tokscale-probe-set",
        str(corpus.probe_set),
        "--tokscale-schedule",
        "linear:2+list:1",
    )
    run_job(corpus, n_processes, *flags, "--save", str(tmp_path / "without"))
    run_job(
        corpus,
        n_processes,
        *(*flags, "--save", str(tmp_path / "with")),
        *(*probe, "--tokscale-verify-isolation"),
    )
    assert Run.open(tmp_path / "with").step_K.tolist() == [0, 1, 2, 4, 6]
    assert checkpoint_differences(tmp_path / "without", tmp_path / "with") == []

"""The example whose learning times are known, in a setting that trains in seconds.

Shapes: T subtasks, N test samples, K probe steps.
"""

import importlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("sparse_parity")


@pytest.fixture(scope="module")
def network_module(example):
    return importlib.import_module("sparse_parity_network")


@pytest.fixture(scope="module")
def settings(example):
    return example.Settings(
        tasks=6, bits=16, subset=2, alpha=1.0, batch=500, width=256, steps=1500, learning_rate=5e-3
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def networks(example, settings, folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield example.watch(folder, settings, 2)
    torch.set_num_threads(threads)


def test_a_label_is_the_parity_of_its_subtasks_own_bits(example, settings):
    problem = example.SparseParity(settings)
    task_N, bits, label_N = problem.test_set(settings)
    for task, row, label in zip(task_N.tolist(), bits.tolist(), label_N.tolist(), strict=True):
        assert label == sum(int(row[i]) for i in problem.subset_TM[task].tolist()) % 2
    assert len({tuple(subset) for subset in problem.subset_TM.tolist()}) == settings.tasks
    weights = [i**-2.0 for i in range(1, settings.tasks + 1)]
    assert np.allclose(problem.frequency_T, np.array(weights) / sum(weights))


def test_the_lookup_is_a_layer_over_one_hot_control_bits(example, network_module, settings):
    network = network_module.Network(settings)
    task_N, bits, _ = example.SparseParity(settings).test_set(settings)
    one_hot = torch.nn.functional.one_hot(task_N, settings.tasks).float()
    weight = torch.cat([network.control.weight.T, network.bits.weight], dim=1)
    hidden = torch.cat([one_hot, bits], dim=1) @ weight.T + network.bits.bias
    torch.testing.assert_close(network(task_N, bits), network.out(hidden.relu()))


def test_learning_times_order_the_subtasks_as_they_converge(example, settings, networks, folder):
    steps = example.probe_steps(settings.steps)
    for number, network in enumerate(networks):
        loss_NK = example.trained(folder, settings, number)
        by_document = loss_NK.reshape(settings.documents, settings.tasks, len(steps))
        curves_TK = by_document[1::2].mean(axis=0)
        first_T = steps[(curves_TK < 0.1 * math.log(2)).argmax(axis=1)]
        assert (first_T > 0).all()
        assert (np.exp(network.converged_x_T) <= first_T).all()
        found_T = np.isfinite(network.learned_x_T)
        assert found_T.sum() >= 5
        # Two neighbours of six that are swapped leave 0.943.
        assert spearmanr(network.learned_x_T[found_T], first_T[found_T]).statistic > 0.94
        assert (network.learned_x_T < network.converged_x_T)[found_T].all()


def test_what_one_network_learned_predicts_the_derivative_of_another(example, networks):
    for source, target in (networks, networks[::-1]):
        assert example.scores(source, source)["full"] > 0.7
        assert example.scores(source, target)["full"] > 0.6
    fits = networks[0].fits
    names = ("midpoint_N", "step1_midpoint_N", "step2_midpoint_N")
    early = replace(fits, **{name: getattr(fits, name) - 1.5 for name in names})
    assert example.scores(replace(networks[0], fits=early), networks[1])["full"] < 0.3


def test_a_censored_exponent_is_less_biased_than_least_squares(example):
    frequency_T = np.arange(1, 41) ** -1.4
    scatter_T = 0.3 * np.random.default_rng(0).standard_normal(40)
    x_T = 5 - 0.81 * np.log(frequency_T) + scatter_T
    seen_T = np.where(x_T < 8.5, x_T, np.nan)
    assert np.isnan(seen_T).sum() > 8
    biased, reach = example.frequency_exponent(frequency_T, seen_T)
    assert 0 < reach < 0.2
    censored = example.censored_exponent(frequency_T, seen_T, 8.5)
    assert abs(censored - 0.81) < abs(biased - 0.81)


def test_a_trained_network_is_not_trained_again(example, settings, networks, folder, capsys):
    files = {path: path.stat().st_mtime_ns for path in folder.glob("losses-*.npz")}
    assert len(files) == 2
    flags = ["--tasks", "6", "--bits", "16", "--subset", "2", "--alpha", "1.0", "--batch", "500"]
    flags += ["--width", "256", "--steps", "1500", "--learning-rate", "0.005", "--plot"]
    note = folder / "note.md"
    example.main(["--out", str(folder), "--markdown", str(note), *flags])
    assert {path: path.stat().st_mtime_ns for path in folder.glob("losses-*.npz")} == files
    assert "Spearman" in capsys.readouterr().out
    assert "--tasks 6 --bits 16" in note.read_text()
    assert str(folder) not in note.read_text()
    assert (folder / "sparse_parity.png").stat().st_size > 10_000

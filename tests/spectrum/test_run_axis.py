"""The loss along D and M, from planted last losses of runs. N tokens, K runs."""

import json

import numpy as np
import pytest
from runs import log_time, plain_probe_set, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, sealed, write_json
from megatron_tokscale.core.progress import NoProgress
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.spectrum import axis_run, groupings
from megatron_tokscale.store import WatchedTokens

N_TOKENS = 1600
STEPS = np.array([0, 50, 100, 200, 400, 800, 1600])
SIZES = [int(n) for n in np.geomspace(1e6, 64e6, 7)]


def token(seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, N_TOKENS), rng.uniform(1, 5, N_TOKENS)


def losses(progress_K, order_N, drop_N, seed=1):
    """Tokens fall when the progress of training passes their place in the order."""
    curve_NK = 1 + drop_N[:, None] * expit((order_N[:, None] - progress_K) / 0.06)
    return curve_NK + 0.03 * np.random.default_rng(seed).standard_normal(curve_NK.shape)


def run_of_size(path, size, loss_NK, steps=STEPS):
    run = write_run(path, steps, loss_NK)
    info = read_json(path / "tokscale/run.json")
    about = {"parameters": 2 * size, "non_embedding": size, "flops_per_token": 6 * size}
    write_json(path / "tokscale/run.json", sealed(info | {"size": about}))
    return type(run).open(run.path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("axes")


@pytest.fixture(scope="module")
def models(folder):
    """Larger models learn more of one order; each was probed before and after training."""
    order_N, drop_N = token()
    runs = []
    for k, size in enumerate(SIZES):
        last_N = losses(np.array([k / 6]), order_N, drop_N, seed=k)[:, 0]
        runs.append(run_of_size(folder / f"m{k}", size, np.stack([last_N + 4, last_N], 1), [0, 9]))
    return runs


@pytest.fixture(scope="module")
def along_t(folder):
    """A run in which the same tokens are learned in the same order along T, at other times."""
    order_N, drop_N = token()
    steps = probe_steps(40, last=3000)
    progress_K = np.where(steps > 0, (log_time(np.maximum(steps, 1)) / 8) ** 2, -5.0)
    run = write_run(folder / "t", steps, losses(progress_K, order_N, drop_N))
    fit_run(run)
    return run


def test_the_axis_is_ordered_and_measured(models, folder):
    shuffled = [models[i] for i in (3, 0, 6, 1, 5, 2, 4)]
    result = axis_run(shuffled, "M", folder / "M", n_resamples=20, seed=0)
    assert [run.size for run in result.runs] == pytest.approx(SIZES)
    last = [run.read_losses()[:, -1].mean() for run in models]
    assert [run.loss for run in result.runs] == pytest.approx(last, rel=1e-5)
    stored = json.loads((folder / "M/axis.json").read_text())
    assert to_json(result).items() <= stored.items()
    assert result.fall.low < last[0] - last[-1] < result.fall.high
    assert [each.uncorrected for each in result.falls] == pytest.approx(-np.diff(last), abs=1e-5)
    for each, fall in zip(result.falls, -np.diff(last), strict=True):
        assert each.low < fall < each.high
    with np.load(folder / "M/axis.npz") as arrays:
        assert set(arrays) == {"x_K", "mean_loss_RK", "x_G", "measured_RG"}
        np.testing.assert_allclose(arrays["mean_loss_RK"][0], last, rtol=1e-5)
        assert arrays["measured_RG"].shape == (21, len(arrays["x_G"]))


def test_the_slope_of_a_straight_loss_is_that_of_the_line(folder):
    runs = []
    for k, size in enumerate(SIZES[:4]):
        last_N = 5 - 0.25 * np.log(size / SIZES[0]) + np.zeros(N_TOKENS)
        runs.append(run_of_size(folder / f"line{k}", size, np.stack([last_N, last_N], 1), [0, 9]))
    axis_run(runs, "M", folder / "line", n_resamples=2, seed=0)
    with np.load(folder / "line/axis.npz") as arrays:
        np.testing.assert_allclose(arrays["measured_RG"], 0.25, rtol=1e-4)


def test_a_token_counts_if_its_loss_is_finite_in_all_runs(folder):
    order_N, drop_N = token()
    runs, last_NK = [], []
    for k, size in enumerate(SIZES[:4]):
        last_NK.append(losses(np.array([k / 3]), order_N, drop_N, seed=k)[:, 0])
        last_NK[-1][10 * k : 10 * k + 3] = (np.nan, np.inf, -np.inf)
        loss_NK = np.stack([last_NK[-1] + 4, last_NK[-1]], 1)
        runs.append(run_of_size(folder / f"part{k}", size, loss_NK, [0, 9]))
    result = axis_run(runs, "M", folder / "part", n_resamples=2, seed=0)
    whole_N = np.isfinite(last_NK).all(axis=0)
    assert whole_N.sum() == N_TOKENS - 12
    expected = np.mean(np.array(last_NK)[:, whole_N], axis=1)
    assert [run.loss for run in result.runs] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("size", "factor"), [("parameters", 2), ("flops", 6)])
def test_the_size_can_be_chosen(models, folder, size, factor):
    result = axis_run(models, "M", folder / size, size=size, n_resamples=2, seed=0)
    assert result.runs[0].size == pytest.approx(factor * SIZES[0])


def test_learning_times_along_t_predict_the_axis(models, along_t, folder):
    result = axis_run(models, "M", folder / "across", source=along_t, n_resamples=40, seed=0)
    decile = result.across.groups["learning-time decile"]
    assert decile.passes is True
    assert decile.source is not None and decile.own is None
    assert decile.events.value > 0.5


def test_learning_times_of_other_tokens_do_not_predict_the_axis(models, folder):
    order_N, drop_N = token(seed=99)
    steps = probe_steps(40, last=3000)
    progress_K = np.where(steps > 0, log_time(np.maximum(steps, 1)) / 8, -5.0)
    run = write_run(folder / "other", steps, losses(progress_K, order_N, drop_N))
    fit_run(run)
    result = axis_run(models, "M", folder / "not", source=run, n_resamples=40, seed=0)
    assert result.across.groups["learning-time decile"].passes is False


def test_data_are_counted_in_tokens(tmp_path):
    order_N, drop_N = token()
    runs = []
    for k, last in enumerate(STEPS[1:]):
        loss_N = losses(np.array([k / 5]), order_N, drop_N, seed=k)[:, 0]
        loss_NK = np.stack([loss_N + 1, loss_N], 1)
        runs.append(write_run(tmp_path / f"d{k}", [0, int(last)], loss_NK))
    result = axis_run(runs, "D", tmp_path / "D", n_resamples=2, seed=0)
    tokens = [4 * int(last) * plain_probe_set(N_TOKENS).seq_length for last in STEPS[1:]]
    assert [run.size for run in result.runs] == pytest.approx(tokens)
    assert result.size == "tokens"


def test_bad_axes_are_refused_with_one_line(models, folder, tmp_path):
    with pytest.raises(TokscaleError, match="3 runs are too few"):
        axis_run(models[:3], "M", folder / "x")
    with pytest.raises(TokscaleError, match="have the same size on the axis D"):
        axis_run(models, "D", folder / "x")
    plain = write_run(tmp_path / "plain", [0, 9], np.ones((N_TOKENS, 2)))
    with pytest.raises(TokscaleError, match="does not say how large its model is"):
        axis_run([*models, plain], "M", folder / "x")
    other = write_run(tmp_path / "few", [0, 9], np.ones((16, 2)))
    with pytest.raises(TokscaleError, match="watches other tokens"):
        axis_run([*models, other], "M", folder / "x")
    lost = run_of_size(
        tmp_path / "lost", SIZES[-1] * 2, np.full((N_TOKENS, 2), np.nan, np.float32), [0, 9]
    )
    with pytest.raises(TokscaleError, match="no token has a finite last loss in all 8 runs"):
        axis_run([*models, lost], "M", folder / "x")
    assert not (folder / "x").exists()


def test_a_file_in_the_place_of_the_folder_is_refused_before_any_work(models, tmp_path):
    class Refusing(NoProgress):
        def stage(self, name):
            raise AssertionError(f"{name} was begun")

    file = tmp_path / "file"
    file.write_text("something else")
    for out in (file, file / "axis"):
        with pytest.raises(TokscaleError, match="expected a folder for the result"):
            axis_run(models, "M", out, progress=Refusing())
    assert file.read_text() == "something else"


def test_the_verb_prints_the_axis(models, along_t, folder, capsys):
    words = ["spectrum", "--axis", "M", *(str(run.path) for run in models)]
    main([*words, "--source", str(along_t.path), "--out", str(folder / "cli"), "--resamples", "5"])
    printed = capsys.readouterr().out
    assert "axis M (non-embedding), 7 runs; the mean loss falls by" in printed
    assert printed.count("nats, a fall of") == 6
    assert "learning-time decile" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--axis", "M"], "--axis M is given without --out"),
        (["--axis", "M", "--out", "x", "--source", "a", "a"], "--source has 2 runs; expected one"),
        (["--resamples", "1"], "--resamples: '1' is not a whole number from 2"),
        (["--out", "x"], "--axis T takes one RUN"),
    ],
)
def test_the_verb_refuses_with_one_line(along_t, words, message, capsys, monkeypatch):
    path = str(along_t.path)
    words = [path if word == "a" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["spectrum", path, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_source_that_learned_nothing_has_no_learning_times_to_test(models, folder):
    steps = probe_steps(40, last=3000)
    flat_NK = 5 - 1e-3 * np.arange(40) * np.ones((N_TOKENS, 1))
    flat_NK += 0.3 * np.random.default_rng(0).standard_normal(flat_NK.shape)
    run = write_run(folder / "flat", steps, flat_NK)
    fit_run(run)
    across = axis_run(models, "M", folder / "nothing", source=run, n_resamples=5, seed=0).across
    assert isinstance(across.groups, Undefined) or not any(
        each.passes for each in across.groups.values()
    )


def test_without_learning_times_there_are_no_deciles_of_them():
    tokens = plain_probe_set(80)
    found = groupings(WatchedTokens(tokens), np.full(80, np.nan))
    assert set(found) == {"dataset", "frequency decile", "position decile"}

"""The loss along D and M, from planted last losses of runs. N tokens, K runs."""

import dataclasses
import json
import shutil

import numpy as np
import planted_axes
import pytest
from runs import plain_probe_set, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, sealed, write_json
from megatron_tokscale.core.progress import NoProgress
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results.axis import Top, read_axis
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import axis_run, groupings
from megatron_tokscale.store import Run, WatchedTokens
from megatron_tokscale.store.losses import write_losses

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


def test_the_axis_is_ordered_and_measured(models, folder):
    shuffled = [models[i] for i in (3, 0, 6, 1, 5, 2, 4)]
    result = axis_run(shuffled, "M", folder / "M", n_resamples=20, seed=0)
    assert [run.size for run in result.runs] == pytest.approx(SIZES)
    last = [run.read_losses()[:, -1].mean() for run in models]
    assert [run.loss for run in result.runs] == pytest.approx(last, rel=1e-5)
    stored = json.loads((folder / "M/axis.json").read_text())
    assert to_json(result).items() <= stored.items()
    assert result.fall.low < last[0] - last[-1] < result.fall.high
    falls = [run.fall.uncorrected for run in result.runs[1:]]
    assert falls == pytest.approx(-np.diff(last), abs=1e-5)
    for each, fall in zip(result.runs[1:], -np.diff(last), strict=True):
        assert each.fall.low < fall < each.fall.high
    assert isinstance(result.shift, Undefined)
    assert (
        "the number of runs with probes along T is 0; a shift of the clock needs"
        in result.shift.undefined
    )
    assert read_axis(models[0], folder / "M").summary == result


def test_falls_by_group_are_those_of_their_tokens(models, folder):
    result = axis_run(models, "M", folder / "groups", n_resamples=20, seed=0)
    first_N, last_N = (models[k].read_losses()[:, -1] for k in (0, -1))
    dataset_N = plain_probe_set(N_TOKENS).dataset_N
    found = result.group_falls["dataset"]
    assert [each.name for each in found] == ["prose", "code"]
    for d, each in enumerate(found):
        fall = (first_N - last_N)[dataset_N == d].mean()
        assert each.fall.uncorrected == pytest.approx(fall, rel=1e-5)
        assert each.share_of_tokens == 0.5


def test_last_losses_alone_tell_the_size_at_which_a_token_is_learned(models, folder):
    result = axis_run(models, "M", folder / "last", n_resamples=2, seed=0)
    order_N, drop_N = token()
    # The k-th of seven sizes has learned the tokens up to k / 6 of the order.
    fallen = (drop_N * (expit(order_N / 0.06) - expit((order_N - 1) / 0.06))) >= 1
    assert result.last_losses.tokens == N_TOKENS
    assert result.last_losses.fallen_share == pytest.approx(fallen.mean(), abs=0.02)
    half = np.exp(np.quantile(order_N[fallen], 0.5) * np.log(64)) * 1e6
    assert result.last_losses.size_quartiles[1] == pytest.approx(half, rel=0.15)


def test_a_token_counts_if_its_losses_are_finite_in_all_runs(folder):
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
    with pytest.raises(TokscaleError, match="2 runs are too few for an axis; expected 3"):
        axis_run(models[:2], "M", folder / "x")
    with pytest.raises(TokscaleError, match="all 7 runs have the same size on the axis D"):
        axis_run(models, "D", folder / "x")
    with pytest.raises(TokscaleError, match="is not among the runs of the axis"):
        axis_run(models[:5], "M", folder / "x", trunk=models[6])
    with pytest.raises(TokscaleError, match=r"has the losses of .*; expected other runs"):
        axis_run([*models[:5], models[4]], "M", folder / "x")
    plain = write_run(tmp_path / "plain", [0, 9], np.ones((N_TOKENS, 2)))
    with pytest.raises(TokscaleError, match="does not say how large its model is"):
        axis_run([*models, plain], "M", folder / "x")
    other = write_run(tmp_path / "few", [0, 9], np.ones((16, 2)))
    with pytest.raises(TokscaleError, match="watches other tokens"):
        axis_run([*models, other], "M", folder / "x")
    lost = run_of_size(
        tmp_path / "lost", SIZES[-1] * 2, np.full((N_TOKENS, 2), np.nan, np.float32), [0, 9]
    )
    with pytest.raises(
        TokscaleError, match="no token has finite losses at all probes of all 8 runs"
    ):
        axis_run([*models, lost], "M", folder / "x")
    assert not (folder / "x").exists()


def test_a_folder_that_is_taken_is_refused_before_any_work(models, tmp_path):
    class Refusing(NoProgress):
        def stage(self, name):
            raise AssertionError(f"{name} was begun")

    file = tmp_path / "file"
    file.write_text("something else")
    (tmp_path / "axis.json").write_text("an earlier result")
    for out, message in (
        (file, "expected a path in a folder"),
        (file / "axis", "expected a path in a folder"),
        (tmp_path, "axis.json exists, and it is not replaced"),
        (models[0].path, "holds the files of a run"),
        (models[0].path / "analysis", "holds the files of a run"),
    ):
        with pytest.raises(TokscaleError, match=message):
            axis_run(models, "M", out, progress=Refusing())
    assert file.read_text() == "something else"
    assert (tmp_path / "axis.json").read_text() == "an earlier result"


def test_the_verb_prints_the_axis(models, probed, folder, capsys):
    words = ["spectrum", "--axis", "M", *(str(run.path) for run in models)]
    main(
        [*words, "--source", str(probed[-1].path), "--out", str(folder / "cli"), "--resamples", "5"]
    )
    printed = capsys.readouterr().out
    assert "axis M (non-embedding), 7 runs; 95% intervals over" in printed
    assert printed.count("nats, a fall of") == 6
    assert "shift of the clock: undefined: the number of runs with probes along T is 0" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--axis", "M"], "--axis M is given without --out"),
        (["--axis", "M", "--out", "x", "--source", "a", "a"], "--source has 2 runs; expected one"),
        (["--resamples", "1"], "--resamples: '1' is not a whole number from 2"),
        (["--out", "x"], "--axis T takes one RUN"),
        (["--trunk", "x"], "--axis T takes one RUN"),
        (["--axis", "M", "--out", "x", "--trunk", "a"], "--trunk is given with --axis M"),
    ],
)
def test_the_verb_refuses_with_one_line(probed, words, message, capsys, monkeypatch):
    path = str(probed[-1].path)
    words = [path if word == "a" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["spectrum", path, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_learning_times_there_are_no_deciles_of_them():
    tokens = plain_probe_set(80)
    found = groupings(WatchedTokens(tokens), np.full(80, np.nan))
    assert set(found) == {"dataset", "frequency decile", "position decile"}


@pytest.fixture(scope="module")
def probed(folder):
    """Runs of four sizes, the largest twice, with probes along T: the smaller, the later."""
    rng = np.random.default_rng(0)
    tokens = planted_axes.Tokens.draw(N_TOKENS, rng)
    x, steps = planted_axes.clock()[::3], planted_axes.steps().astype(int)[::3]
    runs = []
    for k, u in enumerate((-2.9, -2.0, -1.0, 0.0, 0.0)):
        loss_NK = tokens.losses(x, u, rng, kappa=0.7)
        runs.append(run_of_size(folder / f"t{k}", round(1e8 * np.exp(u)), loss_NK, steps))
    fit_run(runs[-1])
    return runs


def test_probes_along_t_give_the_shift_of_the_clock(probed, folder):
    result = axis_run(probed, "M", folder / "shift", n_resamples=20, seed=0)
    shift = result.shift
    assert result.clock == "lr-sum"
    assert shift.top in (Top.BEFORE, Top.UNIGRAM)
    assert shift.kappa.both.low < 0.7 < shift.kappa.both.high
    assert [run.delta.value for run in shift.runs] == pytest.approx([2.03, 1.4, 0.7, 0, 0], abs=0.1)
    assert 0 < shift.seed_noise < 0.1
    assert shift.earlier_test.verdict is Verdict.HOLDS
    assert result.learning_times == "t4"
    assert shift.groups["learning-time decile"].skill.both.value > 0.6
    assert all(run.probes > 10 for run in result.runs)
    assert read_axis(probed[0], folder / "shift").summary == result


def test_the_verb_prints_the_shift(probed, folder, capsys):
    words = ["spectrum", "--axis", "M", *(str(run.path) for run in probed), "--resamples", "3"]
    main([*words, "--out", str(folder / "printed")])
    printed = capsys.readouterr().out
    for words in (
        "shift of the clock (lr-sum) per unit of ln size",
        "share of the same tokens earlier",
        "mean absolute error on left-out runs, in nats: shift and floor",
        "learning-time decile",
    ):
        assert words in printed


def curve(steps):
    return 6 - 0.5 * np.log(np.asarray(steps))


def branch_run(path, steps, loss_K):
    offset_N = np.random.default_rng(0).uniform(-0.5, 0.5, N_TOKENS)
    return write_run(path, steps, offset_N[:, None] - offset_N.mean() + np.asarray(loss_K))


@pytest.fixture(scope="module")
def trunk_and_branches(folder):
    """A trunk, and two branches that decay: their last losses lie 0.2 and 0.3 nats lower."""
    trunk = branch_run(folder / "trunk", [10, 20, 40, 80, 160], curve([10, 20, 40, 80, 160]))
    early = branch_run(folder / "early", [10, 20, 40, 50], [*curve([10, 20, 40]), curve(50) - 0.2])
    late = branch_run(
        folder / "late", [10, 20, 40, 80, 100], [*curve([10, 20, 40, 80]), curve(100) - 0.3]
    )
    return [trunk, early, late]


def test_branches_are_found_and_their_decay_is_measured(trunk_and_branches, folder):
    result = axis_run(trunk_and_branches, "D", folder / "trunks", n_resamples=10, seed=0)
    check = result.same_clock
    assert check.reference == "trunk"
    assert [(run.name, run.branch_step) for run in check.runs] == [("early", 40), ("late", 80)]
    gains = [run.at_clock.value for run in check.runs]
    # The trunk is read on the straight line between its probes in ln time: exactly its curve.
    assert gains == pytest.approx([0.2, 0.3], abs=1e-4)
    assert check.error_at_clock == pytest.approx(0.25, abs=1e-4)
    assert "the number of runs with probes along T is 1" in result.shift.undefined
    assert [run.probes for run in result.runs] == [0, 0, 5]


def end_at_rate(run, path, rate):
    """A copy of a run in which the last probe has another learning rate."""
    shutil.copytree(run.path, path)
    copied = Run.open(path)
    record = dataclasses.replace(copied.records[-1], learning_rate=rate)
    loss_N = copied.read_losses_at(record.step)
    copied.paths.losses_at(record.step).unlink()
    write_losses(copied.paths.losses_at(record.step), loss_N, record)
    return Run.open(path)


@pytest.mark.parametrize("trunk_decays", [False, True])
def test_a_trunk_at_its_full_rate_is_not_compared_with_decayed_branches(
    trunk_and_branches, tmp_path, trunk_decays
):
    trunk, *branches = trunk_and_branches
    runs = [end_at_rate(run, tmp_path / run.path.name, 0.0) for run in branches]
    runs.append(end_at_rate(trunk, tmp_path / "trunk", 0.0) if trunk_decays else trunk)
    result = axis_run(runs, "D", tmp_path / "axis", n_resamples=10, seed=0)
    loss = [curve(50) - 0.2, curve(100) - 0.3, curve(160)]
    falls = [loss[0] - loss[1], loss[1] - loss[2]]
    compared = falls if trunk_decays else falls[:1]
    found = [run.fall.value for run in result.runs if run.fall is not None]
    assert found == pytest.approx(compared, abs=1e-4)
    assert result.fall.value == pytest.approx(sum(compared), abs=1e-4)
    assert (result.runs[-1].fall is None) is not trunk_decays


def test_a_branch_is_known_by_the_trunks_launches(folder):
    def launched(name, steps, loss_K, *launches):
        run = branch_run(folder / name, steps, loss_K)
        first = dataclasses.replace(run.launches[0], launch_id=launches[0][1])
        rows = [dataclasses.replace(first, step=step, launch_id=each) for step, each in launches]
        dataclasses.replace(run.info, launches=tuple(rows)).save(run.paths.identity)
        return Run.open(run.path)

    steps = [10, 20, 40, 80, 160]
    trunk = launched("launched-trunk", steps, curve(steps), (0, "a"))
    # The branches were probed after they left the trunk alone.
    early = launched("launched-early", [41, 50], curve([41, 50]) - 0.2, (0, "a"), (36, "b"))
    late = launched("launched-late", [90, 100], curve([90, 100]) - 0.3, (0, "a"), (80, "c"))
    result = axis_run([trunk, early, late], "D", folder / "launched", n_resamples=2, seed=0)
    steps = {run.name: run.branch_step for run in result.same_clock.runs}
    assert steps == {"launched-early": 36, "launched-late": 80}


def test_a_trunk_can_be_named(trunk_and_branches, folder):
    late = trunk_and_branches[2]
    result = axis_run(trunk_and_branches, "D", folder / "named", trunk=late, n_resamples=2, seed=0)
    assert result.same_clock.reference == "late"
    steps = {run.name: run.branch_step for run in result.same_clock.runs}
    assert steps == {"early": 40, "trunk": 80}

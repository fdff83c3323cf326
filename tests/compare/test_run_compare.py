"""`compare_runs` on runs on disk: planted gains and shifts, the common end, and bad input.

Shapes: N tokens, K probe steps.
"""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from analyses import edit
from runs import log_time, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.compare import run_compare
from megatron_tokscale.compare.compare_text import describe_comparison
from megatron_tokscale.compare.run_compare import compare_runs
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results import read_comparison
from megatron_tokscale.results.comparison import NO_SECOND_SEED
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.store import Run

N_TOKENS, SHIFT = 1600, 0.2
STEPS = probe_steps(40, last=2000)
END = np.log(2000)
GAINS = np.arange(N_TOKENS) % 16 == 0


def losses(seed, gains=False, shift=0.0, steps=STEPS):
    """Sigmoids over the whole range; a sixteenth of the tokens is learned with gains alone."""
    truth, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    midpoint_N = truth.uniform(1.5, END + 0.5, N_TOKENS)
    drop_N = truth.uniform(3, 5, N_TOKENS)
    midpoint_N[GAINS] = np.log(100) if gains else END + 5
    midpoint_N = midpoint_N - shift + 0.1 * rng.standard_normal(N_TOKENS)
    noise_NK = rng.standard_normal((N_TOKENS, len(STEPS)))[:, : len(steps)]
    fallen_NK = expit((log_time(steps) - midpoint_N[:, None]) / 0.15)
    return (1 + drop_N[:, None] * (1 - fallen_NK) + 0.1 * noise_NK).astype(np.float32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Fitted runs by name: two seeds of the baseline, one with gains and a shift, a short one."""
    folder = tmp_path_factory.mktemp("runs")
    planted = {
        "a": losses(0),
        "c": losses(1),
        "b": losses(2, gains=True, shift=SHIFT),
        "short": losses(2, gains=True, shift=SHIFT)[:, :-6],
        "short_a": losses(0)[:, :-6],
    }
    for name, loss_NK in planted.items():
        fit_run(write_run(folder / name, STEPS[: loss_NK.shape[1]], loss_NK))
    return {name: Run.open(folder / name) for name in planted}


@pytest.fixture(scope="module")
def decided(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return compare_runs(runs["a"], runs["b"], [runs["c"]], out=out, n_resamples=40), out


def test_planted_gains_are_called_and_nothing_is_lost(decided):
    found, _ = decided
    gained, lost = found.overall.gained, found.overall.lost
    # The shift alone brings B the tokens that A learns just after the end.
    planted_N = np.random.default_rng(0).uniform(1.5, END + 0.5, N_TOKENS)
    near = np.sum((planted_N > END - 0.4) & ~GAINS)
    assert GAINS.sum() - 5 <= gained.called <= GAINS.sum() + near
    assert lost.called == 0
    assert gained.excess.value == gained.tokens - gained.seed
    assert gained.excess.low < gained.excess.value < gained.excess.high
    assert all(GAINS[each.token] for each in found.gained)
    assert {each.state_a for each in found.gained} <= {"unmoved", "forgotten", "to come"}
    assert {each.state_b for each in found.gained} == {"learned"}
    first = found.gained[0]
    assert first.time_b == pytest.approx(100 * np.exp(-SHIFT) * 4 * 8, rel=0.3)  # in tokens
    assert np.isnan(first.time_a)
    assert first.passage.target == str(first.token)  # each token of this probe set has its own id


def test_calls_of_the_groups_add_up(decided):
    found, _ = decided
    for rows in found.groups.values():
        assert sum(row.tokens for row in rows) == N_TOKENS
        assert sum(row.gained.called for row in rows) == found.overall.gained.called
        assert sum(row.gained.tokens for row in rows) == found.overall.gained.tokens
        mean = sum(row.tokens * row.lower.uncorrected for row in rows) / N_TOKENS
        assert mean == pytest.approx(found.overall.lower.uncorrected)
    assert [row.name for row in found.groups["dataset"]] == ["prose", "code"]


def test_a_count_says_what_it_counts(decided):
    found, _ = decided
    shown = describe_comparison(found)
    count = f"gained: {found.overall.gained.tokens:,} tokens that B has learned and A has not"
    assert f"{count}, with the lower late loss in B" in shown
    for kind in ("gained", "lost"):
        ((tokens, seed, excess),) = re.findall(
            rf"^  {kind}: ([\d,]+) .* place of B ([\d,]+): excess ([+-][\d,]+) ", shown, re.M
        )
        plain = [int(each.replace(",", "")) for each in (tokens, seed, excess)]
        assert plain[2] == plain[0] - plain[1]


@pytest.mark.parametrize("kind", ["documents", "samples", "blocks"])
def test_units_have_their_own_name_in_the_text(decided, kind):
    shown = describe_comparison(replace(decided[0], unit_kind=kind))
    named = re.findall(r"\b(documents?|samples|blocks)\b", shown)
    assert set(named) == {kind}
    assert len(named) == 6  # their number, two factors with two intervals each, the swaps


def test_planted_shift_is_found_in_every_dataset(decided):
    found, _ = decided
    for row in (found.overall, *found.groups["dataset"]):
        factor = row.learning_times.factor
        assert np.log(factor.value) == pytest.approx(SHIFT, abs=0.04)
        assert factor.low < factor.value < factor.high
        assert row.learning_times.seeds[0] == pytest.approx(1, abs=0.04)
    assert found.spectra.p_documents <= 0.01


def test_late_loss_is_lower_by_the_mean_of_the_measured_losses(decided, runs):
    found, _ = decided
    late = [runs[name].read_losses()[:, STEPS >= 1500].mean() for name in "ab"]
    assert found.overall.lower.uncorrected == pytest.approx(late[0] - late[1], abs=0.03)


def test_file_has_what_is_returned(decided):
    found, out = decided
    on_disk = read_comparison(out / "compare.json")
    assert on_disk.overall.gained == found.overall.gained
    assert on_disk.a == found.a and on_disk.noise == found.noise
    assert on_disk.spectra == found.spectra


def test_without_a_second_seed_every_call_is_undecided(runs, tmp_path, capsys):
    found = compare_runs(runs["a"], runs["b"], out=tmp_path, n_resamples=10)
    for row in (found.overall, *(row for rows in found.groups.values() for row in rows)):
        for change in (row.gained, row.lost):
            assert change.tokens >= 0
            calls = (change.seed, change.excess, change.called, change.false_calls)
            assert calls == (NO_SECOND_SEED,) * 4
    assert {each.q_value for each in found.gained} == {NO_SECOND_SEED}
    assert found.spectra.p_seeds == NO_SECOND_SEED
    main(["compare", str(runs["a"].path), str(runs["b"].path), "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("undecided: no second seed") >= 5


def test_longer_run_is_compared_as_if_it_ended_at_the_common_end(runs, tmp_path):
    cut = compare_runs(runs["a"], runs["short"], out=tmp_path / "cut", n_resamples=20)
    ended = compare_runs(runs["short_a"], runs["short"], out=tmp_path / "ended", n_resamples=20)
    assert cut.a.refitted and not cut.b.refitted and not ended.a.refitted
    assert cut.end == ended.end == cut.b.last == pytest.approx(STEPS[-7] * 4 * 8)
    assert any("a goes on" in note for note in cut.notes)
    assert cut.overall.gained.tokens == pytest.approx(ended.overall.gained.tokens, abs=5)
    assert cut.overall.lower.uncorrected == pytest.approx(ended.overall.lower.uncorrected, abs=0.01)
    factors = [each.overall.learning_times.factor.value for each in (cut, ended)]
    assert factors[0] == pytest.approx(factors[1], abs=0.01)


def test_run_that_diverges_after_the_common_end_is_compared_up_to_it(runs, tmp_path):
    whole = compare_runs(runs["a"], runs["short"], out=tmp_path / "whole", n_resamples=5)
    loss_NK = losses(0)
    loss_NK[:, -2:] = np.nan  # a job that goes on for two probes without a finite loss
    loss_NK[::2, -1] = np.inf
    loss_NK[0, -1] = 1.0
    diverged = write_run(tmp_path / "diverged", STEPS, loss_NK)
    fit_run(diverged)
    found = compare_runs(Run.open(diverged.path), runs["short"], out=tmp_path, n_resamples=5)
    assert found.compared == N_TOKENS
    assert found.overall.gained.tokens == whole.overall.gained.tokens
    assert found.overall.late_loss_a == pytest.approx(whole.overall.late_loss_a, abs=1e-4)
    factors = [each.overall.late_loss.factor.value for each in (found, whole)]
    assert factors[0] == pytest.approx(factors[1], abs=1e-3)


def test_other_probe_schedules_are_said(runs, tmp_path, decided):
    sparse = write_run(tmp_path / "sparse", STEPS[::2], losses(3)[:, ::2])
    fit_run(sparse)
    found = compare_runs(runs["a"], sparse, out=tmp_path, n_resamples=4)
    (note,) = [note for note in found.notes if "numbers of probes" in note]
    in_a, in_sparse = map(int, re.findall(r"(?:a|sparse) (\d+)[,)]", note))
    assert len(STEPS) - 6 <= in_a < len(STEPS)
    assert in_sparse in (in_a // 2, in_a // 2 + 1)
    assert not any("numbers of probes" in note for note in decided[0].notes)


def test_folders_of_one_name_are_told_apart_by_those_above(runs, tmp_path):
    for name in "abc":
        shutil.copytree(runs[name].path, tmp_path / name / "checkpoints")
    a, b, c = (Run.open(tmp_path / name / "checkpoints") for name in "abc")
    found = compare_runs(a, b, [c], n_resamples=4)
    names = [each.name for each in (found.a, found.b, *found.noise)]
    assert names == ["a/checkpoints", "b/checkpoints", "c/checkpoints"]
    compare_runs(a, c, n_resamples=4)
    written = sorted(each.parent.name for each in (a.path / "analysis").rglob("compare.json"))
    assert written == ["b-checkpoints", "c-checkpoints"]


def test_blocks_give_the_same_comparison(decided, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_compare, "_VALUES_PER_READ", 7 * len(STEPS))
    monkeypatch.setattr("megatron_tokscale.results.fitted._VALUES_PER_READ", 11 * len(STEPS))
    found = compare_runs(runs["a"], runs["b"], [runs["c"]], out=tmp_path, n_resamples=40)
    assert found.overall.gained == decided[0].overall.gained
    times, factor = found.overall.learning_times, found.overall.late_loss.factor
    assert times == decided[0].overall.learning_times
    assert factor.value == pytest.approx(decided[0].overall.late_loss.factor.value)


def test_tokens_without_finite_losses_are_left_out(runs, tmp_path):
    loss_NK = losses(0)
    loss_NK[:8, 20] = np.nan
    run = write_run(tmp_path / "gaps", STEPS, loss_NK)
    fit_run(run)
    found = compare_runs(run, runs["b"], out=tmp_path / "out", n_resamples=10)
    assert found.compared == N_TOKENS - 8
    assert found.overall.tokens == N_TOKENS - 8
    assert any(note.startswith("8 of 1,600 tokens") for note in found.notes)


def test_clock_may_be_chosen(runs, tmp_path):
    found = compare_runs(runs["a"], runs["b"], out=tmp_path, clock="step", n_resamples=10)
    assert (found.clock, found.end) == ("step", pytest.approx(2000))
    assert isinstance(found.overall.late_loss.factor, Estimate)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a", "a"], "has the losses of"),
        (["a", "b", "--noise", "a"], "has the losses of"),
        (["a", "copy"], "has the losses of"),
        (["a", "unfitted"], "megatron-tokscale fit"),
        (["a", "other"], "watches other tokens"),
        (["a", "b", "--clock", "axis"], "no record of a common clock"),
        (["a", "b", "--out", "file"], "cannot be written"),
        (["a", "b", "--tokenizer", "missing.json"], "cannot read tokenizer"),
        (["a", "few"], "4 probes up to the common end"),
        (["a"], "--help"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(
    argv, words, runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        shutil.copytree(runs[name].path, tmp_path / name)
    shutil.copytree(runs["a"].path, tmp_path / "copy")
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "unfitted", STEPS, losses(5))
    other = write_run(tmp_path / "other", STEPS, losses(5)[:800])
    fit_run(other)
    fit_run(write_run(tmp_path / "few", np.array([0, 300, 900, 1999, 2600]), losses(5)[:, :5]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["compare", *argv])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_comparison_of_other_runs_is_not_replaced(runs, tmp_path):
    compare_runs(runs["a"], runs["b"], out=tmp_path, n_resamples=5)
    compare_runs(runs["a"], runs["b"], out=tmp_path, n_resamples=5)  # its own is
    kept = (tmp_path / "compare.json").read_bytes()
    copied = shutil.copytree(runs["c"].path, tmp_path / "c")
    edit(copied / "tokscale" / "run.json", run_id="another")
    fit_run(Run.open(copied))
    with pytest.raises(TokscaleError, match="has the comparison of other runs"):
        compare_runs(runs["a"], Run.open(copied), out=tmp_path, n_resamples=5)
    assert (tmp_path / "compare.json").read_bytes() == kept


def test_file_that_is_no_comparison_is_not_replaced(runs, tmp_path):
    (tmp_path / "compare.json").write_text('{"mine": 1}')
    with pytest.raises(TokscaleError, match="is no comparison that this version reads"):
        compare_runs(runs["a"], runs["b"], out=tmp_path, n_resamples=5)
    assert (tmp_path / "compare.json").read_text() == '{"mine": 1}'

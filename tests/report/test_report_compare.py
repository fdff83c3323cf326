"""Two runs on one probe set: the second reaches the loss of the first sooner, later or never.

Shapes: K probe steps, F groups of tokens.
"""

import dataclasses
import re

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.report import report_run
from megatron_tokscale.report.sections.beside import verdict
from megatron_tokscale.report.sections.beside.speedup import (
    Curves,
    faster,
    mean_curves,
    time_to_reach,
)
from megatron_tokscale.store import Run, WatchedTokens

STEPS = np.array([0, 1, 2, 4, 8, 16, 32])


def falling(speed=1.0, steps=STEPS):
    """Return the loss 10 - ln(speed * step): the step of a loss is in proportion to 1/speed."""
    loss_K = 10 - np.log(speed * np.maximum(steps, 0.5))
    return Curves(steps, steps * 128, loss_K[None])


def text_of(html):
    return re.sub("<[^>]+>", "", html)


def test_time_to_reach_is_interpolated_in_ln_time():
    curves = falling()
    for target in (9.0, 8.2, 7.0):
        exact = np.exp(10 - target)
        np.testing.assert_allclose(time_to_reach(STEPS, curves.loss_FK[0], target), exact)
    assert time_to_reach(STEPS, curves.loss_FK[0], 1.0) is None


def test_between_step_0_and_the_next_probe_the_next_probe_counts():
    assert time_to_reach(np.array([0, 5, 9]), np.array([3.0, 1.0, 0.5]), 2.0) == 5
    assert time_to_reach(np.array([0, 5]), np.array([1.0, 0.5]), 2.0) == 0


def test_faster_is_the_share_of_steps_saved():
    assert faster(200, 150.0) == 0.25
    assert faster(200, 250.0) == -0.25
    assert faster(200, None) is None


def test_the_verdict_says_by_how_much_a_run_is_faster():
    said = text_of(verdict(falling(), falling(speed=2)))
    assert "after 16.0 steps: 50.0% faster" in said


def test_a_slower_run_is_called_slower():
    said = text_of(verdict(falling(), falling(speed=0.5, steps=np.array([0, 1, 8, 32, 128]))))
    assert "after 64.0 steps: 100.0% slower" in said


def test_a_run_that_never_reaches_the_loss_is_called_not_faster():
    said = text_of(verdict(falling(), falling(speed=0.5)))
    assert "never reaches" in said and "not faster" in said and "%" not in said


def test_a_baseline_that_had_stopped_falling_is_reported():
    stalled = Curves(STEPS, STEPS * 128, np.array([[9.0, 8, 7, 5, 5, 5, 5]]))
    assert "as low before, at 4.0 steps" in text_of(verdict(stalled, falling(speed=2**6)))


def test_means_are_over_tokens_finite_in_both_runs(planted, second_run):
    other = second_run(0.2)
    (first, second), dropped = mean_curves((planted.run, other))
    assert dropped == 1
    finite_N = np.isfinite(planted.run.read_losses()).all(axis=1)
    dataset_N = planted.run.probe_set.dataset_N
    for curves, run in ((first, planted.run), (second, other)):
        loss_NK = run.read_losses().astype(float)
        np.testing.assert_allclose(curves.loss_FK[0], loss_NK[finite_N].mean(axis=0), rtol=1e-6)
        for d in range(2):
            mean_K = loss_NK[finite_N & (dataset_N == d)].mean(axis=0)
            np.testing.assert_allclose(curves.loss_FK[d + 1], mean_K, rtol=1e-6)


@pytest.mark.parametrize(("delay", "word"), [(-0.5, "faster"), (0.5, "not faster")])
def test_the_page_says_whether_the_second_run_is_faster(planted, second_run, tmp_path, delay, word):
    out = report_run(planted.run, beside=second_run(delay), out=tmp_path / "report.html")
    html = out.read_text()
    verdict_text = re.search(r'<h2 id="comparison".*?class="verdict">(.*?)</p>', html, re.DOTALL)
    assert word in text_of(verdict_text[1])
    assert "one run of each: one seed." in html
    assert "the runs also differ in the order of the data" in html
    assert "The second run has no copy of a plan" in html


def test_settings_that_differ_are_named(planted, second_run, tmp_path):
    other = second_run(0.0)
    launches = (dataclasses.replace(other.launches[0], seed=7),)
    model = {**other.info.model, "hidden_size": 65}
    info = dataclasses.replace(other.info, launches=launches, model=model)
    other = dataclasses.replace(other, info=info)
    html = report_run(planted.run, beside=other, out=tmp_path / "report.html").read_text()
    assert "model.hidden_size 64 / 65; seed 1234 / 7" in html


def test_runs_of_other_probe_sets_are_refused(planted, second_run):
    other = second_run(0.0)
    tokens = dataclasses.replace(other.probe_set, vocab_size=other.probe_set.vocab_size + 1)
    with pytest.raises(TokscaleError, match="do not share a probe set"):
        report_run(planted.run, beside=dataclasses.replace(other, tokens=WatchedTokens(tokens)))


def test_a_run_without_probes_is_refused(planted, second_run):
    other = second_run(0.0)
    empty = Run(other.path, other.info, other.tokens, ())
    with pytest.raises(TokscaleError, match="no probes yet"):
        report_run(planted.run, beside=empty)

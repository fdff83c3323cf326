"""The page of a run that is being watched, as a parser reads it."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from html_page import Page
from runs import plain_probe_set, probe_steps, write_run

from megatron_tokscale.report.watch_page import render_view
from megatron_tokscale.store.token_state import TokenState
from megatron_tokscale.store.watch_text import SHOWN_STATES, fallen_tokens
from megatron_tokscale.store.watching import RunWatcher

STEPS = [int(step) for step in probe_steps(40, last=1024)]
NOW = 1_700_000_000.0
HOSTILE = "<script>alert(1)</script>"


def made(path, *, datasets=("prose", "code"), steps=STEPS):
    """A run whose tokens fall by steps at random times."""
    probe_set = replace(plain_probe_set(160), datasets=datasets)
    rng = np.random.default_rng(0)
    fallen_NK = np.asarray(steps) >= rng.choice(STEPS, (160, 1))
    loss_NK = 8 - 6 * fallen_NK + 0.1 * rng.standard_normal(fallen_NK.shape)
    return write_run(path, steps, loss_NK, probe_set)


@pytest.fixture
def view(tmp_path):
    return RunWatcher(made(tmp_path / "run").path).look()


@pytest.fixture
def fallen(view):
    return fallen_tokens(view, None)


def test_the_numbers_of_the_page_are_those_of_the_run(view, fallen):
    page = Page(render_view(view, fallen, NOW))
    for name, group in zip(("all", *view.tokens.datasets), view.groups, strict=True):
        shares = [group.share[state] for state in SHOWN_STATES]
        expected = [group.n_tokens, group.loss, group.fall, group.fall_share, *shares]
        assert page.row("now", name) == [value for value in expected if math.isfinite(value)]
    assert sum(view.groups[0].share.values()) == pytest.approx(1)
    assert view.groups[0].share[TokenState.LEARNED] > 0.1


def test_the_bars_of_the_states_are_whole(view, fallen):
    html = render_view(view, fallen, NOW)
    bars = re.findall(r'<svg class="stack".*?</svg>', html)
    assert len(bars) == 1 + len(view.tokens.datasets)
    for bar in bars:
        widths = [float(width) for width in re.findall(r' width="([\d.]+)"', bar)]
        assert sum(widths) == pytest.approx(100, abs=0.05)


def test_the_page_needs_no_other_file_and_runs_no_script(view, fallen):
    html = render_view(view, fallen, NOW, refresh=30)
    page = Page(html)
    assert "script" not in page.tags
    assert not {name for _, name, _ in page.attributes} & {"src", "href", "onclick", "onload"}
    assert '<meta http-equiv="refresh" content="30">' in html
    assert "refresh" not in render_view(view, fallen, NOW)
    assert render_view(view, fallen, NOW) == render_view(view, fallen, NOW)


def test_text_and_names_from_outside_stay_text(fallen, tmp_path):
    run = made(tmp_path / "a<b>", datasets=(HOSTILE, "b&c"))
    view = RunWatcher(run.path).look()
    passage = replace(fallen[0].passage, before=HOSTILE, target=HOSTILE, after=HOSTILE)
    page = Page(render_view(view, [replace(fallen[0], passage=passage)], NOW))
    assert "script" not in page.tags and "b" in page.tags  # the page's own bold numbers
    texts = "".join(text for _, text in page.texts)
    assert texts.count(HOSTILE) >= 5
    assert "a<b>" in texts and "b&c" in texts


def test_a_page_without_a_probe_says_so(tmp_path):
    run = made(tmp_path / "new", steps=[0])
    page = Page(render_view(RunWatcher(run.path).look(), [], NOW))
    assert "what fell is told once there is a probe at or before half the time" in "".join(
        text for _, text in page.texts
    )
    run.paths.losses_at(0).unlink()
    page = Page(render_view(RunWatcher(run.path).look(), [], NOW))
    assert "No probe yet" in "".join(text for _, text in page.texts)

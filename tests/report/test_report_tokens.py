"""Example tokens: chosen by rule, shown in their context, drawn at their time and loss.

Shapes: N tokens, K probe steps.
"""

import dataclasses
import math
import re

import numpy as np
import pytest

from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.probe.text import AFTER, BEFORE, load_tokenizer, marked, passages
from megatron_tokscale.report.charts import TimeScale, short
from megatron_tokscale.report.html import number
from megatron_tokscale.report.sections.examples import choose, trajectory, well_determined


@pytest.fixture(scope="module")
def fits(planted):
    return SigmoidFits.load(planted.run.paths.fits)


@pytest.fixture(scope="module")
def tokenizer(planted):
    return load_tokenizer(planted.tokenizer, planted.run.probe_set)


def test_tokens_are_spread_over_learning_times_and_classes(fits):
    chosen = choose(fits, 36, seed=0)
    assert sum(len(tokens) for tokens in chosen.values()) == 36
    falling = chosen[TokenClass.FALLING]
    assert well_determined(fits)[falling].all()
    midpoints = fits.midpoint_N[falling]
    assert (np.diff(midpoints) >= 0).all()
    all_midpoints = fits.midpoint_N[well_determined(fits)]
    expected = np.quantile(all_midpoints, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.quantile(midpoints, [0.25, 0.5, 0.75]), expected, atol=0.4)
    for token_class, tokens in chosen.items():
        assert (fits.class_N[tokens] == token_class).all()
        assert token_class is TokenClass.FALLING or len(tokens) == 3


def test_the_choice_follows_from_the_seed(fits):
    first, again, other = (choose(fits, 36, seed)[TokenClass.FALLING] for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("n_tokens", [0, 1, 10_000])
def test_no_more_tokens_are_shown_than_asked_for_or_available(fits, n_tokens):
    chosen = np.concatenate(list(choose(fits, n_tokens, seed=0).values()))
    assert len(chosen) <= n_tokens and len(set(chosen.tolist())) == len(chosen)


def test_passages_are_the_text_of_the_sequence(planted, tokenizer):
    probe_set = planted.run.probe_set
    length = probe_set.seq_length
    compared = 0
    for token, passage in enumerate(passages(probe_set, range(2 * length), tokenizer)):
        row, column = divmod(token, length)
        ids = [*probe_set.tokens_BS[row].tolist(), int(probe_set.labels_BS[row, -1])]
        window = ids[max(column + 2 - BEFORE - 1, 0) : column + 2 + AFTER]
        whole = tokenizer.decode(window, skip_special_tokens=False)
        shown = passage.before + passage.target + passage.after
        if not set("\ufffd↵␣") & set(whole + shown):
            assert shown == whole
            compared += 1
    assert compared > length


def test_pieces_of_a_character_do_not_break_the_text(planted, tokenizer):
    ids = tokenizer.encode("Naïve “quotes”").ids
    probe_set = planted.run.probe_set
    row = np.zeros((1, len(ids) - 1))
    tiny = dataclasses.replace(
        probe_set,
        tokens_BS=np.array([ids[:-1]], np.int32),
        labels_BS=np.array([ids[1:]], np.int32),
        mask_BS=row == 0,
        **{name: row.astype(np.int32) for name in ("document_BS", "position_BS", "dataset_BS")},
    )
    shown = passages(tiny, range(tiny.n_tokens), tokenizer)
    assert all(passage.target for passage in shown)
    assert any("“" in passage.target or "”" in passage.target for passage in shown)


def test_context_ends_where_the_watched_tokens_do(planted):
    probe_set = planted.run.probe_set
    mask_BS = probe_set.mask_BS.copy()
    mask_BS[0, 5:] = False
    cut = dataclasses.replace(probe_set, mask_BS=mask_BS)
    (passage,) = passages(cut, [3], None)
    assert passage.after.split() == [str(cut.labels_BS[0, 4])]
    assert passage.before.split() == [str(i) for i in cut.tokens_BS[0, :4]]


def test_invisible_text_is_made_visible():
    assert marked("\n\t") == "↵⇥"
    assert marked("  ") == "␣␣"
    assert marked(" a") == " a"
    assert marked("\x00\u202e\x7f") == "\u2400\ufffd\u2421"


def test_numbers_keep_all_digits_beside_the_shown_text():
    assert number(0.123456789) == '<data value="0.123456789">0.123</data>'
    assert number(np.float64(-0.5), ".1%") == '<data value="-0.5">−50.0%</data>'
    assert number(-1e-9, ".1%") == '<data value="-1e-09">0.0%</data>'
    assert number(None) == number(math.nan) == "–"


def test_points_of_a_trajectory_are_drawn_at_their_time_and_loss():
    time_K = np.array([0.0, 1, 10, 100])
    scale = TimeScale.from_times(time_K)
    loss_K = np.array([4.0, 4, 2, np.nan])
    svg = trajectory(scale, time_K, loss_K, time_K[1:], loss_K[1:], [10.0], "what")
    points = [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", svg)]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x2, y2) = points
    assert y0 == y1 < y2
    np.testing.assert_allclose((x2 - x1) / (x1 - x0), np.log(10) / np.log(2), rtol=0.01)
    assert f'<path class="c" d="M{x2:.1f} ' in svg


def test_ticks_name_step_0_and_powers_of_ten():
    scale = TimeScale.from_times(np.array([0.0, 1, 3000]))
    assert list(scale.ticks().values()) == ["0", "1", "10", "100", "1k"]
    assert list(TimeScale(30.0, 210.0, False).ticks().values()) == ["50", "100", "200"]
    assert [short(v) for v in (0.5, 999, 1000, 2.5e6, 3e11)] == ["0.5", "999", "1k", "2.5M", "300B"]

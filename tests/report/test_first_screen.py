"""The first screen: its numbers are those of the fits and the forecast, its text stays text.

Shapes: N tokens, K probe steps, D datasets, G grid points.
"""

import dataclasses
import math

import numpy as np
import pytest
from html_page import Page, numbers_of

from megatron_tokscale.data.scores import Reliability, ScoreDetails
from megatron_tokscale.fit import TokenState, states_at
from megatron_tokscale.report.first_screen import (
    N_SHOWN,
    choose_under_way,
    first_screen,
    last_octave,
    under_way_cards,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.page import render
from megatron_tokscale.report.token_states import StateShares
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.forecast import (
    Forecast,
    ForecastSettings,
    GroupFall,
    Horizon,
    Judgement,
    Method,
    Origin,
    Standing,
)
from megatron_tokscale.store.token_state import STATE_ORDER

HOSTILE = "<script>alert(1)</script>"
TABLE = (
    TokenState.KNOWN,
    TokenState.LEARNED,
    TokenState.UNDER_WAY,
    TokenState.TO_COME,
    TokenState.UNMOVED,
    TokenState.FORGOTTEN,
)


@pytest.fixture(scope="module")
def inputs(half):
    return ReportInputs.read(half.run, tokenizer=half.tokenizer, n_tokens=6, seed=0)


@pytest.fixture(scope="module")
def shares(inputs):
    return StateShares.of(inputs.fits, inputs.run.tokens, seed=0)


@pytest.fixture(scope="module")
def page(inputs):
    return Page(first_screen(inputs))


def warnings_in(page):
    return [value for tag, _, value in page.attributes if tag == "p"].count("warning")


def screen_with(inputs, **changed):
    return Page(first_screen(dataclasses.replace(inputs, **changed)))


def test_shares_are_counts_of_the_states_of_fitted_tokens(inputs, page):
    state_N, dataset_N = states_at(inputs.fits), inputs.run.tokens.dataset_N
    assert (state_N == TokenState.UNDER_WAY).sum() > 20
    for name, inside_N in (
        ("all datasets", dataset_N >= 0),
        *((name, dataset_N == d) for d, name in enumerate(inputs.run.tokens.datasets)),
    ):
        of_group = [TokenState(s) for s in state_N[inside_N].tolist() if s != TokenState.UNKNOWN]
        expected = [of_group.count(state) / len(of_group) for state in TABLE]
        shown = page.row("now", name)
        # One value; value and ends of the interval in percent, for three states; two values.
        found = [shown[0], *shown[1:10:3], *shown[10:]]
        np.testing.assert_allclose(found, expected, atol=0.02)
        for value, low, high in zip(shown[1:10:3], shown[2:10:3], shown[3:10:3], strict=True):
            assert low <= 100 * value <= high < low + 30


def test_the_picture_ends_at_the_shares_of_now(inputs, shares):
    np.testing.assert_allclose(shares.share_DSG.sum(axis=1), 1)
    for d, of_dataset in enumerate(shares.by_dataset):
        now = [of_dataset[state].uncorrected for state in STATE_ORDER]
        np.testing.assert_allclose(shares.share_DSG[d, :, -1], now)


def test_the_share_of_learned_tokens_in_the_picture_is_that_of_the_time(inputs, shares):
    g = 40
    state_N = states_at(inputs.fits, float(shares.x_G[g]))
    of_first_N = (inputs.run.tokens.dataset_N == 0) & (state_N != TokenState.UNKNOWN)
    expected = (state_N[of_first_N] == TokenState.LEARNED).mean()
    np.testing.assert_allclose(
        shares.share_DSG[0, STATE_ORDER.index(TokenState.LEARNED), g], expected
    )


def test_tokens_shown_are_under_way_fell_most_and_are_of_different_documents(inputs, shares):
    fits, cluster_N = inputs.fits, inputs.run.tokens.cluster_N
    tokens, fall_N = choose_under_way(fits, shares, cluster_N)
    assert 1 < len(tokens) <= N_SHOWN
    assert (states_at(fits)[tokens] == TokenState.UNDER_WAY).all()
    assert len(set(cluster_N[tokens].tolist())) == len(tokens)
    last = float(fits.x_K[-1])
    loss_NG = fits.rows(tokens).predict([last - math.log(2), last])
    is_gradual = np.abs(fall_N[tokens] - (loss_NG[:, 0] - loss_NG[:, 1])) > 1e-9
    assert (fits.class_N[tokens[is_gradual]] == 5).all()  # by their one sigmoid
    assert (np.diff(fall_N[tokens]) <= 0).all()
    best = max(fall_N[(states_at(fits) == TokenState.UNDER_WAY) & (fits.r2_N >= 0.8)])
    assert fall_N[tokens[0]] == best


def test_each_token_shown_has_its_text_and_its_fall(inputs, shares, page):
    tokens, fall_N = choose_under_way(inputs.fits, shares, inputs.run.tokens.cluster_N)
    marked = [text for tags, text in page.texts if tags[-1:] == ("mark",)]
    assert len(marked) == len(tokens)
    values = [float(v) for tag, name, v in page.attributes if (tag, name) == ("data", "value")]
    assert set(np.round(fall_N[tokens], 9)) <= set(np.round(values, 9))


def test_hostile_text_stays_text(inputs):
    probe_set = inputs.run.probe_set
    hostile = int(inputs.tokenizer.encode(HOSTILE).ids[0])
    token = int(np.flatnonzero(probe_set.label_N == hostile)[0])
    html = "".join(under_way_cards(inputs, np.array([token]), np.zeros(probe_set.n_tokens)))
    assert "<script" not in html
    assert HOSTILE in [text for tags, text in Page(html).texts if tags[-1:] == ("mark",)]


def test_falls_of_the_last_octave_are_those_of_the_mean_losses(inputs):
    loss_NK = inputs.run.read_losses().astype(float)
    finite_N = np.isfinite(loss_NK).all(axis=1)
    x_K = inputs.fits.x_K
    for d, found in last_octave(inputs).items():
        mean_K = loss_NK[finite_N & (inputs.run.tokens.dataset_N == d)].mean(axis=0)
        before = np.interp(x_K[-1] - math.log(2), x_K[1:], mean_K[1:])
        np.testing.assert_allclose(found.uncorrected, before - mean_K[-1], rtol=1e-5)
        assert found.low < found.value < found.high


def test_without_forecast_plan_and_scores_the_page_names_the_verbs(inputs, page):
    assert inputs.forecast is None and not inputs.scores and inputs.plan is None
    assert f"megatron-tokscale forecast {inputs.run.path}" in page.words("rest")
    assert f"megatron-tokscale score {inputs.run.path}" in page.words("next")
    assert "plan build fall" in page.words("next")


def test_scores_beside_the_data_are_named_with_their_mean_fall(inputs):
    known = ScoreDetails(reliability={"fall": Reliability(0.5, None, 0.25, 0.01, 40)})
    words = screen_with(inputs, scores={"pr<b>ose": known, "code": ScoreDetails()}).words("next")
    assert "pr<b>ose 0.250 nats, code" in words and "megatron-tokscale score" not in words


def test_the_forecast_is_shown_with_its_horizons_its_datasets_and_its_own_error(inputs):
    found = forecast_of(inputs, Standing.STANDS)
    screen = screen_with(inputs, forecast=found)
    falls = [each.falls[Method.HAZARD] for each in found.now.horizons]
    assert screen.row("rest", "all tokens") == numbers_of(*falls)
    for group in found.now.groups["dataset"]:
        assert screen.row("rest", group.name) == numbers_of(*group.falls)
    assert "missed the falls that came by 12%" in screen.words("rest")
    assert warnings_in(screen) == 1  # a token has NaN losses


def test_a_refuted_forecast_says_so(inputs):
    screen = screen_with(inputs, forecast=forecast_of(inputs, Standing.REFUTED))
    assert "refute this forecast" in screen.words("rest")
    assert warnings_in(screen) == 2


@pytest.mark.parametrize("hazard", [Standing.STANDS, Standing.REFUTED])
def test_falls_of_datasets_are_named_as_the_hazards_and_left_out_if_it_is_refuted(inputs, hazard):
    found = forecast_of(inputs, Standing.STANDS, Method.POWER_LAW, hazard=hazard)
    screen = screen_with(inputs, forecast=found)
    names = [name for section, name in screen.row_names() if section == "rest"]
    of_datasets = ["all tokens, by the hazard of falls", *inputs.run.tokens.datasets]
    assert names == ["all tokens", *(of_datasets if hazard is Standing.STANDS else [])]


def test_a_hazard_that_is_not_corrected_says_so(inputs):
    for correction, said in ((math.nan, True), (0.8, False)):
        found = forecast_of(inputs, Standing.STANDS, correction=correction)
        page = Page(render(dataclasses.replace(inputs, forecast=found)))
        for section in ("rest", "forecast"):
            assert ("is not corrected" in page.words(section)) == said


def test_a_forecast_worse_than_no_fall_says_so(inputs):
    found = forecast_of(inputs, Standing.REFUTED, judged_first=Method.NOTHING)
    screen = screen_with(inputs, forecast=found)
    assert "To say that nothing more falls does better" in screen.words("rest")
    falls = [each.falls[Method.HAZARD] for each in found.now.horizons]
    assert screen.row("rest", "all tokens") == numbers_of(*falls)


def test_the_section_on_the_forecast_has_every_method_back_test_and_group(inputs):
    found = forecast_of(inputs, Standing.STANDS)
    page = Page(render(dataclasses.replace(inputs, forecast=found)))
    now, test = found.now, found.back_tests[1]
    falls = [h.falls[Method.HAZARD] for each in (now, test) for h in each.horizons]
    expected = [*numbers_of(*falls[:3]), 0.12, *numbers_of(*falls[3:])]
    assert page.row("forecast", Method.HAZARD) == expected
    assert page.row("forecast", "what came") == numbers_of(test.horizons[0].measured)
    for group in now.groups["dataset"]:
        shares = numbers_of(group.shares[-1])
        expected = [group.tokens, group.loss, *numbers_of(*group.falls), *shares]
        assert page.row("forecast", group.name) == expected
    words = page.words("forecast")
    assert (
        "No back-test from T/4: too <b>few probes." in words
        and "Assumed: training goes on." in words
    )
    assert 'id="forecast"' not in render(inputs)


def test_the_first_screen_stands_before_the_evidence_and_the_settings_last(inputs):
    html = render(inputs)
    anchors = ("now", "rest", "next", "learning", "verdicts", "spectrum", "run")
    places = [html.index(f'id="{anchor}"') for anchor in anchors]
    assert places == sorted(places)
    assert html.rindex("<h2 ") == html.index('<h2 id="run"')


def forecast_of(
    inputs, standing, best=Method.HAZARD, judged_first=None, hazard=Standing.STANDS, correction=1.0
):
    """A made-up forecast by one method, with a back-test and with one that is undefined."""
    fit = inputs.spectrum.fit

    def horizon(factor, measured=None):
        found = Estimate(0.1 * factor, 0.05 * factor, 0.2 * factor)
        falls = {best: found, Method.SLOPE: Undefined("no")}
        return Horizon(factor, 160 * factor, falls, measured)

    groups = tuple(
        GroupFall(
            name,
            100,
            3.0,
            falls=tuple(Estimate(share * f, 0, f) for f in (0.1, 0.2, 0.5)),
            shares=(Estimate(share, 0, 1),) * 3,
        )
        for name, share in zip(inputs.run.tokens.datasets, (0.3, 0.7), strict=True)
    )
    now = Origin(
        share=1.0,
        time=160.0,
        probes=20,
        loss=Estimate(3.0),
        learned=0.5,
        censored=0.2,
        hazard_per_octave=Estimate(0.1),
        correction=correction,
        horizons=tuple(map(horizon, (2.0, 4.0, 10.0))),
        groups={"dataset": groups},
        group_errors={},
    )
    test = dataclasses.replace(
        now, share=0.5, time=80.0, horizons=(horizon(1.0, Estimate(0.15)),), groups={}
    )
    judgements = [Judgement(best, standing, "it came <so>", 0.12)]
    if best is not Method.HAZARD:
        judgements.append(Judgement(Method.HAZARD, hazard, "so it is", 0.2))
    if judged_first is not None:
        judgements.insert(0, Judgement(judged_first, Standing.STANDS, "nothing fell", 0.1))
    return Forecast(
        fit=fit.identity,
        non_finite=fit.non_finite,
        n_units=10,
        scored=inputs.spectrum.summary.scored,
        assumed=("training goes on",),
        missing=(),
        now=now,
        back_tests=(Undefined("too <b>few probes"), test),
        judgements=tuple(judgements),
        settings=ForecastSettings(100, 10, 0),
    )

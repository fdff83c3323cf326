"""Verdicts of the page: holds, fails or undecided, with the numbers of the analysis."""

import dataclasses
import json
import re

import pytest
from analyses import edit
from html_page import Page, numbers_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.report import report_run
from megatron_tokscale.report.html import interval
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.page import render
from megatron_tokscale.results import SpectrumResult
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.store import WatchedTokens

OTHER = "other <b>&$x_1$"
_LEAKS = r"\b(nan|inf|None|True|False)\b"
LOCAL, AGREES, EXCLUDES = "Transitions of single", "The order of learning", "A token that falls"


@pytest.fixture(scope="module")
def html(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return report_run(planted.run, n_tokens=0, out=out).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def inputs(planted):
    return ReportInputs.read(planted.run, n_tokens=0, seed=0)


@pytest.fixture(scope="module")
def evidence(inputs):
    return inputs.spectrum.evidence


@pytest.fixture(scope="module")
def transfer(inputs):
    (transfer,) = inputs.transfers
    return transfer


def with_evidence(inputs, **changes):
    """Return the page with other evidence."""
    evidence = dataclasses.replace(inputs.spectrum.evidence, **changes)
    spectrum = dataclasses.replace(inputs.spectrum, evidence=evidence)
    return Page(render(dataclasses.replace(inputs, spectrum=spectrum)))


def with_transfers(inputs, *transfers):
    """Return the page with other transfers."""
    return Page(render(dataclasses.replace(inputs, transfers=transfers)))


def test_verdicts_hold_the_numbers_of_the_analysis(evidence, transfer, page):
    for claim, test in (
        (LOCAL, evidence.widths.test),
        (AGREES, transfer.order.test),
        (EXCLUDES, transfer.falls.test),
    ):
        assert page.row("verdicts", claim) == numbers_of(test.estimate)
        assert f"holds {test.claim.rule}" in page.cells("verdicts", claim)
    for tests, words in ((transfer.absolute, "time"), (transfer.by_loss, "mean loss")):
        for grouping, each in tests.items():
            shown = [] if each.test is None else numbers_of(each.gain_over_permuted)
            # The rule has a number too: the largest p-value.
            assert page.row("verdicts", _question(grouping, words))[: len(shown)] == shown
    for name, test in transfer.surface.tests.items():
        claim = f"Falls of learning-time bins, predicted from {OTHER}: {name}"
        assert page.row("verdicts", claim) == numbers_of(test.estimate)


def _question(grouping, words):
    times = f"Learning times of {OTHER} predict which {grouping} falls when in this run"
    return f"{times}, compared at the same {words}"


def test_the_primary_tests_stand_first(html):
    table = html[html.index('id="verdicts"') :]
    claims = re.findall(r'<th scope="row">(<strong>)?<a href="#[^"]*">(.*?)</a>', table)
    assert [bool(bold) for bold, _ in claims[:4]] == [True, True, True, False]
    starts = [LOCAL, AGREES, EXCLUDES]
    assert [claim.startswith(start) for (_, claim), start in zip(claims, starts, strict=False)] == [
        True
    ] * 3


def test_every_verdict_leads_to_its_section(page):
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {"locality", "transfer-1"} <= ids
    targets = {value for _, name, value in page.attributes if name == "href"}
    assert {"#locality", "#transfer-1"} <= targets


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_verdict_on_locality_is_shown_in_words(inputs, evidence, verdict):
    test = dataclasses.replace(evidence.widths.test, verdict=verdict)
    page = with_evidence(inputs, widths=dataclasses.replace(evidence.widths, test=test))
    assert str(verdict) in page.cells("verdicts", LOCAL)
    assert f"Local learning: {verdict}." in page.words("locality")


def test_a_forecast_that_cannot_be_made_says_why(inputs):
    reason = "3 probes <are> too few"
    page = with_evidence(inputs, forward=Undefined(reason))
    assert f"undefined: {reason}" in page.words("forward")


def test_the_forecast_holds_the_numbers_of_the_analysis(evidence, page):
    forward = evidence.forward
    rows = {
        "the tokens' fits": forward.tokens,
        "rival: the power law": forward.power_law,
        "rival: a": forward.uniform,
    }
    for start, forecast in rows.items():
        assert page.row("forward", start) == numbers_of(forecast.error, forecast.fall)
    assert page.row("forward", "measured") == numbers_of(forward.fall)
    gain = forward.gain_over_best_rival
    said = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] nats"
    assert said in page.words("forward").replace("−", "-")
    for grouping, each in forward.groups.items():
        assert page.row("forward", f"{grouping} (") == _grouping(each)
    assert not any(str(verdict) in page.words("forward").split() for verdict in Verdict)


def _grouping(each):
    decision = numbers_of(each.events, each.permuted, each.gain_over_permuted)
    rivals = [rival for rival in (each.full, each.source, each.own) if rival is not None]
    return [*decision, each.p_value, *numbers_of(*rivals)]


def test_transfer_holds_the_numbers_of_the_analysis(transfer, page):
    for grouping, each in transfer.absolute.items():
        both = _grouping(each) + _grouping(transfer.by_loss[grouping])
        assert page.row("transfer", f"{grouping} (") == both


def test_the_learning_order_stands_beside_baseline_predictors(transfer, page):
    order = transfer.order
    for start, name in (
        ("learning time in", "learning time in the other run"),
        ("ln of the token's frequency", "unigram"),
        ("ln of the frequency of the token and", "bigram"),
        ("ln of the position", "position"),
        ("mean loss", "mean loss in the other run"),
    ):
        assert page.row("transfer", start) == numbers_of(order.spearman[name])
    assert page.row("transfer", "all but") == numbers_of(order.explained_by_baseline)
    assert page.row("transfer", "with the") == numbers_of(order.explained_with_time)
    assert page.row("transfer", "gain") == numbers_of(order.gain)
    assert f"at least {1 / (transfer.settings.permutations + 1):.3f}" in page.words("transfer")
    assert f"the last at step {transfer.source_steps[-1]:,}" in page.words("transfer")


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_verdicts_between_two_runs_are_shown_in_words(inputs, transfer, verdict):
    order, falls = (
        dataclasses.replace(each, test=dataclasses.replace(each.test, verdict=verdict))
        for each in (transfer.order, transfer.falls)
    )
    page = with_transfers(inputs, dataclasses.replace(transfer, order=order, falls=falls))
    for claim in (AGREES, EXCLUDES):
        assert str(verdict) in page.cells("verdicts", claim)
    assert f"beyond the baseline predictors: {verdict}." in page.words("transfer")
    assert f"Octaves far apart: {verdict}." in page.words("transfer")


def test_the_covariance_and_the_surface_hold_the_numbers_of_the_analysis(transfer, page):
    for distance, each in enumerate(transfer.falls.profile):
        # Groupings of the tokens have rows, too, whose names may begin with a number.
        assert page.row("transfer", str(distance))[:3] == numbers_of(each)
    for name, test in transfer.surface.tests.items():
        assert page.row("transfer", name) == numbers_of(test.estimate)
    shared = transfer.falls.reproducible
    assert f"{shared.value:.1%} [{shared.low:.1%}, {shared.high:.1%}]" in page.words("transfer")


def test_an_alignment_and_an_order_that_are_undefined_say_why(inputs, transfer):
    order = Undefined("only 7 tokens have a learning time in both runs")
    by_loss = Undefined("no <probe> inside")
    falls, surface = Undefined("3.2 octaves <only>"), Undefined("9 tokens fall")
    page = with_transfers(
        inputs,
        dataclasses.replace(transfer, by_loss=by_loss, order=order, falls=falls, surface=surface),
    )
    assert "at the same mean loss: undefined: no <probe> inside." in page.words("transfer")
    assert "only 7 tokens have a learning time in both runs" in page.words("transfer")
    assert "only 7 tokens" in page.cells("verdicts", AGREES)
    assert "undecided" in page.cells("verdicts", _question("group", "mean loss"))
    for words in (page.cells("verdicts", EXCLUDES), page.words("transfer")):
        assert "3.2 octaves <only>" in words
    assert "9 tokens fall" in page.words("transfer")


def test_gains_without_an_alignment_have_no_figure(inputs, transfer):
    def has_figure(page):
        return any("Gain over permuted" in value for _, _, value in page.attributes if value)

    few = Undefined("too few")
    assert has_figure(with_transfers(inputs, transfer))
    without = dataclasses.replace(transfer, absolute=few, by_loss=few)
    assert not has_figure(with_transfers(inputs, without))


def test_runs_of_one_name_have_anchors_of_their_own(inputs, transfer):
    other = dataclasses.replace(transfer, source_run_id="fedcba9876543210")
    page = with_transfers(inputs, transfer, other)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"transfer-1", "transfer-2"} <= set(ids)
    assert "(id fedcba9876543210)" in page.words("transfer")


def test_names_of_other_runs_are_escaped(html, page):
    assert "<b>&$" not in html
    assert f"Learning times of {OTHER} (id " in page.words("transfer")


def test_without_a_second_run_the_tests_between_two_runs_say_that_they_need_one(copied):
    copied.paths.transfer.unlink()
    page = Page(report_run(copied, n_tokens=0).read_text())
    for claim in (AGREES, EXCLUDES):
        assert "undecided" in page.cells("verdicts", claim)
        assert "needs a second run" in page.cells("verdicts", claim)
    assert "needs a second run" in page.words("transfer")
    assert "Learning times of" not in page.words("verdicts")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(schema_version=0),
        lambda content: content["transfers"][0]["fit"].update(time="tokens"),
        lambda content: content["transfers"][0]["fit"].update(probe_fingerprint="0" * 16),
        lambda content: content["transfers"][0]["fit"]["steps"].pop(),
        lambda content: content["transfers"][0]["fit"].pop("steps"),
    ],
)
def test_a_transfer_to_other_fits_or_of_another_schema_is_refused(copied, change):
    path = copied.paths.transfer
    content = json.loads(path.read_text())
    change(content)
    edit(path, **content)
    with pytest.raises(TokscaleError, match=r"transfer.json .*remove it, and test") as error:
        report_run(copied, n_tokens=0)
    assert "\n" not in str(error.value)


def test_nothing_undefined_leaks_into_the_page(html):
    assert not re.search(_LEAKS, html)


def test_without_resamples_there_are_numbers_but_no_verdicts(copied):
    copied.paths.transfer.unlink()
    spectrum_run(copied, n_resamples=1, null_tokens=100)
    html = report_run(copied, n_tokens=0).read_text()
    assert not re.search(_LEAKS, html)
    # The ceiling of R^2 has the interval of the noise, which needs no resamples.
    scores = SpectrumResult.open(copied).evidence
    ceilings = [*scores.same_tokens.values(), *scores.other_documents.values()]
    # The first screen takes resamples of its own, of the states of the fits.
    evidence = html[html.index('id="verdicts"') :]
    for score in ceilings:
        evidence = evidence.replace(interval(score.ceiling), "")
    assert 'class="interval"' not in evidence
    page = Page(html)
    ratio = SpectrumResult.open(copied).evidence.widths.test.estimate
    assert page.row("verdicts", LOCAL) == [ratio.value]
    assert "undecided" in page.cells("verdicts", LOCAL)


def test_a_run_of_one_dataset(copied):
    tokens = copied.probe_set
    single = dataclasses.replace(tokens, datasets=("prose",), dataset_BS=0 * tokens.dataset_BS)
    single.save(copied.path / "tokscale" / "probe.safetensors")
    copied.paths.transfer.unlink()
    run = dataclasses.replace(copied, tokens=WatchedTokens(single))
    fit_run(run)
    spectrum_run(run, null_tokens=100)
    page = Page(report_run(run, n_tokens=0).read_text())
    assert not page.row("forward", "dataset (") and page.row("forward", "document (")
    assert page.row("loss", "prose") == page.row("loss", "all probe tokens")

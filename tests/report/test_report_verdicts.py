"""Verdicts of the page: passed, not shown or undefined, with the numbers of the analysis."""

import dataclasses
import json
import re

import pytest
from html_page import Page, with_interval

from megatron_tokscale.core.checked import write_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.report import report_run
from megatron_tokscale.report.sections.transfer import gains_figure
from megatron_tokscale.report.verdicts import outcome
from megatron_tokscale.spectrum import spectrum_run

OTHER = "other <b>&$x_1$"
_LEAKS = r"\b(nan|inf|None|True|False)\b"
ORDER = f"Learning times of {OTHER} predict the order"
WORDS = {True: "passed", False: "not shown", None: "undefined"}


@pytest.fixture(scope="module")
def html(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return report_run(planted.run, n_tokens=0, out=out).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def analysis(run, name):
    return json.loads((run.analysis / name).read_text())


def edited(run, name, change):
    """The page of the run after `change` was made to a file of its analysis."""
    content = analysis(run, name)
    change(content)
    write_result(run.analysis / name, content)
    return Page(report_run(run, n_tokens=0).read_text())


def test_verdicts_hold_the_numbers_of_the_analysis(planted, page):
    result = analysis(planted.run, "reconstruction.json")
    local = with_interval(result["widths"], "median_over_null")
    assert page.row("verdicts", "Tokens are learned") == local
    (entry,) = analysis(planted.run, "transfer.json")["from"]
    for alignment, words in (("absolute", "time"), ("by loss", "mean loss")):
        least = page.row("verdicts", _question(words))
        assert least in [with_interval(e, "gain_over_permuted") for e in entry[alignment].values()]


def _question(words):
    groups = f"Learning times of {OTHER} predict which groups of tokens fall in this run"
    return f"{groups}, compared at the same {words}"


def test_every_verdict_leads_to_its_section(page):
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {"locality", "transfer-1"} <= ids
    targets = {value for _, name, value in page.attributes if name == "href"}
    assert {"#locality", "#transfer-1"} <= targets


@pytest.mark.parametrize("passed", [True, False, None])
def test_the_verdict_on_locality_is_told_in_words(copied, passed):
    page = edited(copied, "reconstruction.json", lambda c: c["widths"].update(local=passed))
    assert WORDS[passed] in page.cells("verdicts", "Tokens are learned")
    assert f"Local learning: {WORDS[passed]}." in page.words("locality")


def test_a_forecast_that_cannot_be_made_says_why(copied):
    reason = "3 probes <are> too few"
    page = edited(copied, "reconstruction.json", lambda c: c.update(forward={"undefined": reason}))
    assert f"undefined: {reason}" in page.words("forward")


def test_the_forecast_holds_the_numbers_of_the_analysis(planted, page):
    result = analysis(planted.run, "reconstruction.json")["forward"]
    rows = {
        "the tokens' fits": "tokens",
        "rival: the power law": "power-law",
        "rival: a": "uniform",
    }
    for start, name in rows.items():
        assert page.row("forward", start) == with_interval(result[name], "error", "fall")
    assert page.row("forward", "measured") == with_interval(result, "fall")
    low, high = result["gain_over_best_rival_interval"]
    gain = f"{result['gain_over_best_rival']:+.3f} [{low:+.3f}, {high:+.3f}] nats"
    assert gain in page.words("forward").replace("−", "-")
    for grouping, each in result["groups"].items():
        assert page.row("forward", f"{grouping} (") == _grouping(each)
    assert not any(word in page.words("forward") for word in WORDS.values())


def _grouping(each):
    skills = [with_interval(each[name], "skill") for name in _SKILLS if name in each]
    decision = [*with_interval(each, "gain_over_permuted"), each["p_value"]]
    return [*skills[0], *skills[1], *decision, *(n for skill in skills[2:] for n in skill)]


_SKILLS = ("events", "permuted", "full", "source", "own")


def test_transfer_holds_the_numbers_of_the_analysis(planted, page):
    (entry,) = analysis(planted.run, "transfer.json")["from"]
    for grouping, each in entry["absolute"].items():
        both = _grouping(each) + _grouping(entry["by loss"][grouping])
        assert page.row("transfer", f"{grouping} (") == both


def test_the_learning_order_stands_beside_baseline_predictors(planted, page):
    (entry,) = analysis(planted.run, "transfer.json")["from"]
    order = entry["order"]
    spearman = order["spearman"]
    for start, name in (
        ("learning time in", "learning time in the other run"),
        ("ln of the token's frequency", "unigram"),
        ("ln of the frequency of the token and", "bigram"),
        ("ln of the position", "position"),
        ("mean loss", "mean loss in the other run"),
    ):
        assert page.row("transfer", start) == with_interval(spearman[name], "value")
    assert page.row("transfer", "all but") == with_interval(order, "explained_by_plain")
    assert page.row("transfer", "with the") == with_interval(order, "explained_with_time")
    assert page.row("transfer", "gain") == with_interval(order, "gain")
    assert page.row("verdicts", ORDER) == with_interval(order, "partial")
    assert f"at least {1 / (entry['settings']['permutations'] + 1):.3f}" in page.words("transfer")
    assert f"the last at step {entry['source_steps'][-1]:,}" in page.words("transfer")


@pytest.mark.parametrize("passed", [True, False, None])
def test_the_verdict_on_the_learning_order_is_told_in_words(copied, passed):
    page = edited(copied, "transfer.json", lambda c: c["from"][0]["order"].update(passes=passed))
    assert WORDS[passed] in page.cells("verdicts", ORDER)
    assert f"beyond the baseline predictors: {WORDS[passed]}." in page.words("transfer")


def test_local_is_what_the_spectrum_calls_local(page):
    from megatron_tokscale.spectrum.evidence import locality as widths

    below = f"its whole interval is below {widths.LOCAL_BELOW}"
    assert below in page.cells("verdicts", "Tokens are learned")


def test_groupings_that_differ_are_counted(copied):
    def change(content):
        for n, each in enumerate(content["from"][0]["absolute"].values()):
            each["passes"] = n > 0

    page = edited(copied, "transfer.json", change)
    assert re.search(r"passed for (\d+) of", page.cells("verdicts", _question("time")))
    (entry,) = analysis(copied, "transfer.json")["from"]
    name, first = next(iter(entry["absolute"].items()))
    assert f"{name}: " in page.cells("verdicts", _question("time"))
    assert page.row("verdicts", _question("time")) == with_interval(first, "gain_over_permuted")


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        ([True, True], ">passed<"),
        ([True, False, None], ">passed for 1 of 3<"),
        ([False, None], ">not shown<"),
        ([None, None], ">undefined<"),
        ([], ">undefined<"),
    ],
)
def test_the_outcome_of_several_tests(passed, said):
    assert said in outcome(passed)


def test_an_alignment_and_an_order_that_are_undefined_say_why(copied):
    def change(content):
        (entry,) = content["from"]
        entry["by loss"] = {"undefined": "no <probe> inside"}
        entry["order"] = {"tokens": 7, "spearman": None, "passes": None}

    page = edited(copied, "transfer.json", change)
    assert "at the same mean loss: undefined: no <probe> inside." in page.words("transfer")
    assert "only 7 tokens have a learning time in both runs" in page.words("transfer")
    assert "only 7 tokens" in page.cells("verdicts", ORDER)
    assert "undefined" in page.cells("verdicts", _question("mean loss"))


def test_gains_without_an_alignment_have_no_figure():
    nothing = {"undefined": "too few"}
    assert not gains_figure("transfer-1", {"source": "a", "absolute": nothing, "by loss": nothing})


def test_runs_of_one_name_are_told_apart(copied):
    def change(content):
        content["from"].append(content["from"][0] | {"source_run_id": "fedcba9876543210"})

    page = edited(copied, "transfer.json", change)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"transfer-1", "transfer-2"} <= set(ids)
    assert "(id fedcba9876543210)" in page.words("transfer")


def test_names_of_other_runs_are_escaped(html, page):
    assert "<b>&$" not in html
    assert f"Learning times of {OTHER} (id " in page.words("transfer")


def test_without_transfer_there_is_no_section(copied):
    (copied.analysis / "transfer.json").unlink()
    page = Page(report_run(copied, n_tokens=0).read_text())
    assert not page.words("transfer")
    assert "Learning times of" not in page.words("verdicts")
    assert "#transfer" not in [value for _, name, value in page.attributes if name == "href"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(schema_version=0),
        lambda content: content["from"][0].update(time="tokens"),
        lambda content: content["from"][0].update(probe_fingerprint="0" * 16),
        lambda content: content["from"][0]["steps"].pop(),
        lambda content: content["from"][0].pop("steps"),
    ],
)
def test_a_transfer_of_something_else_is_refused(copied, change):
    with pytest.raises(TokscaleError, match=r"transfer.json .*remove it, and test") as error:
        edited(copied, "transfer.json", change)
    assert "\n" not in str(error.value)


def test_nothing_undefined_leaks_into_the_page(html):
    assert not re.search(_LEAKS, html)


def test_without_resamples_there_are_numbers_but_no_verdicts(copied):
    (copied.analysis / "transfer.json").unlink()
    spectrum_run(copied, n_resamples=1, null_tokens=100)
    html = report_run(copied, n_tokens=0).read_text()
    assert not re.search(_LEAKS, html)
    assert 'class="interval"' not in html
    page = Page(html)
    widths = analysis(copied, "reconstruction.json")["widths"]
    assert page.row("verdicts", "Tokens are learned") == [widths["median_over_null"]]
    assert "undefined" in page.cells("verdicts", "Tokens are learned")


def test_a_run_of_one_dataset(copied):
    tokens = copied.probe_set
    single = dataclasses.replace(tokens, datasets=("prose",), dataset_BS=0 * tokens.dataset_BS)
    single.save(copied.path / "tokscale" / "probe.safetensors")
    (copied.analysis / "transfer.json").unlink()
    run = dataclasses.replace(copied, probe_set=single)
    fit_run(run)
    spectrum_run(run, null_tokens=100)
    page = Page(report_run(run, n_tokens=0).read_text())
    assert not page.row("forward", "dataset (") and page.row("forward", "document (")
    assert page.row("loss", "prose") == page.row("loss", "all probe tokens")

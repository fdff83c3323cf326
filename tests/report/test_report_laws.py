"""The section on laws: the numbers of laws.json, its verdicts in words, undefined parts."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from analyses import edit
from html_page import Page, numbers_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.laws import laws_run
from megatron_tokscale.report import report_run
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.page import with_verdicts
from megatron_tokscale.report.sections.laws import laws_section
from megatron_tokscale.report.sections.laws.power_laws import doubt
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.laws import (
    ChinchillaForecast,
    ChinchillaLaw,
    DatasetPowerLaw,
    ForecastScore,
    LossPowerLaw,
    MultiPowerLaw,
    PowerLaw,
    ScheduleForecast,
    SeveralRuns,
    TailExponent,
    TailMinusLaw,
)
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.store import Run

OTHER = "other <b>&$x_1$"
HOSTILE = "<script>alert(1)</script> & "
CHINCHILLA = ChinchillaLaw(
    floor=Estimate(1.7, 1.5, 1.9),
    A=Estimate(406.4, 300.0, 500.0),
    B=Estimate(410.7, 310.0, 510.0),
    alpha=Estimate(0.34, 0.3, 0.4),
    beta=Estimate(0.28, 0.2, 0.35),
    a=Estimate(0.45),
    r2=0.987,
    n_runs=9,
    converged=False,
)
MULTI_POWER = ScheduleForecast(
    fitted_on=(OTHER, "short"),
    held_out="long",
    law=MultiPowerLaw(*[1.0] * 8, n_points=9, converged=False),
    score=ForecastScore(
        r2=0.912,
        mae=0.0123,
        rmse=0.02,
        mean_relative=Estimate(0.004, 0.003, 0.005),
        worst_relative=0.0,
    ),
    last_loss=2.25,
    last_loss_predicted=2.375,
)
FORECAST = ChinchillaForecast(
    law=CHINCHILLA,
    names=("largest",),
    loss_S=(2.5,),
    predicted_S=(2.25,),
    error=Estimate(-0.1, -0.12, -0.08),
)
LAW = PowerLaw(
    floor=Estimate(2.0),
    scale=Estimate(3.0),
    exponent=Estimate(0.5),
    exponent_se=0.1,
    r2=0.99,
    autocorrelation=0.0,
    n_points=20,
    from_time=100.0,
    to_time=1000.0,
    converged=True,
)


def read(run):
    return ReportInputs.read(run, n_tokens=0, seed=0)


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("laws") / "run"
    shutil.copytree(planted.run.path, folder)
    run = Run.open(folder)
    laws_run(run, [Run.open(planted.run.path.parent / OTHER)], n_resamples=10)
    return run


@pytest.fixture(scope="module")
def inputs(run):
    return read(run)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return Page(report_run(run, n_tokens=0, out=out).read_text())


@pytest.fixture
def edited(inputs):
    """Return a function: new fields of the laws -> the section and the verdicts with them."""

    def make(**change):
        changed = dataclasses.replace(inputs, laws=dataclasses.replace(inputs.laws, **change))
        html = "".join(each.html for each in with_verdicts(laws_section(changed), "documents"))
        assert "<script" not in html and "<b>" not in html
        return Page(html)

    return make


def law_numbers(found):
    """Return the numbers that the table shows of a law."""
    law = found.law
    return [
        *numbers_of(law.floor, found.floor_documents, law.exponent, found.exponent_documents),
        law.r2,
        law.n_points,
    ]


def test_power_laws_hold_the_numbers_of_the_analysis(inputs, page):
    laws = inputs.laws
    laws_by_row = {"all probe tokens": laws.overall}
    laws_by_row |= {each.name: each.power_law for each in laws.datasets}
    laws_by_row |= {f"all, from {each.start:.3g}": each.power_law for each in laws.other_starts}
    defined = {name: law for name, law in laws_by_row.items() if not isinstance(law, Undefined)}
    assert len(defined) >= 3
    for name, law in defined.items():
        shown = page.row("laws", name)
        assert shown[: len(law_numbers(law))] == law_numbers(law)


def test_every_explanation_is_shown_with_its_verdict(inputs, page):
    for each in inputs.laws.explanations:
        cells = page.cells("laws", each.explanation)
        assert each.claim in cells and each.verdict.value in cells
        assert each.measured == "-" or each.measured in cells


def test_zero_sum_learning_holds_the_numbers_of_the_analysis(inputs, page):
    (pair,) = (each for each in inputs.laws.zero_sum.pairs if each.from_step == 1)
    shown = page.row("laws", "1 to 2")
    assert shown == [each.value for each in (pair.movement, pair.change, pair.interference)]


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_verdict_on_a_claim_is_shown_in_words(edited, inputs, verdict):
    row = dataclasses.replace(inputs.laws.explanations[-1], verdict=verdict, claim="odd")
    page = edited(explanations=(row,))
    assert verdict.value in page.cells("laws", "")
    decided = verdict is not Verdict.UNDECIDED
    assert ("odd" in page.words("verdicts")) == decided
    if decided:
        assert verdict.value in page.cells("verdicts", _explanation(page))


def _explanation(page):
    return next(name for s, name in page.row_names() if s == "verdicts" and name.endswith("odd"))


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_tail_beside_the_law(edited, inputs, verdict):
    exponent = Estimate(0.5, 0.25, 0.75)
    tail = TailExponent(exponent, (), float(np.log(200)), float(np.log(1000)), share=0.375)
    beside = LossPowerLaw(LAW, LAW.floor, LAW.exponent, ())
    both = TailMinusLaw(Estimate(-0.125, -0.5, 0.25), se=0.2, law=beside)
    row = dataclasses.replace(
        inputs.laws.explanations[0], explanation="learning-time spectrum", verdict=verdict
    )
    said = verdict.value
    page = edited(tail=tail, tail_minus_law=both, explanations=(row,))
    assert "exponent 0.500 [0.250, 0.750] from 200 to 1k steps" in page.words("laws")
    assert f"exponent of the loss: {said}." in page.words("laws")
    assert said in page.cells("verdicts", "The tail")
    assert page.row("verdicts", "The tail") == [-0.125, -0.5, 0.25]


def test_undefined_parts_say_why(edited):
    parts = ("overall", "tail", "tail_minus_law", "zero_sum")
    everywhere = edited(**{part: Undefined(f"{HOSTILE}{part}") for part in parts})
    for part in ("overall", "tail", "zero_sum"):
        assert f"{HOSTILE}{part}" in everywhere.words("laws")
    assert f"{HOSTILE}tail_minus_law" in everywhere.cells("verdicts", "The tail")
    difference = edited(tail_minus_law=Undefined(HOSTILE))
    assert f"undecided: {HOSTILE}" in difference.words("laws")


def test_without_any_law_there_is_no_figure_of_it(edited, inputs):
    few = Undefined("too few")
    names = [each.name for each in inputs.laws.datasets]
    datasets = tuple(DatasetPowerLaw(name, Undefined(HOSTILE)) for name in names)
    page = edited(overall=few, tail_minus_law=few, datasets=datasets)
    assert HOSTILE in page.cells("laws", "prose")
    labels = [value for tag, name, value in page.attributes if name == "aria-label"]
    assert not any("floor" in label for label in labels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"autocorrelation": 0.71, "converged": True}, "residuals drift (ρ 0.71): no power law"),
        ({"autocorrelation": 0.69, "converged": True}, ""),
        ({"autocorrelation": 0.0, "converged": False}, "not converged"),
    ],
)
def test_a_doubtful_law_says_so(change, said):
    law = dataclasses.replace(LAW, **change)
    assert "".join(text for _, text in Page(doubt(law)).texts) == said


def test_laws_over_runs(edited, inputs):
    several = inputs.laws.several
    page = edited(several=SeveralRuns(several.runs, CHINCHILLA, FORECAST, (MULTI_POWER,)))
    for each in several.runs:
        assert page.row("laws", each.name) == [each.tokens, each.loss]
    assert page.row("laws", "β, of") == [0.28, 0.2, 0.35]
    assert page.row("laws", "a = ") == [0.45]
    assert page.words("laws").count("has not converged") == 2
    assert f"learning rates of {OTHER}, short, and predicts those of long" in page.words("laws")
    assert page.row("laws", "R² of") == [0.912]
    assert page.row("laws", "Last loss") == [2.375, 2.25]
    assert page.row("laws", "Mean of error") == [0.004, 0.003, 0.005]
    assert "10.00%" in page.cells("laws", "largest")


def test_laws_over_runs_that_are_undefined_say_why(edited, inputs):
    names = ("chinchilla", "forecast", "multi_power")
    reasons = [Undefined(HOSTILE + name) for name in names]
    page = edited(several=SeveralRuns(inputs.laws.several.runs, *reasons))
    assert f"{HOSTILE}chinchilla" in page.words("laws")
    assert f"{HOSTILE}forecast" in page.words("laws")
    assert f"{HOSTILE}multi_power" in page.words("laws")


def test_laws_of_one_run_have_no_table_of_runs(edited):
    assert "Laws over runs" not in edited(several=None).words("laws")


def test_without_laws_there_is_no_section(inputs):
    without = dataclasses.replace(inputs, laws=None)
    assert laws_section(without) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: content.update(schema_version=1), "older schema"),
        (lambda content: content["fit"].update(time="tokens"), "another time"),
        (lambda content: content["fit"].update(probe_fingerprint="0" * 16), "other probes"),
        (lambda content: content["fit"]["steps"].pop(), "other probes"),
    ],
)
def test_laws_of_other_fits_or_an_older_schema_are_refused(run, tmp_path, change, what):
    shutil.copytree(run.path, tmp_path / "run")
    path = tmp_path / "run" / "analysis" / "laws.json"
    content = json.loads(path.read_text())
    change(content)
    edit(path, **content)
    again = rf"laws\.json is of .*{what}.* run `megatron-tokscale laws .*` again"
    with pytest.raises(TokscaleError) as error:
        read(Run.open(tmp_path / "run"))
    assert error.match(again.replace("is of .*", "is of (an )?"))
    assert "\n" not in str(error.value)


def test_laws_of_a_newer_version_are_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    edit(tmp_path / "run" / "analysis" / "laws.json", schema_version=99)
    with pytest.raises(TokscaleError, match="schema version 99"):
        read(Run.open(tmp_path / "run"))

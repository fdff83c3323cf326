"""The section on laws: the numbers of laws.json, its verdicts in words, undefined parts."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from html_page import Page, with_interval

from megatron_tokscale.core.checked import write_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.laws import laws_run
from megatron_tokscale.report import report_run
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.page import with_verdicts
from megatron_tokscale.report.sections.laws import doubt, laws_section
from megatron_tokscale.store import Run

OTHER = "other <b>&$x_1$"
HOSTILE = "<script>alert(1)</script> & "
HOLDS = {True: "holds", False: "does not hold", None: "undecided"}
CHINCHILLA = {
    **{"floor": 1.7, "floor_interval": [1.5, 1.9], "A": 406.4, "A_interval": [300.0, 500.0]},
    **{"alpha": 0.34, "alpha_interval": [0.3, 0.4], "B": 410.7, "B_interval": [310.0, 510.0]},
    **{"beta": 0.28, "beta_interval": [0.2, 0.35], "a": 0.45, "a_interval": None},
    **{"r2": 0.987, "n_runs": 9, "converged": False},
}
MULTI_POWER = {
    "fitted_on": [OTHER, "short"],
    "held_out": "long",
    "law": {"converged": False},
    "score": {"r2": 0.912, "mae": 0.0123},
    "last_loss": 2.25,
    "last_loss_predicted": 2.375,
}


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
    """A function: change -> the section and the verdicts after it was made to laws.json."""

    def make(change):
        content = copy.deepcopy(inputs.laws)
        change(content)
        changed = dataclasses.replace(inputs, laws=content)
        html = "".join(each.html for each in with_verdicts(laws_section(changed)))
        assert "<script" not in html and "<b>" not in html
        return Page(html)

    return make


def law_numbers(law):
    """What the table shows of a law."""
    return [
        *with_interval(law, "floor"),
        *with_interval(law, "floor_documents"),
        *with_interval(law, "exponent"),
        *with_interval(law, "exponent_documents"),
        law["r2"],
        law["n_points"],
    ]


def test_power_laws_hold_the_numbers_of_the_analysis(inputs, page):
    content = inputs.laws
    laws_by_row = {"all probe tokens": content["overall"]}
    laws_by_row |= {each["name"]: each for each in content["datasets"]}
    laws_by_row |= {f"all, from {each['from']:.3g}": each for each in content["other_starts"]}
    defined = {name: law for name, law in laws_by_row.items() if "undefined" not in law}
    assert len(defined) >= 3
    for name, law in defined.items():
        shown = page.row("laws", name)
        assert shown[: len(law_numbers(law))] == law_numbers(law)


def test_every_explanation_is_told_with_its_verdict(inputs, page):
    for each in inputs.laws["explanations"]:
        cells = page.cells("laws", each["explanation"])
        assert each["claim"] in cells and HOLDS[each["holds"]] in cells
        assert each["measured"] == "-" or each["measured"] in cells


def test_zero_sum_learning_holds_the_numbers_of_the_analysis(inputs, page):
    sums = inputs.laws["zero_sum"]
    shown = page.row("laws", "1 to 2")
    k = sums["from_step"].index(1.0)
    assert shown == [sums[name][k] for name in ("movement", "change", "interference")]


@pytest.mark.parametrize("holds", [True, False, None])
def test_holds_is_told_in_words(edited, holds):
    def change(content):
        content["explanations"] = [content["explanations"][-1] | {"holds": holds, "claim": "odd"}]

    page = edited(change)
    assert HOLDS[holds] in page.cells("laws", "")
    decided = holds is not None
    assert ("odd" in page.words("verdicts")) == decided
    if decided:
        assert HOLDS[holds] in page.cells("verdicts", _explanation(page))


def _explanation(page):
    return next(name for s, name in page.row_names() if s == "verdicts" and name.endswith("odd"))


@pytest.mark.parametrize("agree", [True, False])
def test_the_tail_beside_the_law(edited, agree):
    tail = {
        **{"exponent": 0.5, "exponent_interval": [0.25, 0.75], "share": 0.375},
        **{"from_x": float(np.log(200)), "to_x": float(np.log(1000))},
    }
    both = {"difference": -0.125, "difference_interval": [-0.5, 0.25], "agree": agree}
    page = edited(lambda c: c.update(tail=tail, tail_minus_law=both))
    assert "exponent 0.500 [0.250, 0.750] from 200 to 1k steps" in page.words("laws")
    assert f"exponent of the loss: {HOLDS[agree]}." in page.words("laws")
    assert HOLDS[agree] in page.cells("verdicts", "The tail")
    assert page.row("verdicts", "The tail") == [-0.125, -0.5, 0.25]


def test_undefined_parts_say_why(edited):
    parts = ("overall", "tail", "tail_minus_law", "zero_sum")
    everywhere = edited(lambda c: c.update({p: {"undefined": f"{HOSTILE}{p}"} for p in parts}))
    for part in ("overall", "tail", "zero_sum"):
        assert f"{HOSTILE}{part}" in everywhere.words("laws")
    assert f"{HOSTILE}tail_minus_law" in everywhere.cells("verdicts", "The tail")
    difference = edited(lambda c: c.update(tail_minus_law={"undefined": HOSTILE}))
    assert f"undecided: {HOSTILE}" in difference.words("laws")


def test_without_any_law_there_is_no_figure_of_it(edited):
    def change(content):
        content["overall"] = content["tail_minus_law"] = {"undefined": "too few"}
        content["datasets"] = [
            {"name": each["name"], "undefined": HOSTILE} for each in content["datasets"]
        ]

    page = edited(change)
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
    assert "".join(text for _, text in Page(doubt(change)).texts) == said


def test_laws_over_runs(edited, inputs):
    def change(content):
        content["several"] |= {"chinchilla": CHINCHILLA, "multi_power": MULTI_POWER}

    page = edited(change)
    for each in inputs.laws["several"]["runs"]:
        assert page.row("laws", each["name"]) == [each["tokens"], each["loss"]]
    assert page.row("laws", "β, of") == [0.28, 0.2, 0.35]
    assert page.row("laws", "a = ") == [0.45]
    assert page.words("laws").count("has not converged") == 2
    assert f"learning rates of {OTHER}, short, and predicts those of long" in page.words("laws")
    assert page.row("laws", "R² of") == [0.912]
    assert page.row("laws", "Last loss") == [2.375, 2.25]


def test_laws_over_runs_that_are_undefined_say_why(edited):
    reasons = {name: {"undefined": HOSTILE + name} for name in ("chinchilla", "multi_power")}
    page = edited(lambda content: content["several"].update(reasons))
    assert f"{HOSTILE}chinchilla" in page.words("laws")
    assert f"{HOSTILE}multi_power" in page.words("laws")


def test_laws_of_one_run_have_no_table_of_runs(edited):
    assert "Laws over runs" not in edited(lambda content: content.pop("several")).words("laws")


def test_without_laws_there_is_no_section(inputs):
    without = dataclasses.replace(inputs, laws=None)
    assert laws_section(without) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: content.update(schema_version=1), "older schema"),
        (lambda content: content.update(time="tokens"), "another time"),
        (lambda content: content.update(probe_fingerprint="0" * 16), "other probes"),
        (lambda content: content["steps"].pop(), "other probes"),
    ],
)
def test_laws_of_something_else_are_refused(run, tmp_path, change, what):
    shutil.copytree(run.path, tmp_path / "run")
    path = tmp_path / "run" / "analysis" / "laws.json"
    content = json.loads(path.read_text())
    change(content)
    write_result(path, content)
    again = rf"laws\.json is of .*{what}.* run `megatron-tokscale laws .*` again"
    with pytest.raises(TokscaleError) as error:
        read(Run.open(tmp_path / "run"))
    assert error.match(again.replace("is of .*", "is of (an )?"))
    assert "\n" not in str(error.value)


def test_laws_of_a_newer_version_are_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    path = tmp_path / "run" / "analysis" / "laws.json"
    write_result(path, json.loads(path.read_text()) | {"schema_version": 99})
    with pytest.raises(TokscaleError, match="schema version 99"):
        read(Run.open(tmp_path / "run"))

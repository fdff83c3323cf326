"""Sections on the axis D: the numbers of axis.json; refusals of axes of other tokens."""

import dataclasses
import shutil

import numpy as np
import pytest
from analyses import edit
from html_page import Page, numbers_of
from report_losses import planted_losses
from runs import write_run

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.report import report_run
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.page import with_verdicts
from megatron_tokscale.report.sections.axes import axis_sections
from megatron_tokscale.results import read_axis
from megatron_tokscale.results.axis import AcrossAxes
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.spectrum import axis_run

HOSTILE = "<script>$x_1$</script>"


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    """Return the axis of five runs of growing length, tested with the planted run's times."""
    path = tmp_path_factory.mktemp("axis")
    loss_NK = planted_losses(planted.run.n_tokens, [8, 32, 128, 512, 2000])
    runs = [
        write_run(
            path / f"{steps}{HOSTILE.replace('/', '')}",
            [0, steps],
            np.stack([np.full(len(loss_NK), 9.0), loss_NK[:, k]], axis=1),
            planted.run.probe_set,
        )
        for k, steps in enumerate([8, 32, 128, 512, 2000])
    ]
    axis_run(runs, "D", path / "D", source=planted.run, n_resamples=10)
    return path / "D"


@pytest.fixture(scope="module")
def axis(planted, folder):
    return read_axis(planted.run, folder).summary


@pytest.fixture(scope="module")
def html(planted, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return report_run(planted.run, axes=[folder, folder], n_tokens=0, out=out).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture
def edited(planted, folder):
    """Return a function: new fields of the axis -> the section and the verdicts with them."""
    inputs = ReportInputs.read(planted.run, axes=[folder], n_tokens=0, seed=0)

    def make(**change):
        (axis,) = inputs.axes
        axis = dataclasses.replace(axis, summary=dataclasses.replace(axis.summary, **change))
        changed = dataclasses.replace(inputs, axes=(axis,))
        html = "".join(each.html for each in with_verdicts(axis_sections(changed)))
        assert "<script" not in html
        return Page(html)

    return make


def test_runs_are_those_of_the_axis(axis, page):
    assert len(axis.runs) == 5
    falls = [[], *(numbers_of(fall) for fall in axis.falls)]
    for each, fall in zip(axis.runs, falls, strict=True):
        assert page.row("axis-1", each.name) == [each.size, each.loss, *fall]


def test_skills_across_the_axes_are_those_of_the_axis(axis, page):
    groups = axis.across.groups
    for grouping, each in groups.items():
        skills = numbers_of(each.events, each.permuted)
        assert page.row("axis-1", f"{grouping} (")[: len(skills)] == skills
    gain = numbers_of(groups["dataset"].gain_over_permuted)
    claim = "Learning times along T of run predict gains along D: dataset"
    assert page.row("verdicts", claim) == 2 * gain  # the same axis twice


def test_each_axis_has_an_anchor_of_its_own(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"axis-1", "axis-2"} <= set(ids)
    targets = [value for _, name, value in page.attributes if name == "href"]
    assert "#axis-1" in targets and "#axis-2" in targets


def test_the_axis_is_labelled_with_the_sizes_of_the_runs(axis, page):
    labels = [text.strip() for tags, text in page.texts if "svg" in tags]
    assert "training tokens" in labels
    assert axis.runs[0].size == 8 * 4 * 32 and "1.02k" in labels


def test_names_of_runs_are_escaped(html, page):
    assert "<script" not in html
    assert "<script>$x_1$<script>" in page.words("axis-1")


def test_an_axis_that_was_not_tested_across_has_no_verdict_on_it(edited):
    page = edited(across=None)
    assert "were not tested on this axis" in page.words("axis-1")
    assert "Learning times along T" not in page.words("verdicts")


def test_an_undefined_test_across_axes_says_why(edited):
    page = edited(across=AcrossAxes(HOSTILE, "step", Undefined(f"none inside {HOSTILE}")))
    assert f"undefined: none inside {HOSTILE}." in page.words("axis-1")
    cells = page.cells("verdicts", f"Learning times along T of {HOSTILE}")
    assert "undecided" in cells and f"none inside {HOSTILE}" in cells


def test_folders_are_given_on_the_command_line(planted, folder, tmp_path, capsys):
    out = tmp_path / "report.html"
    axes = ["--axis-dir", str(folder), str(folder)]
    main(["report", str(planted.run.path), *axes, "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert Page(out.read_text()).words("axis-2").startswith("Axis D: training tokens")


def changed(folder, tmp_path, **change):
    shutil.copytree(folder, tmp_path / "axis")
    edit(tmp_path / "axis" / "axis.json", **change)
    return tmp_path / "axis"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probe_fingerprint": "0" * 16}, "watch other tokens than"),
        ({"schema_version": 0}, "older schema; run `megatron-tokscale spectrum --axis"),
        ({"schema_version": 99}, "schema version 99"),
    ],
)
def test_an_axis_of_other_tokens_or_schema_is_refused(planted, folder, tmp_path, change, said):
    with pytest.raises(TokscaleError, match=said) as error:
        report_run(planted.run, axes=[changed(folder, tmp_path, **change)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["axis.json", "axis.npz"])
def test_a_folder_without_an_axis_is_refused(planted, folder, tmp_path, name):
    other = changed(folder, tmp_path)
    (other / name).unlink()
    with pytest.raises(TokscaleError, match=name) as error:
        report_run(planted.run, axes=[other])
    assert "\n" not in str(error.value)

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
from megatron_tokscale.results.axis import Spread
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.spectrum import axis_run

HOSTILE = "<script>$x_1$</script>"


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    """Return the axis of five runs of growing length, with the planted run's learning times."""
    path = tmp_path_factory.mktemp("axis")
    runs = []
    for k, last in enumerate([64, 128, 256, 512, 2000]):
        steps = np.unique(np.geomspace(1, last, 14).astype(int))
        loss_NK = planted_losses(planted.run.n_tokens, steps, delay=0.05 * k)
        name = f"{last}{HOSTILE.replace('/', '')}"
        runs.append(write_run(path / name, steps, loss_NK, planted.run.probe_set))
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
        html = "".join(each.html for each in with_verdicts(axis_sections(changed), "documents"))
        assert "<script" not in html
        return Page(html)

    return make


def test_runs_are_those_of_the_axis(axis, page):
    assert len(axis.runs) == 5
    for each in axis.runs:
        fall = [] if each.fall is None else numbers_of(each.fall)
        cells = [each.size, each.loss, *fall]
        assert page.row("axis-1", each.name)[: len(cells)] == cells


def test_the_shift_is_that_of_the_axis(axis, page):
    shift = axis.shift
    rows = {
        "kappa: shift per unit of ln size": shift.kappa,
        "floor per unit of ln size (": shift.floor,
    }
    for name, spread in rows.items():
        ends = [spread.documents.low, spread.documents.high, spread.runs.low, spread.runs.high]
        assert page.row("axis-1", name) == [*numbers_of(spread.both), *ends]
    errors = page.words("axis-1")
    assert f"{shift.errors.shift_and_floor:.4f} nats; without a floor" in errors


def test_groups_and_their_gains_are_those_of_the_axis(axis, page):
    for name, each in axis.shift.groups.items():
        found = page.row("axis-1", name)
        assert found == [*numbers_of(each.skill.both), each.error, each.null_error]
    assert "learning-time decile" in axis.shift.groups


def test_the_check_of_the_clock_is_that_of_the_axis(axis, page):
    check = axis.same_clock
    assert len(check.runs) == 4
    assert "The axis D as the axis T in the summed learning rate" in page.words("axis-1")
    assert "branches off at step" in page.words("axis-1")


def test_verdicts_are_those_of_the_axis(axis, page):
    tests = {
        "Axis D: the last losses of left-out runs": axis.shift.left_out_test,
        "Axis D: on the clock of the runs": axis.same_clock.test,
    }
    for name, test in tests.items():
        assert str(test.verdict) in page.cells("verdicts", name)


def test_each_axis_has_an_anchor_of_its_own(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"axis-1", "axis-2"} <= set(ids)
    targets = [value for _, name, value in page.attributes if name == "href"]
    assert "#axis-1" in targets and "#axis-2" in targets


def test_the_figure_is_labelled_with_the_clock(axis, page):
    labels = [text.strip() for tags, text in page.texts if "svg" in tags]
    assert {"summed learning rate", "summed learning rate, moved"} <= set(labels)
    assert axis.runs[0].size == 64 * 4 * 32


def test_names_of_runs_are_escaped(html, page):
    assert "<script" not in html
    assert "<script>$x_1$<script>" in page.words("axis-1")


def test_the_gain_is_divided_on_the_axis_of_sizes_alone(axis, edited, page):
    assert "share of the same tokens earlier" not in page.words("axis-1")
    share = Spread(Estimate(0.6, 0.5, 0.7), Estimate(0.6, 0.4, 0.7), Estimate(0.6, 0.3, 0.8))
    shift = dataclasses.replace(axis.shift, share=share)
    sizes = edited(axis="M", size="parameters", same_clock=None, shift=shift)
    ends = [share.documents.low, share.documents.high, share.runs.low, share.runs.high]
    found = sizes.row("axis-1", "share of the same tokens earlier")
    assert found == [*numbers_of(share.both), *ends]
    assert sizes.cells("verdicts", "Axis M: the gain of size is the same tokens")


def test_an_undefined_shift_says_why(edited):
    page = edited(shift=Undefined(f"none inside {HOSTILE}"), same_clock=Undefined(HOSTILE))
    assert f"undefined: none inside {HOSTILE}." in page.words("axis-1")
    assert "left-out runs" not in page.words("verdicts")


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

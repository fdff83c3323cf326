"""The page of a comparison: its numbers are those of the result, and names and text stay text."""

import math
from dataclasses import replace

import pytest
from html_page import Page, numbers_of
from made_comparison import HOSTILE, made_comparison

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.report import report_comparison
from megatron_tokscale.report.comparison_page import render_comparison
from megatron_tokscale.report.html import TITLE
from megatron_tokscale.results.comparison import read_comparison
from megatron_tokscale.results.estimate import Undefined


@pytest.fixture(scope="module")
def found():
    return made_comparison()


@pytest.fixture(scope="module")
def html(found):
    return render_comparison(found)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def row_of(group):
    """The numbers of a group's row, in the order of its cells."""
    changes = [
        value
        for change in (group.gained, group.lost)
        for value in (change.called, change.tokens, change.seed)
        if not isinstance(value, Undefined)
    ]
    shift = numbers_of(group.learning_times.factor, group.lower)
    return [group.tokens, group.learned_a, group.learned_b, *changes, *shift]


def test_each_group_has_its_numbers(found, page):
    for group in (found.overall, *found.groups["dataset"]):
        assert page.row("changed", group.name) == row_of(group)
    rows = [
        row for name, of in found.groups.items() if name != "dataset" for row in map(row_of, of)
    ]
    shown = [v for (section, _), row in page.rows.items() if section == "groups" for v in row]
    assert sorted(shown) == sorted(value for row in rows for value in row)


def test_factors_stand_beside_those_of_further_seeds(found, page):
    for group in (found.overall, *found.groups["dataset"]):
        for name, sooner in (
            ("learning times", group.learning_times),
            ("late loss", group.late_loss),
        ):
            expected = [sooner.tokens, *numbers_of(sooner.factor), *sooner.seeds]
            expected += numbers_of(sooner.recipe)
            assert page.row("sooner", f"{group.name}: {name}") == expected


def test_the_headline_has_loss_factor_and_tokens(found, page):
    words = page.words("changed")
    assert "0.200 [0.100, 0.300] nats lower than that of A" in words
    assert "B reaches the late loss of A 1.25 [1.15, 1.35] times sooner" in words
    assert "B gained 40 tokens and lost 7 tokens, of 2,000" in words
    assert "lower by +0.010, −0.020 nats, 0.99, 1.02 times sooner" in words
    assert "Over documents and seeds, B is 1.25 [1.15, 1.35] times sooner." in words


def test_a_factor_that_is_not_determined_says_why(found):
    wide = Undefined("its interval is wider than a factor of 100")
    late_loss = replace(found.overall.late_loss, recipe=wide)
    page = Page(
        render_comparison(replace(found, overall=replace(found.overall, late_loss=late_loss)))
    )
    assert f"not determined: {wide.undefined}" in page.cells("sooner", "all: late loss")
    assert page.words("sooner").count("not determined") == 1


def test_a_worse_run_is_called_later_and_not_sooner():
    words = Page(render_comparison(made_comparison(lower=-0.3, factor=0.8))).words("changed")
    assert "0.300 [0.200, 0.400] nats higher than that of A" in words
    assert f"A reaches the late loss of B 1.25 [{1 / 0.9:.2f}, {1 / 0.7:.2f}] times sooner" in words


def test_without_a_second_seed_every_call_is_undecided():
    found = made_comparison(seeds=False)
    page = Page(render_comparison(found))
    assert page.cells("changed", "all").count("undecided") == 2
    assert "undecided without a second seed" in page.words("changed")
    assert "B gained" not in page.words("changed")
    assert page.row("changed", "all") == row_of(found.overall)
    assert "candidates" in page.words("gained")


def test_the_spectra_and_their_test_are_drawn(found, page):
    values = [float(v) for tag, name, v in page.attributes if (tag, name) == ("data", "value")]
    spectra = found.spectra
    expected = {*numbers_of(spectra.distance), *spectra.seeds, spectra.p_documents, spectra.level}
    assert expected <= set(values)
    assert "differ. Their distance" in page.words("spectra")
    undefined = Page(render_comparison(made_comparison(spectra=False)))
    assert "undefined: no event is learned" in undefined.words("spectra")


def test_examples_show_both_runs_in_context(found, page):
    words = page.words("gained")
    assert "A: to come, loss 5.25" in words and "B: learned, loss 1.12, learned at 640" in words
    assert "z = 8.5, q = 0.003" in words and "token 6" in words
    assert words.count("learned at") == sum(math.isfinite(t.time_b) for t in found.gained)
    assert "No token is lost." in page.words("lost")


def test_names_notes_and_text_are_escaped(html, page):
    assert "<script" not in html
    assert HOSTILE in [text for tags, text in page.texts if tags[-1:] == ("mark",)]
    assert any(HOSTILE in text for tags, text in page.texts if tags[-1:] == ("p",))


def test_the_page_refers_to_nothing_outside_itself(html, page):
    assert "://" not in html and "@import" not in html
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_equal_results_give_equal_pages_in_their_place(found, html, tmp_path):
    out = tmp_path / "page.html"
    assert report_comparison(found, out) == out
    assert report_comparison(found, out).read_text() == html


@pytest.mark.parametrize("mine", ["notes", f"<title>{TITLE}: my-run</title>"])
def test_notes_and_reports_are_not_replaced(found, tmp_path, mine):
    taken = tmp_path / "taken.html"
    taken.write_text(mine)
    with pytest.raises(TokscaleError, match="is no page of this verb"):
        report_comparison(found, taken)
    assert taken.read_text() == mine


def test_the_verb_writes_the_page_of_its_comparison(planted, second_run, tmp_path, capsys):
    other = second_run(0.4)
    fit_run(other)
    out = tmp_path / "page.html"
    runs = [str(planted.run.path), str(other.path)]
    main(["compare", *runs, "--out", str(tmp_path / "found"), "--page", str(out)])
    assert capsys.readouterr().out.rstrip().endswith(str(out))
    (path,) = (tmp_path / "found").rglob("compare.json")
    assert out.read_text() == render_comparison(read_comparison(path))


def test_a_page_in_a_taken_place_stops_the_verb_before_it_writes(planted, tmp_path, capsys):
    taken = tmp_path / "notes.txt"
    taken.write_text("mine")
    run = str(planted.run.path)
    out = tmp_path / "found"
    with pytest.raises(SystemExit) as stopped:
        main(["compare", run, run, "--out", str(out), "--page", str(taken)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "is no page of this verb" in error and "choose another --page" in error
    assert taken.read_text() == "mine" and not out.exists()

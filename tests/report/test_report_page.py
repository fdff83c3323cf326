"""The page as a browser gets it: self-contained, escaped, with the numbers of the analysis.

Shapes: N tokens.
"""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from analyses import edit
from html_page import Page, numbers_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import SigmoidFits, TokenClass, fit_run
from megatron_tokscale.report import report_run
from megatron_tokscale.results import SpectrumResult, read_fit
from megatron_tokscale.results.evidence import RECONSTRUCTIONS
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.store import Run, WatchedTokens
from megatron_tokscale.store.losses import losses_name

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def html(planted):
    return report_run(planted.run, tokenizer=planted.tokenizer).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def evidence(planted):
    return SpectrumResult.open(planted.run).evidence


def content_of(run, name):
    return json.loads((run.paths.analysis / name).read_text())


def test_page_refers_to_nothing_outside_itself(html, page):
    assert "://" not in html  # a watched token may be "https:"
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        assert name not in ("src", "srcset", "action", "data") and not name.startswith("on")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
        if value and "url(" in value:
            assert value.count("url(") == value.count("url(#")
    assert "@import" not in html and "url(" not in html.split("</style>")[0]


def test_every_link_has_its_target_and_every_id_is_unique(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert targets <= set(ids)


def test_every_picture_says_what_it_shows(page):
    pictures = [name for tag, name, _ in page.attributes if tag == "svg"]
    assert pictures.count("aria-label") == page.tags.count("svg") > 36


def test_text_of_the_corpus_is_escaped(planted, tmp_path):
    out = report_run(
        planted.run, tokenizer=planted.tokenizer, n_tokens=2000, out=tmp_path / "all.html"
    )
    html = out.read_text()
    assert "<script" not in html
    page = Page(html)
    assert HOSTILE in [text for tags, text in page.texts if tags[-1:] == ("mark",)]


@pytest.mark.parametrize("name", ["full", "kernel", "spectrum"])
def test_scores_are_those_of_the_analysis(evidence, page, name):
    same, other = evidence.same_tokens[name], evidence.other_documents[name]
    expected = numbers_of(same.r2, other.r2, same.ceiling, same.loss_error)
    assert page.row("spectrum", f"{RECONSTRUCTIONS[name]}:") == expected
    assert len(expected) == 12


def test_tokens_and_twins_are_those_of_the_analysis(planted, evidence, page):
    summary = SpectrumResult.open(planted.run).summary
    for each in summary.datasets:
        n_tokens, *shares = page.row("spectrum", each.name)[:5]
        assert n_tokens == each.n_tokens
        counts = (each.n_events, each.censored, each.known, each.forgotten)
        np.testing.assert_allclose(shares, [100 * count / each.n_tokens for count in counts])
        nats = numbers_of(each.learned_nats, each.expected_nats)
        assert page.row("spectrum", each.name)[-len(nats) :] == nats
    twins = evidence.twins
    expected = numbers_of(
        twins.without_steps["kernel"], evidence.same_tokens["kernel"].r2, twins.with_steps["kernel"]
    )
    rows = page.rows
    assert rows["spectrum", "drops + times"] == expected


def test_falls_by_part_of_the_range_are_those_of_the_analysis(evidence, page):
    edges = evidence.falls.edges
    falls = [evidence.falls.measured, *evidence.falls.by_name.values()]
    for part in range(len(edges) - 1):
        start = f"{math.exp(edges[part]):.3g} to "
        assert page.row("spectrum", start) == [fall[part] for fall in falls]
    np.testing.assert_allclose(page.row("spectrum", "all of it"), list(map(sum, falls)))


def test_widths_are_those_of_the_analysis(evidence, page):
    both = [evidence.widths.observed, evidence.widths.group_null]
    decades = [each.width_decades for each in both]
    expected = {
        "fitted": [each.tokens for each in both],
        "of these": [each.falling for each in both],
        "a quarter": numbers_of(*(each.p25 for each in decades)),
        "half": numbers_of(*(each.p50 for each in decades)),
        "three quarters": numbers_of(*(each.p75 for each in decades)),
        "median": numbers_of(*(each.width_of_range.p50 for each in both)),
        "share of the fall": numbers_of(*(each.fall_in_windows for each in both)),
    }
    for name, values in expected.items():
        assert page.row("locality", name) == values


def test_classes_are_those_of_the_analysis(planted, evidence, page):
    for label, total in read_fit(planted.run).classes.items():
        found = evidence.classes.get(label)
        expected = [] if found is None else numbers_of(found.share, found.fall_share)
        assert page.row("classes", f"{label}:") == [total.tokens, *expected]


def test_classes_per_dataset_are_counted_over_its_tokens(planted, page):
    fits = SigmoidFits.load(planted.run.paths.fits)
    prose = fits.rows(planted.run.probe_set.dataset_N == 0)
    shares = page.row("classes", "prose")
    n_classes = len(shares) // 2
    np.testing.assert_allclose(shares[0], (prose.class_N == TokenClass.FALLING).mean())
    np.testing.assert_allclose(sum(shares[:n_classes]), 1)
    np.testing.assert_allclose(sum(shares[n_classes:]), 1)


def test_loss_table_holds_the_means_of_finite_tokens(planted, page):
    loss_NK = planted.run.read_losses().astype(float)
    mean_K = loss_NK[np.isfinite(loss_NK).all(axis=1)].mean(axis=0)
    expected = [mean_K[0], mean_K[-1], mean_K[0] - mean_K[-1]]
    np.testing.assert_allclose(page.row("loss", "all probe tokens"), expected, rtol=1e-6)


def test_non_finite_losses_are_reported(html):
    assert "NaN or infinite" in html


def test_same_inputs_give_the_same_bytes(planted, html, tmp_path):
    again = report_run(planted.run, tokenizer=planted.tokenizer, out=tmp_path / "again.html")
    assert again.read_text() == html


def test_without_a_tokenizer_ids_are_shown(planted, tmp_path):
    html = report_run(planted.run, n_tokens=2000, out=tmp_path / "ids.html").read_text()
    marked = [int(text) for tags, text in Page(html).texts if tags[-1:] == ("mark",)]
    assert set(marked) <= set(planted.run.probe_set.label_N.tolist())


def test_names_are_escaped_and_not_typeset(copied):
    names = ("a<b>&", "$x_1$")
    probe_set = dataclasses.replace(copied.probe_set, datasets=names)
    probe_set.save(copied.path / "tokscale" / "probe.safetensors")
    copied.paths.transfer.unlink()
    renamed = dataclasses.replace(copied, tokens=WatchedTokens(probe_set))
    fit_run(renamed)
    spectrum_run(renamed, n_resamples=10, null_tokens=100)
    html = report_run(renamed).read_text()
    assert "a<b>" not in html
    texts = [text.strip() for tags, text in Page(html).texts if "svg" in tags]
    assert all(name in texts for name in names)


def test_page_stays_small(html):
    assert len(html) < 1_000_000


@pytest.mark.parametrize(
    "name", ["fits.parquet", "fit.json", "spectrum.npz", "reconstruction.json"]
)
def test_a_missing_analysis_is_one_sentence(copied, name):
    (copied.paths.analysis / name).unlink()
    copied.paths.report.unlink(missing_ok=True)
    with pytest.raises(
        TokscaleError, match=r"run `megatron-tokscale (fit|spectrum) .*` (first|again)"
    ) as error:
        report_run(copied)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not copied.paths.report.exists()


def test_an_analysis_of_other_probes_is_refused(copied):
    (copied.path / "tokscale" / "losses" / losses_name(copied.records[-1].step)).unlink()
    with pytest.raises(TokscaleError, match="other probes"):
        report_run(Run.open(copied.path))


def test_a_spectrum_of_another_time_than_the_fits_is_refused(copied):
    fit_run(copied, time="tokens")
    with pytest.raises(TokscaleError, match="another time"):
        report_run(copied)


def test_a_damaged_spectrum_is_refused(copied):
    path = copied.paths.spectrum_arrays
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TokscaleError, match="damaged"):
        report_run(copied)


def test_a_newer_analysis_is_refused(copied):
    edit(copied.paths.reconstruction, schema_version=99)
    with pytest.raises(TokscaleError, match="schema version 99"):
        report_run(copied)


@pytest.mark.parametrize(
    ("name", "verb"),
    [("fit.json", "fit"), ("spectrum.json", "spectrum"), ("reconstruction.json", "spectrum")],
)
def test_an_older_analysis_says_what_to_run_again(copied, name, verb):
    older = content_of(copied, name)["schema_version"] - 1
    edit(copied.paths.analysis / name, schema_version=older)
    with pytest.raises(
        TokscaleError, match=rf"{name} is of an older schema; run `.* {verb} .*` again"
    ) as error:
        report_run(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_an_unreadable_tokenizer_is_refused(planted, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokscaleError, match="cannot read tokenizer"):
        report_run(planted.run, tokenizer=path)


def test_a_tokenizer_of_a_smaller_vocabulary_is_refused(planted, tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    with pytest.raises(TokscaleError, match="has 2 tokens"):
        report_run(planted.run, tokenizer=path)


def test_a_run_beside_itself_is_refused(copied):
    copied.paths.report.unlink(missing_ok=True)
    with pytest.raises(TokscaleError, match="is the run itself; expected another run"):
        report_run(copied, beside=copied)
    assert not copied.paths.report.exists()


def test_a_page_under_a_file_is_refused(copied):
    with pytest.raises(TokscaleError, match="expected a path in a folder that you may write to"):
        report_run(copied, out=copied.paths.identity / "page.html")


@pytest.mark.parametrize("taken", ["probe.safetensors", "losses", "run.json"])
def test_the_page_replaces_nothing_but_an_earlier_report(copied, taken):
    path = copied.paths.folder / taken
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(TokscaleError, match="expected a new file or an earlier report"):
        report_run(copied, out=path)
    assert before is None or path.read_bytes() == before


def test_a_page_is_written_again_in_its_place(planted, tmp_path):
    page = report_run(planted.run, out=tmp_path / "page.html")
    first = page.read_bytes()
    page.write_bytes(first + b"older")
    assert report_run(planted.run, out=page).read_bytes() == first


@pytest.mark.parametrize("package", ["matplotlib", "tokenizers"])
def test_a_missing_package_is_one_sentence(planted, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        TokscaleError, match=rf"{package}; run `pip install megatron-tokscale\[report\]`"
    ):
        report_run(planted.run, tokenizer=planted.tokenizer)


def test_importing_the_room_loads_no_matplotlib():
    heavy = "{'matplotlib', 'tokenizers'}"
    code = f"import sys, megatron_tokscale.report; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_the_users_matplotlib_settings_are_left_alone(planted, html, tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        out = report_run(planted.run, tokenizer=planted.tokenizer, out=tmp_path / "styled.html")
        assert dict(mpl.rcParams) == before
    assert out.read_text() == html


def test_a_run_fitted_in_tokens_says_so(copied):
    fit_run(copied, time="tokens")
    spectrum_run(copied, n_resamples=10, null_tokens=100)
    copied.paths.transfer.unlink()
    html = report_run(copied).read_text()
    assert "time = training tokens" in html and " tokens</b>" in html

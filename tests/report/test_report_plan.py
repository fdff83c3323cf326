"""The section on the data plan: its samples are those of the plan index.

Shapes: D datasets, Z strata, W windows.
"""

import dataclasses
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from html_page import Page

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import sealed
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    PlanProvenance,
    PlanSources,
    Replanning,
    Stage,
    Stratum,
    build_index,
    load_or_build_index,
)
from megatron_tokscale.data.history import followed_plan, save_run_plan
from megatron_tokscale.data.record import BlendRecord, DataRecord, DatasetRecord, PlanRecord
from megatron_tokscale.data.take_over import take_over
from megatron_tokscale.report import report_run
from megatron_tokscale.report.drawn_plan import read_plan, window_edges
from megatron_tokscale.report.sections.plan import data_plan
from megatron_tokscale.report.sections.plan.figures import levels, ratios, row_of
from megatron_tokscale.results.gain import Gain, ScoreQuality, with_gain
from megatron_tokscale.store import Run

CONSUMED = 8000  # 2000 steps of 4 samples
HOSTILE = "<script>alert(1)</script>"
DECISION = Decision(step=1500, start=6040, weights=(0.9, 0.1))
SHARES = (0.5, 0.3, 0.2)
HOW = Replanning(base_weights=(1.2, 0.8), train_samples=10_000)


def make_plan(stages=None, names=("prose", "code"), how=None, **provenance):
    """Make a plan of two datasets, the first in three strata."""
    first, second = names
    return Plan(
        datasets=(DatasetIdentity(first, 10, 64_000), DatasetIdentity(second, 10, 32_000)),
        strata=(
            *(Stratum(f"{first}/q{q}", 0, share) for q, share in enumerate(SHARES, 1)),
            Stratum(second, 1),
        ),
        stages=stages
        or (
            Stage(0, (0.6, 0.4)),
            Stage(1000, (0.6, 0.4), (0.7, 0.2, 0.1, 1)),
            Stage(4000, (0.3, 0.7), (0.1, 0.1, 0.8, 1)),
            Stage(9000, (0.5, 0.5)),
        ),
        seq_length=32,
        seed=5,
        cuts=(Cut("0123456789abcdef", unlearned=True), None),
        max_epochs=4.0,
        provenance=PlanProvenance(
            **{
                "policy": "frontier",
                "control": "frequency",
                "sources": PlanSources(reference="ref-run", scores={first: "0123456789abcdef"}),
                **provenance,
            }
        ),
        replanning=how or HOW,
    )


def record(size, start=0, order=None):
    names = ("prose", "code")
    datasets = [
        DatasetRecord.from_cache("/c", name, "key-GPTDataset-train", 1, size) for name in names
    ]
    order = order or PlanRecord("/c", "0", 10_000, (None, None))
    return DataRecord(tuple(datasets), order, start)


def data_file(run):
    return run.path / "tokscale" / "data.json"


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    """Return a run that follows a plan with one decision."""
    path = tmp_path_factory.mktemp("followed") / "run"
    shutil.copytree(planted.run.path, path)
    save_run_plan(make_plan(), [DECISION], path)
    return Run.open(path)


@pytest.fixture(scope="module")
def html(run):
    return report_run(run).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def weights_at(sample):
    """Return the weight of each stratum at a sample, from the numbers above."""
    within = [SHARES, (0.7, 0.2, 0.1), (0.1, 0.1, 0.8), SHARES][
        sum(sample >= start for start in (1000, 4000, 9000))
    ]
    prose = 0.9 if sample >= 6040 else 0.3 if sample >= 4000 else 0.6
    return np.array([*(prose * part for part in within), 1 - prose])


def brute_force(start=0, stop=CONSUMED, plan=None, sizes=(1000, 600, 400, 1000)):
    """Count the cells of the rows of the strata sample by sample."""
    index = build_index(plan, stop)
    drawn = Counter(index.stratum_N[start:stop].tolist())
    target_Z = sum(weights_at(sample) for sample in range(start, stop))
    total = stop - start
    rows = []
    for z, base in enumerate([0.6 * SHARES[0], 0.6 * SHARES[1], 0.6 * SHARES[2], 0.4]):
        now, first = weights_at(stop)[z], weights_at(start)[z]
        off = drawn[z] - target_Z[z]
        epochs = drawn[z] / sizes[z]
        rows.append([base, target_Z[z] / total, drawn[z] / total, off, epochs, first, now])
    return np.array(rows)


def test_the_table_agrees_with_a_loop_over_the_samples(run, page):
    rows = brute_force(plan=followed_plan(run.path))
    for name, expected in zip(("q1", "q2", "q3", "code"), rows, strict=True):
        np.testing.assert_allclose(page.row("plan", name), expected, atol=1e-6, err_msg=name)
    prose = rows[:3].sum(axis=0)
    prose[4] = rows[:3, 2].sum() * CONSUMED / 2000
    np.testing.assert_allclose(page.row("plan", "prose"), prose, atol=1e-6)


def test_the_realised_shares_are_not_the_targets(page):
    cells = np.array([page.row("plan", name) for name in ("q1", "q2", "q3", "code")])
    assert (cells[:, 1] != cells[:, 2]).any()
    np.testing.assert_allclose(cells[:, 2] * CONSUMED, (cells[:, 2] * CONSUMED).round(), atol=1e-6)
    assert np.abs(cells[:, 3]).max() < 2


def test_it_says_which_plan_and_what_it_was_made_from(run, page):
    plan, given = followed_plan(run.path), make_plan()
    assert (
        page.cells("plan", "Plan")
        == f"{plan.fingerprint}; before the decisions {given.fingerprint}"
    )
    assert page.cells("plan", "Policy") == "frontier, control: frequency"
    assert "ref-run; scores 0123456789abcdef (prose)" in page.cells("plan", "Made from")
    assert page.cells("plan", "Data") == "2 datasets in 4 strata, samples of 32 tokens, seed 5"
    assert "never learned: prose" in page.cells("plan", "Strata")
    assert (
        page.cells("plan", "Stages")
        == "5, 4 of them begun, the next at sample 9,000; made for 10,000 samples"
    )
    limits = page.cells("plan", "Limits")
    assert "0.25 of base" in limits and "factor of 1.5" in limits and "at most 4 epochs" in limits


def test_decisions_made_while_training_are_shown(page):
    # The row's name is the sample from which the decision holds.
    assert page.row("plan", "6,040") == [1500, 0.9, 0.1]


def test_without_a_plan_there_is_no_section(planted):
    assert read_plan(planted.run) is None and html_of(None) == ""
    html = report_run(planted.run).read_text()
    assert 'id="plan"' not in html and "Data plan" not in html


def test_the_page_with_a_plan_is_still_one_page(html, page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pictures = [name for tag, name, _ in page.attributes if tag == "svg"]
    assert pictures.count("aria-label") == page.tags.count("svg")
    assert "http:" not in html and not {"script", "img", "image"} & set(page.tags)


def test_the_same_plan_gives_the_same_bytes(run, html, tmp_path):
    assert report_run(run, out=tmp_path / "again.html").read_text() == html


@pytest.fixture
def following(planted, tmp_path):
    """Return a function (plan, decisions) -> a copy of the run that follows them."""

    def make(plan, *decisions):
        path = tmp_path / "run"
        shutil.copytree(planted.run.path, path, dirs_exist_ok=True)
        save_run_plan(plan, decisions, path)
        return Run.open(path)

    return make


def html_of(drawn):
    return "".join(each.html for each in data_plan(drawn, "plan", "Data plan", "Data plan"))


def section_of(run):
    html = html_of(read_plan(run))
    return html, Page(html)


def test_sizes_that_the_job_has_counted_come_first(following):
    run = following(make_plan(how=dataclasses.replace(HOW, epoch_samples=(100, 100))))
    html, page = section_of(run)
    assert "that the plan was made for" in html
    record(size=400).save(data_file(run))
    html, counted = section_of(run)
    assert "that the job has counted" in html
    for name, before, after in (("code", 100, 400), ("q1", 50, 200)):
        epochs = page.row("plan", name)[4] * before
        np.testing.assert_allclose(counted.row("plan", name)[4] * after, epochs)


def test_unknown_sizes_are_estimated_and_labelled_as_estimates(following):
    html, page = section_of(following(make_plan()))
    assert "estimated: as if all tokens" in html
    cells = page.row("plan", "code")
    np.testing.assert_allclose(cells[4], cells[2] * CONSUMED / (32_000 / 32))


def test_only_what_was_drawn_by_the_plan_is_counted(following):
    """Take a job that followed its plan from sample 2,000 to sample 6,000 only."""
    run = following(make_plan())
    blend = BlendRecord(None, None, 10_000)
    for each in (record(1, 0, blend), record(1000, 2000), record(1, 6000, blend)):
        each.save(data_file(run))
    _, page = section_of(run)
    rows = brute_force(2000, 6000, make_plan(), sizes=(500, 300, 200, 1000))
    for name, expected in zip(("q1", "q2", "q3", "code"), rows, strict=True):
        np.testing.assert_allclose(page.row("plan", name), expected, atol=1e-6, err_msg=name)
    assert "drawn without the plan" in page.words("plan")


def test_the_plan_index_that_the_job_kept_is_counted(following, tmp_path):
    plan, cache = make_plan(), tmp_path / "cache"
    run = following(plan)
    before = read_plan(run).count_WZ
    record(1000, order=PlanRecord(str(cache), plan.fingerprint, 10_000, (None, None))).save(
        data_file(run)
    )
    np.testing.assert_array_equal(read_plan(run).count_WZ, before)
    load_or_build_index(plan, 10_000, cache, build=True)
    np.testing.assert_array_equal(read_plan(run).count_WZ, before)
    for file in cache.glob("*-stratum.npy"):
        np.save(file, np.full(10_000, 3, np.int16))
    assert read_plan(run).count_Z.tolist() == [0, 0, 0, CONSUMED]


def test_a_run_that_has_drawn_nothing_by_its_plan_says_so(following):
    run = following(make_plan())
    record(1000, CONSUMED).save(data_file(run))
    html, page = section_of(run)
    assert "drawn no sample by the plan" in page.words("plan")
    assert "<svg" not in html and page.row("plan", "code")[1:4] == [0, 0, 0]


def test_an_accepted_plan_is_named_with_its_first_sample(following):
    past = make_plan((Stage(0, (0.5, 0.5)),), how=Replanning((9, 1)))
    given = dataclasses.replace(make_plan(), max_epochs=None)
    both = take_over(past, given, 3000)
    drawn = read_plan(following(both))
    page = Page(html_of(drawn))
    assert page.cells("plan", "3,000") == given.fingerprint
    assert "epochs without limit" in page.cells("plan", "Limits")
    np.testing.assert_allclose(drawn.base_D, [0.6, 0.4])  # of the plan that holds now


def test_a_dataset_that_was_left_out_has_no_epochs(following):
    """A job without the dataset has not opened it, so its size is unknown."""
    given = dataclasses.replace(
        make_plan(),
        replanning=Replanning((1,)),
        stages=(Stage(0, (1.0,)),),
        datasets=make_plan().datasets[1:],
        strata=(Stratum("code", 0),),
        cuts=(None,),
    )
    run = following(take_over(make_plan((Stage(0, (0.5, 0.5)),)), given, 3000))
    prose, code = record(1000).datasets
    unused = dataclasses.replace(DatasetRecord.unused(prose.prefix), name="prose")
    DataRecord((unused, code), PlanRecord("/c", "0", 10_000, (None, None))).save(data_file(run))
    _, page = section_of(run)
    prose_cells = page.row("plan", "prose")
    np.testing.assert_allclose(prose_cells[2], 1500 / CONSUMED, atol=2 / CONSUMED)
    assert len(prose_cells) == 6 and "–" in page.cells("plan", "prose")
    assert "with the most epochs is code, " in page.words("plan")


def test_a_plan_by_falls_shows_its_strata_its_limits_and_what_it_can_gain(following):
    cut = Cut("0123456789abcdef", "fall", unit="documents", edges=(0.1, 0.2), held_out=64)
    how = dataclasses.replace(HOW, stratum_samples=(500, 300, 200, 999), share_limit=2.0)
    plan = dataclasses.replace(
        make_plan(how=how, policy="fall", control=None, settings={"strength": 0.8}),
        cuts=(cut, None),
        documents=((0, 10), (0, 10)),
    )
    scores = ScoreQuality(0.8, 0.3, 0.4, 0.035, 1000, True)
    gain = Gain(scores, spread=0.05, kept=0.6, covariance=0.02, sd_points=2.2, seeds=12)
    drawn = read_plan(following(with_gain(plan, gain)))
    assert drawn.size_Z.tolist() == [500, 300, 200, 999]
    page = Page(html_of(drawn))
    assert page.cells("plan", "Policy") == "fall (strength 0.8)"
    assert page.cells("plan", "Strata") == "documents by fall, 64 of each held out: prose"
    assert "share is within a factor of 2 of its base share" in page.cells("plan", "Limits")
    text = page.cells("plan", "Gain")
    assert (
        "gain: at most 2.0%" in text
        and "CV² 0.050" in text
        and "reference's cost: 3.5% of a training of its own size" in text
    )
    assert "advice against it: it can gain 2.0% at most and its reference costs 3.5%" in text


@pytest.mark.parametrize("name", [HOSTILE, "a<b>&", "$x_1$"])
def test_names_and_provenance_are_escaped(following, name):
    sources = PlanSources(run=name, reference=name, scores={name: name})
    odd = {"policy": name, "control": name, "sources": sources, "version": name}
    odd |= {"settings": {"window": name}}
    plan = make_plan(names=(name, "code"), **odd)
    strata = tuple(dataclasses.replace(each, name=f"{each.name}{name}") for each in plan.strata)
    html, page = section_of(following(dataclasses.replace(plan, strata=strata)))
    assert "<script" not in html and "a<b>" not in html
    assert name in page.cells("plan", "Policy") and name in page.cells("plan", "Made from")
    texts = [text.strip() for tags, text in page.texts if "svg" in tags]
    # Labels of strata are cut from the left.
    assert name in texts and sum(text.endswith(name[-5:]) for text in texts) >= 4


@pytest.mark.parametrize(
    "odd",
    [
        {"base_weights": "heavy", "epoch_samples": [1, "2"], "guards": [1], "scores": 3},
        {"base_weights": [0, 0], "epoch_samples": [1, 2, 3], "accepted": 7, "train_samples": "x"},
        {"base_weights": [1, float("inf")], "epoch_samples": None, "accepted": [{"at": "x"}]},
    ],
)
def test_provenance_of_another_shape_stops_no_report(following, odd):
    run = following(make_plan())
    path = run.path / "tokscale/plan.json"
    content = json.loads(path.read_text())
    content["provenance"]["settings"] |= odd
    path.write_text(json.dumps(sealed(content)))
    drawn = read_plan(run)
    np.testing.assert_allclose(drawn.base_D, [0.6, 0.4])
    assert "frontier" in html_of(drawn)


@pytest.mark.parametrize("name", ["plan.json", "replans.json", "data.json"])
def test_a_damaged_file_is_one_line_that_says_what_to_do(following, name):
    run = following(make_plan())
    (run.path / "tokscale" / name).write_text('{"kind": ')
    run.paths.report.unlink(missing_ok=True)
    with pytest.raises(TokscaleError, match=rf"{name}.*move .*plan\.json away") as error:
        report_run(run)
    assert "\n" not in str(error.value)
    assert not run.paths.report.exists()


def many_strata(n_datasets, n_strata):
    return Plan(
        tuple(DatasetIdentity(f"d{d}", 10, 32_000) for d in range(n_datasets)),
        tuple(
            Stratum(f"d{d}/q{z}", d, 1 / n_strata)
            for d in range(n_datasets)
            for z in range(n_strata)
        ),
        (Stage(0, (1.0,) * n_datasets), Stage(500, tuple(range(1, n_datasets + 1)))),
        seq_length=32,
        seed=1,
        cuts=(Cut("0123456789abcdef"),) * n_datasets,
    )


def test_few_strata_stand_below_their_dataset(html):
    table = re.search(r'<section aria-labelledby="plan">.*?</section>', html, re.DOTALL)[0]
    assert "<details>" not in table and table.index("prose</th>") < table.index(">q1</span>")


def test_many_strata_are_folded_away_by_dataset(following):
    html, page = section_of(following(many_strata(8, 30)))
    assert html.count("<details>") == 8 and page.tags.count("summary") == 8
    table = html.split("<details>")[0]
    assert "q1</span>" not in table and table.count("</th><td>") >= 8
    assert len(page.row("plan", "q29")) == 8 * 7
    assert len(html) < 400_000


def test_the_second_run_has_a_section_of_its_own(run, planted, tmp_path):
    html = report_run(planted.run, beside=run, out=tmp_path / "report.html").read_text()
    page = Page(html)
    assert 'href="#compared-plan"' in html and 'id="plan"' not in html
    np.testing.assert_allclose(
        page.row("compared-plan", "code"), brute_force(plan=followed_plan(run.path))[3], atol=1e-6
    )
    other = Run.open(shutil.copytree(run.path, tmp_path / "other"))
    both = report_run(run, beside=other, out=tmp_path / "both.html").read_text()
    ids = [value for _, name, value in Page(both).attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"plan", "compared-plan"} <= set(ids)


def test_windows_hold_every_sample_once(run):
    drawn = read_plan(run)
    assert len(drawn.count_WZ) <= 50
    assert drawn.edge_W1[0] == 0 and drawn.edge_W1[-1] == CONSUMED
    stratum_N = build_index(drawn.plan, CONSUMED).stratum_N
    for w, (begin, end) in enumerate(zip(drawn.edge_W1, drawn.edge_W1[1:], strict=False)):
        assert drawn.count_WZ[w].tolist() == [(stratum_N[begin:end] == z).sum() for z in range(4)]
        np.testing.assert_allclose(
            drawn.target_WZ[w], sum(weights_at(sample) for sample in range(begin, end)), atol=1e-9
        )


@pytest.mark.parametrize(
    ("start", "first", "stop"), [(0, 4, 8000), (0, 512, 73_000_000), (500, 512, 73_000_000)]
)
def test_windows_are_even_in_the_logarithm(start, first, stop):
    edges = window_edges(start, first, stop)
    assert edges[0] == start and edges[-1] == stop and len(edges) <= 51
    assert np.diff(edges).min() >= 20
    steps = np.diff(np.log(edges[edges > 1000]))
    np.testing.assert_allclose(steps, steps[0], rtol=0.05)


@pytest.mark.parametrize(("start", "first", "stop"), [(0, 1, 3), (0, 7, 7), (500, 501, 510)])
def test_a_short_run_has_one_window(start, first, stop):
    assert window_edges(start, first, stop).tolist() == [start, stop]


def test_shades_are_of_weight_over_base():
    weight_TZ = np.array([[0.1, 0.2, 0.3, 0.0, 0.4], [0.01, 0.2, 0.0, 0.0, 0.79]])
    base_Z = np.array([0.1, 0.1, 0.6, 0.0, 0.0])
    ratio_TR = ratios(weight_TZ, base_Z, row_of(5))
    assert levels(ratio_TR).tolist() == [[3, 5, 2, -1, 6], [0, 5, 0, -1, 6]]


def test_neighbours_share_a_row_where_there_are_many_strata():
    rows = row_of(100)
    assert rows[0] == 0 and rows[-1] == 23 and set(np.bincount(rows)) == {4, 5}
    flat = ratios(np.full((1, 100), 0.02), np.full(100, 0.01), rows)
    np.testing.assert_allclose(flat, 2)

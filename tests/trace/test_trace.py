"""Against the tokens that Megatron's own datasets return; each of them tells where it is from."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpt_datasets import (
    gpt_config,
    gpt_dataset,
    pieces_of,
    read_tokens,
    sample_index,
    write_unique_tokens,
)

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    Stage,
    Stratum,
    array_files,
    load_or_build_index,
    with_decisions,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.history import save_run_plan
from megatron_tokscale.data.index import extend_index
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    PlanRecord,
    UntracedRecord,
    load_records,
    record_path,
)
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.strata import load_or_build_strata
from megatron_tokscale.trace.drawn import drawn_documents
from megatron_tokscale.trace.text import describe_document, describe_sample
from megatron_tokscale.trace.trace import Trace

LENGTHS = {
    "web": [3, 40, 1, 1, 2, 17, 1, 9, 30, 2, 1, 25],
    "code": [60, 5, 1, 1, 22],
    "books": [150],
}
FIRST = {"web": 0, "code": 1000, "books": 2000}
DOCUMENTS = [(name, document) for name, row in LENGTHS.items() for document in range(len(row))]
SEQ_LENGTH = 8


@pytest.fixture
def prefixes(tmp_path):
    return [write_unique_tokens(tmp_path / name, LENGTHS[name], FIRST[name]) for name in LENGTHS]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run/tokscale").mkdir(parents=True)
    return tmp_path / "run"


def cache(run):
    return run.parent / "cache"


def blend(run, prefixes, n_samples=60, weights=(3.0, 2.0, 1.0), seed=1):
    """Megatron's blend, of datasets that hold enough samples for it."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    config = gpt_config(cache(run), SEQ_LENGTH, seed=seed)
    parts = [
        gpt_dataset(prefix, config, int(n_samples * weight / sum(weights) * 1.05) + 2)
        for prefix, weight in zip(prefixes, weights, strict=True)
    ]
    return BlendedDataset(parts, list(weights), n_samples, config)


def record_of(blended, **changes) -> DataRecord:
    datasets = tuple(DatasetRecord.from_gpt_dataset(part) for part in blended.datasets)
    return DataRecord(datasets, BlendRecord.from_blended_dataset(blended), **changes)


def planned(run, prefixes, n_samples=90, offset=0):
    """A dataset that follows a plan of strata, and its record."""
    config = gpt_config(cache(run), SEQ_LENGTH)
    parts = [gpt_dataset(prefix, config) for prefix in prefixes]
    plan = Plan(
        datasets=tuple(DatasetIdentity(n, len(row), sum(row)) for n, row in LENGTHS.items()),
        strata=(
            *(Stratum(f"web/{i}", 0, share) for i, share in enumerate((0.3, 0.5, 0.2))),
            Stratum("code", 1),
            *(Stratum(f"books/{i}", 2, 0.5) for i in range(2)),
        ),
        stages=(Stage(0, (3, 2, 1)), Stage(40, (1, 1, 2), (1, 0, 3, 1, 1, 4))),
        seq_length=SEQ_LENGTH,
        seed=9,
        cuts=(Cut("a", unlearned=True), None, Cut("b")),
    )
    sizes = [len(part) for part in parts]

    def scores_of(dataset):
        values = [np.random.default_rng(dataset + i).random(sizes[dataset]) for i in range(5)]
        return SampleScores(*values)

    index = load_or_build_index(plan, n_samples, cache(run), build=True)
    strata = load_or_build_strata(plan, sizes, ["w", "c", "b"], scores_of, cache(run), build=True)
    plan.save(run / "tokscale/plan.json")
    files = tuple(None if file is None else str(file) for file in strata.files)
    record = DataRecord(
        tuple(DatasetRecord.from_gpt_dataset(part) for part in parts),
        PlanRecord(str(cache(run)), plan.fingerprint, n_samples, files),
    )
    return PlannedDataset(plan, parts, index, strata, offset=offset), record


def truth(dataset):
    """For each sample the (name, document, offset) of every token that Megatron returns."""
    rows = []
    for k in range(len(dataset)):
        tokens = read_tokens(dataset[k])
        name = max(LENGTHS, key=lambda name: (FIRST[name] <= tokens[0]) * FIRST[name])
        pieces = pieces_of(tokens, LENGTHS[name], FIRST[name])
        rows.append([(name, p.document, i) for p in pieces for i in range(p.start, p.stop)])
    return rows


def traced(found):
    return [(found.dataset.name, p.document, i) for p in found.pieces for i in range(p[1], p[2])]


def assert_traces(trace, expected, first=0):
    """Every sample, and every document."""
    assert [traced(trace.sample(first + k)) for k in range(len(expected))] == expected
    read = {row.name for row in trace.datasets}
    for name, document in (pair for pair in DOCUMENTS if pair[0] in read):
        holding = [
            first + k for k, row in enumerate(expected) if (name, document) in {t[:2] for t in row}
        ]
        found = trace.document(name, document)
        assert found[found >= first].tolist() == holding
        until = first + len(expected) // 2
        some = trace.document(name, document, until)
        assert some[some >= first].tolist() == [k for k in holding if k < until]
    for until in {first, first + 1, first + len(expected) // 2, first + len(expected)}:
        assert_drawn(trace, expected[: until - first], until, first)


def assert_drawn(trace, expected, until, first):
    """The documents that are drawn before a sample are those whose tokens Megatron returns."""
    portions = [
        Portion(IndexedTokens.open(prefix), range(len(LENGTHS[Path(prefix).name])), 1.0)
        for prefix in dict.fromkeys(row.prefix for row in trace.datasets)
    ]
    before = drawn_documents(trace, portions, first)
    for portion, past, found in zip(
        portions, before, drawn_documents(trace, portions, until), strict=True
    ):
        name = portion.tokens.name
        read = {token[1] for row in expected for token in row if token[0] == name}
        read |= set(np.flatnonzero(past.is_drawn_Q).tolist())
        assert set(np.flatnonzero(found.is_drawn_Q).tolist()) == read
        labels = sum(len(row) - 1 for row in expected if row[0][0] == name)
        drawn = (found.epochs - past.epochs) * portion.n_tokens
        assert drawn == pytest.approx(labels)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(array_files, "_BLOCK", 7)


@pytest.mark.usefixtures("small_blocks")
def test_a_megatron_blend_is_traced_as_it_returns_its_tokens(run, prefixes):
    blended = blend(run, prefixes)
    record_of(blended).save(record_path(run))
    trace = Trace.open(run)
    assert len(trace) == 60
    assert_traces(trace, truth(blended))
    for k in range(60):
        found = trace.sample(k)
        assert (found.dataset.prefix, found.number) == (
            prefixes[blended.dataset_index[k]],
            blended.dataset_sample_index[k],
        )
        assert (found.stratum, found.epoch) == (None, None)


def test_an_exhaustive_blend_is_traced(run, prefixes):
    from megatron.core.datasets.blended_dataset import BlendedDataset

    config = gpt_config(cache(run), SEQ_LENGTH)
    parts = [gpt_dataset(prefix, config) for prefix in prefixes]
    blended = BlendedDataset(parts, [len(part) for part in parts], None, config)
    record_of(blended).save(record_path(run))
    assert_traces(Trace.open(run), truth(blended))


@pytest.mark.usefixtures("small_blocks")
def test_a_plan_is_traced_through_its_strata_stages_and_epochs(run, prefixes):
    dataset, record = planned(run, prefixes)
    record.save(record_path(run))
    trace = Trace.open(run)
    assert_traces(trace, truth(dataset))
    epochs = set()
    for k in range(len(dataset)):
        found, (stratum, epoch, number) = trace.sample(k), dataset.locate(k)
        name = dataset.plan.strata[stratum].name
        assert (found.stratum, found.epoch, found.number) == (name, epoch, number)
        epochs.add(epoch)
    assert len(epochs) > 2


def test_a_plan_that_is_joined_later_counts_the_jobs_samples(run, prefixes):
    dataset, record = planned(run, prefixes, offset=30)
    replace(record, start=30).save(record_path(run))
    trace = Trace.open(run)
    assert_traces(trace, truth(dataset), first=30)
    with pytest.raises(TokscaleError, match=r"sample 29 is not among .* from 30 to 89"):
        trace.sample(29)


@pytest.mark.parametrize("n_samples", [None, 70])
def test_a_single_dataset_is_traced(run, prefixes, n_samples):
    config = gpt_config(cache(run), SEQ_LENGTH)
    dataset = gpt_dataset(prefixes[0], config, n_samples, documents=range(2, 12))
    DataRecord((DatasetRecord.from_gpt_dataset(dataset),)).save(record_path(run))
    assert_traces(Trace.open(run), truth(dataset))
    assert Trace.open(run).document("web", 1).size == 0, "not in the training part"


def test_a_dataset_without_a_cache_path_keeps_its_indices_beside_its_data(run, prefixes):
    dataset = gpt_dataset(prefixes[0], gpt_config(None, SEQ_LENGTH))
    DataRecord((DatasetRecord.from_gpt_dataset(dataset),)).save(record_path(run))
    assert_traces(Trace.open(run), truth(dataset))


def test_without_the_extra_token_too(run, prefixes):
    config = gpt_config(cache(run), SEQ_LENGTH, extra=False)
    dataset = gpt_dataset(prefixes[0], config)
    DataRecord((DatasetRecord.from_gpt_dataset(dataset),)).save(record_path(run))
    trace, index = Trace.open(run), sample_index(dataset)
    for k in range(len(dataset)):
        tokens = read_tokens(dataset[k], extra=False)
        told = [
            (p.document, i) for p in pieces_of(tokens, LENGTHS["web"]) for i in range(p[1], p[2])
        ]
        assert [t[1:] for t in traced(trace.sample(k))] == told
        assert list(trace.sample(k).pieces) == index.pieces(k)


def test_a_job_resumed_to_another_length_is_traced_on_either_side(run, prefixes):
    """Megatron orders its samples anew for another number of them."""
    first, second = blend(run, prefixes, 40), blend(run, prefixes, 60)
    record_of(first).save(record_path(run))
    record_of(second, start=24).save(record_path(run))
    read, other = truth(first), truth(second)
    assert read[:24] != other[:24], "else this shows nothing"
    assert_traces(Trace.open(run), read[:24] + other[24:])


def test_a_blend_that_goes_over_to_a_plan_is_traced_on_either_side(run, prefixes):
    blended = blend(run, prefixes)
    dataset, record = planned(run, prefixes)
    record_of(blended).save(record_path(run))
    replace(record, start=24).save(record_path(run))
    assert_traces(Trace.open(run), truth(blended)[:24] + truth(dataset)[24:])


def test_after_a_phase_transition_samples_are_counted_from_the_phases_first(run, prefixes):
    first, second = blend(run, prefixes, 40), blend(run, prefixes, 60, weights=(1.0, 1.0, 1.0))
    record_of(first).save(record_path(run))
    record_of(second, start=32, offset=32).save(record_path(run))
    trace = Trace.open(run)
    assert len(trace) == 92
    assert_traces(trace, truth(first)[:32] + truth(second))


def test_a_job_that_is_resumed_unchanged_adds_no_record(run, prefixes):
    blended, path = blend(run, prefixes), record_path(run)
    record_of(blended).save(path)
    before = path.read_text()
    record_of(blended, start=24).save(path)
    assert path.read_text() == before
    record_of(blend(run, prefixes, 40), start=24).save(path)
    assert [record.start for record in load_records(path)] == [0, 24]
    record_of(blended, start=16).save(path)
    assert [record.start for record in load_records(path)] == [0], "a branch that was abandoned"


def test_a_plan_that_goes_on_from_another_takes_its_place(run, prefixes):
    """Its index holds the same past."""
    dataset, record = planned(run, prefixes, 90)
    record.save(record_path(run))
    longer, record = planned(run, prefixes, 120)
    replace(record, start=50).save(record_path(run))
    assert [record.start for record in load_records(record_path(run))] == [0]
    assert_traces(Trace.open(run), truth(longer))
    assert truth(longer)[:90] == truth(dataset)


def test_samples_of_a_dataset_that_the_plan_has_left_out_since_are_traced(run, prefixes):
    dataset, record = planned(run, prefixes)
    record.save(record_path(run))
    web, *others = record.datasets
    order = replace(record.order, strata=(None, *record.order.strata[1:]))
    gone = (DatasetRecord.unused(web.prefix), *others)
    replace(record, datasets=gone, order=order, start=50).save(record_path(run))
    assert_traces(Trace.open(run), truth(dataset))


def test_decisions_made_while_the_job_trained_are_traced(run, prefixes):
    """The job extends its index in memory; in no file is one of the extended plan."""
    dataset, record = planned(run, prefixes)
    decisions = [Decision(3, 25, (1.0, 0.0, 4.0)), Decision(7, 60, (1.0, 1.0, 1.0))]
    save_run_plan(dataset.plan, decisions, run)
    plan = with_decisions(dataset.plan, decisions)
    index = dataset.index.shared()
    for decision in decisions:
        extend_index(plan, index, decision.start)
    order = replace(record.order, fingerprint=plan.fingerprint)
    replace(record, order=order).save(record_path(run))
    live = PlannedDataset(plan, dataset.datasets, index, dataset.strata)
    assert_traces(Trace.open(run), truth(live))


def test_records_read_back_are_those_written(run, prefixes):
    path, (_, plan) = record_path(run), planned(run, prefixes)
    unused = DatasetRecord.unused("some/where")
    assert unused.prefix.startswith("/")
    plan = replace(plan, datasets=(*plan.datasets[:2], unused), start=9)
    single = DataRecord(plan.datasets[:1], None, 4, 2)
    for record in (single, plan):
        record.save(path)
    assert load_records(path) == (single, plan)
    assert [record.kind for record in load_records(path)] == ["single", "plan"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda content: content.update(kind="other"), "is no record of a job's data"),
        (lambda content: content.update(schema_version=9), "schema version 9"),
        (lambda content: content.pop("records"), "damaged: the value is None; expected a list"),
        (lambda content: content.update(records=[]), "has no record"),
        (lambda content: content["records"][0].update(kind="x"), "0..kind is unknown"),
        (lambda content: content["records"][0]["datasets"][0].pop("size"), "size is missing"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(run, prefixes, edit, sentence):
    path = record_path(run)
    record_of(blend(run, prefixes)).save(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TokscaleError, match=sentence) as caught:
        Trace.open(run)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_record_is_refused_with_the_alternative(run):
    with pytest.raises(TokscaleError, match="give the --data-cache-path of the training job"):
        Trace.open(run)


def test_missing_and_damaged_files_are_named(run, prefixes):
    dataset, record = planned(run, prefixes)
    record.save(record_path(run))
    for file in sorted(cache(run).glob("*.npy")):
        content = file.read_bytes()
        used = Trace.open(run)
        file.unlink()
        if file.stem.endswith(("-stratum", "-draw")):  # computed anew
            assert_traces(_fresh(run), truth(dataset))
        else:
            with pytest.raises(TokscaleError, match=f"{file.name} is not there") as caught:
                assert_traces(_fresh(run), truth(dataset))
            assert "\n" not in str(caught.value)
        file.write_bytes(content[:100])
        with pytest.raises(TokscaleError, match=f"{file.name} is damaged"):
            assert_traces(_fresh(run), truth(dataset))
        file.write_bytes(content)
        assert len(used) == 90


def _fresh(run):
    from megatron_tokscale.trace import trace

    trace.open_index.cache_clear()
    return Trace.open(run)


def test_a_plan_other_than_that_of_the_record_is_refused(run, prefixes):
    dataset, record = planned(run, prefixes)
    record.save(record_path(run))
    replace(dataset.plan, seed=10).save(run / "tokscale/plan.json")
    with pytest.raises(TokscaleError, match=f"the job follows {dataset.plan.fingerprint}"):
        Trace.open(run)
    (run / "tokscale/plan.json").unlink()
    with pytest.raises(TokscaleError, match="restore it"):
        Trace.open(run)


def test_indices_of_another_number_of_samples_are_refused(run, prefixes):
    record = record_of(blend(run, prefixes))
    assert isinstance(record.order, BlendRecord)
    with pytest.raises(TokscaleError, match="is not of the blend of 61 samples"):
        Trace.from_records([replace(record, order=replace(record.order, size=61))])
    wrong = replace(record.datasets[0], size=3)
    trace = Trace.from_records([replace(record, datasets=(wrong, *record.datasets[1:]))])
    with pytest.raises(TokscaleError, match="is not of the 3 samples of web"):
        trace.document("web", 0)


def test_a_blend_that_megatron_kept_no_index_of_is_refused(run, prefixes):
    blended = blend(run, prefixes)
    blended.config.path_to_cache = None
    with pytest.raises(TokscaleError, match="the job had no --data-cache-path"):
        Trace.from_records([record_of(blended)])


def test_missing_samples_documents_and_datasets_are_named(run, prefixes):
    trace = Trace.from_records([record_of(blend(run, prefixes))])
    for k in (-1, 60):
        with pytest.raises(TokscaleError, match=f"sample {k} is not among .* from 0 to 59"):
            trace.sample(k)
    for document in (-1, 5):
        with pytest.raises(TokscaleError, match=f"has no document {document}; it has 5"):
            trace.document("code", document)
    with pytest.raises(TokscaleError, match="no dataset news; it reads web, code, books"):
        trace.document("news", 0)


def test_one_prefix_twice_in_a_blend_is_one_dataset(run, prefixes):
    blended = blend(run, [*prefixes, prefixes[0]], weights=(3.0, 2.0, 1.0, 1.0))
    assert_traces(Trace.from_records([record_of(blended)]), truth(blended))


def test_two_datasets_of_one_name_are_told_apart_by_prefix(run, prefixes, tmp_path):
    (tmp_path / "other").mkdir()
    twin = write_unique_tokens(tmp_path / "other/web", [50], 3000)
    trace = Trace.from_records([record_of(blend(run, [prefixes[0], twin], weights=(1.0, 1.0)))])
    with pytest.raises(TokscaleError, match="2 datasets that are named web; give the prefix"):
        trace.document("web", 0)
    assert trace.document(twin, 0).size == 30


def test_megatrons_cache_tells_the_same_without_the_plugin(run, prefixes):
    blended = blend(run, prefixes)
    assert_traces(Trace.from_cache(cache(run)), truth(blended))


def test_megatrons_cache_of_a_single_dataset(run, prefixes):
    dataset = gpt_dataset(prefixes[1], gpt_config(cache(run), SEQ_LENGTH), 33)
    assert_traces(Trace.from_cache(cache(run)), truth(dataset))


def test_a_cache_of_several_jobs_is_refused_with_a_list(run, prefixes):
    jobs = [blend(run, prefixes), blend(run, prefixes, 40), blend(run, prefixes, seed=77)]
    single = gpt_dataset(prefixes[1], gpt_config(cache(run), SEQ_LENGTH), 33)
    with pytest.raises(TokscaleError, match=r"of 4 jobs; choose .* with --match: ") as caught:
        Trace.from_cache(cache(run))
    for line in (
        "seed 77: blend of 60 samples: web (",
        "seed 1: blend of 40 samples: web (",
        "code (33 samples)",
    ):
        assert line in str(caught.value)
    assert_traces(Trace.from_cache(cache(run), ['"size": 40']), truth(jobs[1]))
    assert_traces(Trace.from_cache(cache(run), ["Blended", '"random_seed": 77']), truth(jobs[2]))
    assert_traces(Trace.from_cache(cache(run), [jobs[0].unique_description_hash]), truth(jobs[0]))
    assert_traces(Trace.from_cache(cache(run), [single.unique_description_hash]), truth(single))
    with pytest.raises(
        TokscaleError, match=r"none of the 4 jobs .* holds 'Xq' and 'Yq'; there are"
    ):
        Trace.from_cache(cache(run), ["Xq", "Yq"])


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(TokscaleError, match="holds no description of training data"):
        Trace.from_cache(tmp_path)
    with pytest.raises(TokscaleError, match="is no directory; give the job's --data-cache-path"):
        Trace.from_cache(tmp_path / "none")
    (tmp_path / "0-GPTDataset-train-description.txt").write_text("{")
    with pytest.raises(TokscaleError, match=r"cannot read .*description.txt"):
        Trace.from_cache(tmp_path)


def test_a_sample_is_shown_by_its_documents(run, prefixes):
    trace = Trace.from_records([record_of(blend(run, prefixes))])
    for k in range(60):
        found = trace.sample(k)
        head, _, *lines = describe_sample(trace, k).splitlines()
        assert head == f"sample {k}: sample {found.number} of {found.dataset.name}"
        name = found.dataset.name
        for line, piece in zip(lines, found.pieces, strict=True):
            document, span, length, *ids = line.split()
            assert (int(document), int(length)) == (piece[0], LENGTHS[name][piece[0]])
            assert span == f"{piece.start}-{piece.stop - 1}"
            start = FIRST[name] + sum(LENGTHS[name][: piece.document]) + piece.start
            n = piece.stop - piece.start
            assert ids == [str(start + i) for i in range(min(n, 8))] + ["…"] * (n > 8)


def test_the_verb_traces_a_run(run, prefixes, capsys):
    dataset, record = planned(run, prefixes)
    record.save(record_path(run))
    main(["trace", str(run), "--sample", "3", "41"])
    trace = Trace.open(run)
    shown = capsys.readouterr().out
    assert shown == describe_sample(trace, 3) + describe_sample(trace, 41)
    stratum, epoch, _ = dataset.locate(41)
    assert f"stratum {dataset.plan.strata[stratum].name}, epoch {epoch}" in shown
    main(["trace", str(run), "--document", "web:5", "--until-sample", "60"])
    shown = capsys.readouterr().out
    assert shown == describe_document(trace, "web", 5, 60)
    expected = [
        k for k, row in enumerate(truth(dataset)[:60]) if ("web", 5) in {t[:2] for t in row}
    ]
    assert [int(line.split()[1][:-1]) for line in shown.splitlines()[1:]] == expected
    assert "is read by" in shown.splitlines()[0]


def test_the_verb_traces_a_cache(run, prefixes, capsys):
    blend(run, prefixes)
    blend(run, prefixes, 40)
    main(["trace", "--data-cache-path", str(cache(run)), "--match", '"size": 40', "--sample", "39"])
    trace = Trace.from_cache(cache(run), ['"size": 40'])
    assert capsys.readouterr().out == describe_sample(trace, 39)


def test_the_verb_shows_text_with_control_characters_made_visible(run, prefixes, tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models

    words = {f"w{i}\x1b[2J\n": i for i in range(3000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0\x1b[2J\n"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    record_of(blend(run, prefixes)).save(record_path(run))
    main(["trace", str(run), "--sample", "0", "--tokenizer", str(tmp_path / "tokenizer.json")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    found = Trace.open(run).sample(0)
    first = FIRST[found.dataset.name] + sum(
        LENGTHS[found.dataset.name][: found.pieces[0].document], found.pieces[0].start
    )
    assert f"w{first}␛[2J↵" in shown
    assert len(shown.splitlines()) == 2 + len(found.pieces)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sample", "0"], "give RUN, or the job's --data-cache-path"),
        (["RUN", "--data-cache-path", "x", "--sample", "0"], "not both"),
        (["RUN", "--match", "x", "--sample", "0"], "--match chooses in --data-cache-path"),
        (["RUN"], "--spikes, --sample K or --document NAME:ID"),
        (["RUN", "--document", "web"], "NAME:ID"),
        (["RUN", "--document", "web:x"], "NAME:ID"),
        (["RUN", "--sample", "60"], "sample 60 is not among"),
        (["RUN", "--sample", "0", "--tokenizer", "none.json"], "cannot read tokenizer none.json"),
    ],
)
def test_the_verb_refuses_in_one_line(run, prefixes, words, sentence, capsys):
    record_of(blend(run, prefixes)).save(record_path(run))
    with pytest.raises(SystemExit) as caught:
        main(["trace", *(str(run) if word == "RUN" else word for word in words)])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


CYCLIC = DataRecord((), UntracedRecord("--dataloader-type cyclic"), start=24)


def test_samples_of_another_loader_are_refused_and_those_before_are_traced(run, prefixes, capsys):
    blended, path = blend(run, prefixes), record_path(run)
    record_of(blended).save(path)
    CYCLIC.save(path)
    trace, read = Trace.open(run), truth(blended)
    assert len(trace) == 24
    assert [traced(trace.sample(k)) for k in range(24)] == read[:24]
    for k in (24, 59, 10**6):
        with pytest.raises(TokscaleError, match=r"sample \d+ is not known.*loader-type cyclic"):
            trace.sample(k)
    name, document = read[0][0][:2]
    holding = [k for k in range(24) if (name, document) in {t[:2] for t in read[k]}]
    assert trace.document(name, document, 24).tolist() == holding
    for until in (None, 25):
        with pytest.raises(
            TokscaleError, match=r"until-sample 24\): from sample 24 on --dataloader"
        ):
            trace.document(name, document, until)
    with pytest.raises(SystemExit):
        main(["trace", str(run), "--sample", "30"])
    assert capsys.readouterr().err.count("\n") == 1


def test_samples_after_those_of_another_loader_are_traced_again(run, prefixes):
    blended, path = blend(run, prefixes), record_path(run)
    CYCLIC.save(path)
    replace(CYCLIC, start=32).save(path)  # a second launch of the same
    record_of(blended, start=40).save(path)
    assert [record.start for record in load_records(path)] == [24, 40]
    trace = Trace.open(run)
    assert [traced(trace.sample(k)) for k in range(40, 60)] == truth(blended)[40:]
    with pytest.raises(TokscaleError, match="from sample 24 on --dataloader-type cyclic"):
        trace.sample(39)


def test_a_job_that_starts_anew_leaves_no_record_of_the_one_before(run, prefixes):
    path = record_path(run)
    record_of(blend(run, prefixes)).save(path)
    path.write_text("torn")  # nor does one that cannot be read stop it
    replace(CYCLIC, start=0).save(path)
    assert load_records(path) == (replace(CYCLIC, start=0),)
    with pytest.raises(TokscaleError, match="sample 3 is not known"):
        Trace.open(run).sample(3)
    with pytest.raises(TokscaleError, match=r"sample -1 is not among .* of this job: none"):
        Trace.open(run).sample(-1)
    with pytest.raises(TokscaleError, match="that read web are not all known"):
        Trace.open(run).document("web", 0)


def test_a_record_of_an_older_version_is_read(run, prefixes):
    path = record_path(run)
    record_of(blend(run, prefixes)).save(path)
    content = json.loads(path.read_text()) | {"schema_version": 1}
    content["records"][0]["kind"] = "blend"
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert load_records(path) == (record_of(blend(run, prefixes)),)

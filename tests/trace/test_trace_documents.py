"""The trace of strata of documents, against the tokens that Megatron's own datasets return."""

from dataclasses import replace

import numpy as np
import pytest
from document_plans import (
    LENGTHS,
    dataset_of,
    documents_in,
    follow,
    plan_of,
    write_data,
)
from gpt_datasets import read_tokens

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Decision, with_decisions
from megatron_tokscale.data.history import save_run_plan
from megatron_tokscale.data.record import (
    DataRecord,
    DatasetRecord,
    PlanRecord,
    check_order,
    load_records,
    record_path,
)
from megatron_tokscale.trace.text import describe_document, describe_sample
from megatron_tokscale.trace.trace import Trace

N = 150


@pytest.fixture
def prefixes(tmp_path):
    return write_data(tmp_path)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run/tokscale").mkdir(parents=True)
    return tmp_path / "run"


def record_of(planned, cache, prefixes) -> DataRecord:
    plan = planned.plan
    rows = []
    for packing, dataset in zip(plan.packings, planned.datasets, strict=True):
        stratum = plan.strata[packing.strata.start].name if packing.is_stratum else ""
        rows.append(
            DatasetRecord.unused(list(prefixes.values())[packing.dataset], stratum)
            if dataset is None
            else DatasetRecord.from_gpt_dataset(dataset, stratum)
        )
    files = tuple(None if file is None else str(file) for file in planned.strata.files)
    return DataRecord(tuple(rows), PlanRecord(str(cache), plan.fingerprint, N, files))


def assert_traces(run, planned, prefixes):
    """Every sample to its tokens, and every document to its samples."""
    trace, readers = Trace.open(run), {}
    for k in range(N):
        found, tokens = trace.sample(k), read_tokens(planned[k])
        file = IndexedTokens.open(prefixes[dataset_of(tokens)])
        read = [file.sequence(row.document)[row.start : row.stop] for row in found.pieces]
        assert np.concatenate(read).tolist() == tokens
        stratum, epoch, number = planned.locate(k)
        expected = (planned.plan.strata[stratum].name, epoch, number)
        assert (found.stratum, found.epoch, found.number) == expected
        for document in {*documents_in(planned[k])[1]}:
            readers.setdefault((found.name, document), []).append(k)
    for name, lengths in LENGTHS.items():
        for document in range(len(lengths)):
            expected = readers.get((name, document), [])
            assert trace.document(name, document).tolist() == expected
            some = trace.document(name, document, until=75).tolist()
            assert some == [k for k in expected if k < 75]
    return trace


def test_samples_and_documents_of_document_strata_are_traced(run, prefixes, tmp_path):
    plan = plan_of(prefixes)
    planned = follow(plan, prefixes, tmp_path / "cache", N)
    save_run_plan(plan, [], run)
    record_of(planned, tmp_path / "cache", prefixes).save(record_path(run))
    trace = assert_traces(run, planned, prefixes)
    (record,) = load_records(record_path(run))
    assert [row.stratum for row in record.datasets] == ["web/0", "web/1", "web/2", "", ""]
    assert len({row.sample_index for row in record.datasets}) == 5
    k = next(k for k in range(N) if trace.sample(k).stratum == "web/1")
    assert f"of web, stratum web/1, epoch {trace.sample(k).epoch}" in describe_sample(trace, k)
    document = trace.sample(k).pieces[0].document
    assert f"sample {k}: tokens" in describe_document(trace, "web", document)


def test_decisions_on_strata_are_traced(run, prefixes, tmp_path):
    plan = plan_of(prefixes)
    decisions = [Decision(3, 40, (1, 1, 1), (1, 0, 1, 1, 1, 3)), Decision(6, 90, (2, 1, 1))]
    planned = follow(with_decisions(plan, decisions), prefixes, tmp_path / "cache", N)
    save_run_plan(plan, decisions, run)
    record_of(planned, tmp_path / "cache", prefixes).save(record_path(run))
    assert_traces(run, planned, prefixes)


def test_strata_of_a_dataset_that_the_job_has_left_out_since_are_traced(run, prefixes, tmp_path):
    first, *later = plan_of(prefixes).stages
    plan = plan_of(prefixes, stages=(first, *(replace(s, weights=(0, 1, 1)) for s in later)))
    planned = follow(plan, prefixes, tmp_path / "cache", N)
    save_run_plan(plan, [], run)
    record = record_of(planned, tmp_path / "cache", prefixes)
    record.save(record_path(run))
    gone = [
        DatasetRecord.unused(row.prefix, row.stratum) if row.stratum else row
        for row in record.datasets
    ]
    replace(record, datasets=tuple(gone), start=80).save(record_path(run))
    assert_traces(run, planned, prefixes)


def test_a_job_with_another_order_of_a_divided_dataset_is_refused(run, prefixes, tmp_path):
    planned = follow(plan_of(prefixes), prefixes, tmp_path / "cache", N)
    record_of(planned, tmp_path / "cache", prefixes).save(record_path(run))
    job = DatasetRecord.of_job(planned.datasets[0])
    check_order(record_path(run), [job])
    with pytest.raises(TokscaleError, match="the samples of web that the run has consumed are of"):
        check_order(record_path(run), [replace(job, order="--seed 7, --split 1,0,0")])

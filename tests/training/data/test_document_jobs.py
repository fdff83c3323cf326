"""Jobs under a plan that divides documents: what they train on, their trace, and bad plans."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import EOD, Corpus, job_flags, markov_documents, write_documents
from megatrons import OLD, python_path
from planned_jobs import dataset_of, document_plan, make_scores, stream_of, with_falls
from recorded_job import read_samples, run_recorded

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Plan
from megatron_tokscale.data.document_strata import held_out_documents
from megatron_tokscale.data.record import load_records, record_path
from megatron_tokscale.data.scores import data_digest, identity_of
from megatron_tokscale.trace.trace import Trace


@pytest.fixture(scope="module")
def scores(corpus: Corpus):
    return [with_falls(make_scores(p, seed), seed) for seed, p in enumerate(corpus.prefixes)]


@pytest.fixture(scope="module")
def plan(corpus: Corpus, scores) -> Plan:
    return document_plan(corpus, scores)


def save(plan, scores, folder: Path) -> tuple[str, ...]:
    """Write a plan and its scores; return the flags of a job that follows it."""
    plan.save(folder / "plan.json")
    for one in scores:
        one.save(folder / f"{one.dataset.name}.tokscale.safetensors")
    return (
        *("--tokscale-plan", str(folder / "plan.json"), "--tokscale-scores-dir", str(folder)),
        *("--data-cache-path", str(folder / "cache"), "--train-iters", "14"),
    )


@pytest.mark.megatron
def test_killed_and_resumed_on_more_ranks_the_job_reads_and_traces_the_samples_of_the_plan(
    corpus, plan, scores, tmp_path, capsys
):
    run = tmp_path / "run"
    flags = (*save(plan, scores, tmp_path), "--save", str(run), "--load", str(run))
    flags = (*flags, "--save-interval", "4", "--ckpt-format", "torch_dist")
    stream = stream_of(dataset_of(plan, corpus.prefixes, 112, tmp_path / "offline", scores))
    run_recorded(corpus, tmp_path / "killed", 1, *flags, stop=11)
    assert read_samples(tmp_path / "killed") == {k: stream[k] for k in range(80)}
    run_recorded(corpus, tmp_path / "resumed", 2, *flags, "--num-workers", "2")
    assert read_samples(tmp_path / "resumed") == {k: stream[k] for k in range(64, 112)}

    # Every sample is traced to the documents whose tokens it has read, and they to the samples.
    trace, files = Trace.open(run), [IndexedTokens.open(prefix) for prefix in corpus.prefixes]
    readers: dict[tuple[str, int], list[int]] = {}
    for k in range(112):
        found = trace.sample(k)
        tokens = files[corpus.prefixes.index(found.dataset.prefix)]
        read = [tokens.sequence(piece.document)[piece.start : piece.stop] for piece in found.pieces]
        assert tuple(np.concatenate(read).tolist()) == stream[k]
        assert found.dataset.stratum == (found.stratum if found.name == "left" else "")
        for document in {piece.document for piece in found.pieces}:
            readers.setdefault((found.name, document), []).append(k)
    for name, documents in (("left", 300), ("right", 300)):
        for document in range(documents):
            expected = readers.get((name, document), [])
            assert trace.document(name, document).tolist() == expected
    held = held_out_documents(plan, 0, scores[0], plan.documents[0], files[0].lengths)
    assert [len(row) for row in held] == [5, 5, 5]
    assert not {("left", int(document)) for row in held for document in row} & readers.keys()

    # The record names the index files of every stratum; the verbs take the run as any other.
    (record,) = load_records(record_path(run))
    assert [row.stratum for row in record.datasets] == ["left/0", "left/1", "left/2", ""]
    assert len({row.document_index for row in record.datasets}) == 4
    assert all(Path(row.sample_index).is_file() for row in record.datasets)
    main(["trace", str(run), "--sample", "3"])
    main(["plan", "show", str(run)])
    assert "sample 3: sample" in capsys.readouterr().out


@pytest.mark.megatron
def test_both_chunks_of_a_virtual_pipeline_read_the_same_samples(corpus, plan, scores, tmp_path):
    flags = (*save(plan, scores, tmp_path), "--tokscale-dir", str(tmp_path / "run"))
    layout = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
    run_recorded(corpus, tmp_path / "seen", 2, *layout, *flags)
    offline = dataset_of(plan, corpus.prefixes, 112, tmp_path / "offline", scores)
    assert read_samples(tmp_path / "seen") == stream_of(offline)


@pytest.mark.megatron
@pytest.mark.parametrize("version", OLD)
def test_strata_of_documents_in_older_megatrons(corpus, plan, scores, tmp_path, version):
    flags = (*save(plan, scores, tmp_path), "--tokscale-dir", str(tmp_path / "run"))
    path = python_path(version)
    run_recorded(corpus, tmp_path / "seen", 1, *flags, "--num-workers", "2", python_path=path)
    offline = dataset_of(plan, corpus.prefixes, 112, tmp_path / "offline", scores)
    assert read_samples(tmp_path / "seen") == stream_of(offline)


# Without a job


def prepare(corpus: Corpus, flags, run: Path, capsys) -> str:
    """The one line with which `plan prepare` refuses a job."""
    with pytest.raises(SystemExit) as caught:
        main(["plan", "prepare", "--", *job_flags(corpus, *flags, "--tokscale-dir", str(run))])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert not run.exists()
    return lines[-1]


def grown(corpus: Corpus, folder: Path) -> Corpus:
    """The corpus after one more document was added to left."""
    folder.mkdir()
    left = write_documents(folder / "left", [*markov_documents(0), [1, 2, 3, EOD]])
    return replace(corpus, prefixes=(left, corpus.prefixes[1]))


def test_documents_added_since_the_plan_was_made(corpus, plan, scores, tmp_path, capsys):
    flags = save(plan, scores, tmp_path)
    line = prepare(grown(corpus, tmp_path / "data"), flags, tmp_path / "run", capsys)
    assert "the plan is for other data: it has left (300 sequences" in line
    assert "the job has left (301 sequences" in line


def test_documents_added_since_the_scores_were_made(corpus, plan, scores, tmp_path, capsys):
    more = grown(corpus, tmp_path / "data")
    identity = identity_of(IndexedTokens.open(more.prefixes[0]))
    later = replace(plan, datasets=(identity, plan.datasets[1]), documents=((0, 271), (0, 270)))
    line = prepare(more, save(later, scores, tmp_path), tmp_path / "run", capsys)
    assert "were made for other data or another tokenizer: they are for left (300 seq" in line
    assert line.endswith("make them again with `megatron-tokscale score`")


def test_scores_of_another_tokenizer(corpus, plan, scores, tmp_path, capsys):
    foreign = replace(scores[0], digest="0" * 16)
    cut = replace(plan.cuts[0], scores=foreign.fingerprint)
    other = replace(plan, cuts=(cut, plan.cuts[1]))
    flags = save(other, [foreign, scores[1]], tmp_path)
    line = prepare(corpus, flags, tmp_path / "run", capsys)
    assert "the tokens of left" in line and "are not those that were scored" in line
    assert data_digest(IndexedTokens.open(corpus.prefixes[0])) == scores[0].digest


def test_scores_without_falls(corpus, plan, scores, tmp_path, capsys):
    bare = replace(scores[0], fall_Q=None)
    cut = replace(plan.cuts[0], scores=bare.fingerprint)
    flags = save(replace(plan, cuts=(cut, plan.cuts[1])), [bare, scores[1]], tmp_path)
    assert "the scores of left have no falls; " in prepare(corpus, flags, tmp_path / "run", capsys)


@pytest.mark.parametrize("edges", [(1.0, 99.0), (-99.0, 99.0)])
def test_an_empty_stratum(corpus, plan, scores, tmp_path, capsys, edges):
    cut = replace(plan.cuts[0], edges=edges)
    flags = save(replace(plan, cuts=(cut, plan.cuts[1])), scores, tmp_path)
    line = prepare(corpus, flags, tmp_path / "run", capsys)
    assert "of the plan has no 32 training tokens for a sample" in line
    assert "make the plan with fewer quantiles" in line
    assert not list((tmp_path / "cache").glob("tokscale-*-index")), "no index is built in vain"


def test_a_plan_prepared_before_the_job_has_an_index_of_every_stratum(
    corpus, plan, scores, tmp_path, capsys
):
    flags = (*save(plan, scores, tmp_path), "--tokscale-dir", str(tmp_path / "run"))
    main(["plan", "prepare", "--", *job_flags(corpus, *flags)])
    folders = {path.parent for path in (tmp_path / "cache").rglob("*document_index.npy")}
    assert len(folders) == 4
    assert f"the plan's files are in {tmp_path / 'cache'}" in capsys.readouterr().out

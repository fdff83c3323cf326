"""The record that `trace` reads tells the training data of a real job, or that it is unknown."""

import pytest
from jobs import Corpus
from recorded_job import read_samples, run_recorded

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.record import load_records, record_path
from megatron_tokscale.trace.trace import Trace

pytestmark = pytest.mark.megatron

CYCLIC = ("--dataloader-type", "cyclic")


def flags(corpus: Corpus, folder, n_steps, *extra):
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "first")
    save = ("--save", str(folder), "--load", str(folder), "--save-interval", "4")
    # One length of training for all launches: Megatron orders its samples for it.
    length = ("--train-iters", "12", "--exit-interval", str(n_steps))
    return (*probe, *save, *length, *extra)


def tokens_of(trace: Trace, k: int) -> tuple[int, ...]:
    found = trace.sample(k)
    file = IndexedTokens.open(found.dataset.prefix)
    return tuple(
        int(token)
        for piece in found.pieces
        for token in file.sequence(piece.document)[piece.start : piece.stop]
    )


def test_a_cyclic_loader_that_resumes_a_single_one(corpus: Corpus, tmp_path):
    run_recorded(corpus, tmp_path / "a", 2, *flags(corpus, tmp_path / "run", 4))
    run_recorded(corpus, tmp_path / "b", 2, *flags(corpus, tmp_path / "run", 8, *CYCLIC))
    single, trace = read_samples(tmp_path / "a"), Trace.open(tmp_path / "run")
    assert sorted(single) == list(range(32))
    assert {k: tokens_of(trace, k) for k in single} == single
    assert min(read_samples(tmp_path / "b")) == 32
    with pytest.raises(TokscaleError, match="from sample 32 on --dataloader-type cyclic orders"):
        trace.sample(32)


def test_a_cyclic_job_that_starts_anew(corpus: Corpus, tmp_path):
    words = [word for word in flags(corpus, tmp_path / "run", 4) if word != "--load"]
    words.remove(str(tmp_path / "run"))
    words += ["--save", str(tmp_path / "run"), "--exit-interval", "1"]
    run_recorded(corpus, tmp_path / "a", 1, *words)
    assert load_records(record_path(tmp_path / "run"))[0].kind == "blend"
    run_recorded(corpus, tmp_path / "b", 1, *words, *CYCLIC)
    (record,) = load_records(record_path(tmp_path / "run"))
    assert (record.kind, record.start) == ("untraced", 0)
    with pytest.raises(TokscaleError, match=r"sample 0 is not known.*--dataloader-type cyclic"):
        Trace.open(tmp_path / "run").sample(0)


def test_a_virtual_pipeline_has_a_record(corpus: Corpus, tmp_path):
    """Its last model chunk on the first rank reads no data."""
    layout = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
    words = flags(corpus, tmp_path / "run", 1, *layout)
    run_recorded(corpus, tmp_path / "a", 2, *words)
    trace, read = Trace.open(tmp_path / "run"), read_samples(tmp_path / "a")
    assert {k: tokens_of(trace, k) for k in read} == read


def test_mock_data_is_recorded_as_unknown(corpus: Corpus, tmp_path):
    words = flags(corpus, tmp_path / "run", 1, "--mock-data")
    run_recorded(corpus, tmp_path / "a", 1, *words, data=[])
    with pytest.raises(TokscaleError, match="a dataset of type MockGPTDataset orders"):
        Trace.open(tmp_path / "run").sample(0)


def test_only_megatrons_own_order_is_traced():
    """Datasets that look like a blend, and flags that order its samples otherwise."""
    from argparse import Namespace

    from megatron_tokscale.training.data.records import untraceable

    class Concatenated:
        datasets = ()

    single = Namespace(dataloader_type="single")
    assert untraceable(Concatenated(), single) == "a dataset of type Concatenated"
    assert untraceable(None, single) == "a dataset of type NoneType"
    for loader in ("external", "batch"):
        args = Namespace(dataloader_type=loader)
        assert untraceable(None, args) == f"--dataloader-type {loader}"
    for name in ("hybrid_context_parallel", "perform_rl_step"):
        args = Namespace(dataloader_type="single", **{name: True})
        assert untraceable(None, args) == f"--{name.replace('_', '-')}"

"""Losses of training samples that jobs record are those of a plain torch model, sample by sample.

The jobs train with a learning rate of 0 and without dropout, so that one checkpoint has the weights
of all steps. A plain model, which knows no Megatron, computes the losses of the samples' tokens.

Shapes: Q samples, B sequences, S sequence length.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from checkpoints import read_checkpoint
from jobs import EOD, MODEL, SEQ_LENGTH, Corpus, job_flags, kill_job_at, run_forked, run_job
from numpy.testing import assert_allclose, assert_array_equal
from plain_gpt import plain_losses

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.sample_losses import Records, SampleLosses
from megatron_tokscale.trace.trace import Trace

pytestmark = pytest.mark.megatron

# In training the loss mask leaves out the ends of documents, as Megatron's --eod-mask-loss does for
# a tokenizer that knows them.
MASKING = f"""
import sys
import torch
from megatron_tokscale import pretrain

if "--context-parallel-size" in sys.argv:
    import context_parallel
    context_parallel.use_gathering_attention()

get_batch = pretrain.get_batch

def masked_batch(*args):
    batch = get_batch(*args)
    if torch.is_grad_enabled() and batch.get("loss_mask") is not None:
        batch["loss_mask"] = batch["loss_mask"] * (batch["labels"] != {EOD})
    return batch

pretrain.get_batch = masked_batch
pretrain.main()
"""
STILL = (
    *("--lr", "0", "--min-lr", "0", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--ckpt-format", "torch_dist"),
)
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    # Four microbatches a step, of two samples.
    "TP2 SP x PP2": (4, (*PP2, "--tensor-model-parallel-size", "2", "--sequence-parallel")),
    # Four samples a step up to sample 8, and twelve from there on.
    "VPP 2x2, batches that grow": (
        2,
        (
            *(*PP2, "--num-layers-per-virtual-pipeline-stage", "1"),
            *("--step-batch-size-schedule", "0:4 256:12", "--train-samples", "44"),
            *("--lr-decay-samples", "44", "--eval-global-batch-size", "4"),
        ),
    ),
    "DP2 with workers": (2, ("--num-workers", "2", "--log-interval", "3")),
    "CP2 x DP2": (4, ("--context-parallel-size", "2")),
}
SIZES = {"VPP 2x2, batches that grow": [4, 4, 12, 12, 12]}


def recording(corpus: Corpus, run: Path, schedule: str = "linear:1") -> tuple[str, ...]:
    """Return the flags of a job that records its samples, with a checkpoint at its end."""
    return (
        *("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", schedule),
        *("--tokscale-sample-losses", "--save", str(run), "--save-interval", "3"),
    )


def recorded(run: Path) -> SampleLosses:
    return SampleLosses.of_training(RunPaths(run).samples)


def sample_tokens(run: Path, sample_Q: np.ndarray) -> np.ndarray:
    """Return the tokens of samples and of the last label, read from the documents' files."""
    trace, rows = Trace.open(run), []
    for k in sample_Q.tolist():
        found = trace.sample(k)
        tokens = IndexedTokens.open(found.dataset.prefix)
        parts = [tokens.sequence(p.document)[p.start : p.stop] for p in found.pieces]
        rows.append(np.concatenate(parts))
    return np.array(rows, np.int32)


def brute_force(run: Path, records_Q: Records) -> tuple[np.ndarray, np.ndarray]:
    """Return loss_QS under the job's checkpoint, NaN outside the loss mask, and the mask."""
    tokens = sample_tokens(run, records_Q["sample"])
    is_in_QS = tokens[:, 1:] != EOD
    return np.where(is_in_QS, losses_of(run, tokens), np.nan), is_in_QS


def losses_of(run: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the losses of samples of `tokens` under the job's last checkpoint."""
    return plain_losses(
        read_checkpoint(max(run.glob("iter_*")))["sharded"],
        tokens[:, :-1],
        tokens[:, 1:],
        n_layers=int(MODEL["--num-layers"]),
        n_heads=int(MODEL["--num-attention-heads"]),
    ).numpy()


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that trains in a layout, once, and returns the run directory."""
    return cache(lambda layout: train(corpus, tmp_path_factory.mktemp("run"), layout))


def train(corpus: Corpus, run: Path, layout: str) -> Path:
    ranks, flags = LAYOUTS[layout]
    script = run / "masking.py"
    script.write_text(MASKING)
    in_steps = ("--global-batch-size", "--lr-decay-iters", "--lr-warmup-iters")
    without = in_steps if layout in SIZES else ()
    length = () if layout in SIZES else ("--train-iters", "5")
    words = (*STILL, *length, *recording(corpus, run), *flags)
    words = job_flags(corpus, *words, without=without)
    run_forked(ranks, str(script), *words)
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sample_has_the_losses_of_a_plain_model(trained, layout):
    run = trained(layout)
    sizes = SIZES.get(layout, [8] * 5)
    records_Q = recorded(run).read(1, 5)
    assert_array_equal(records_Q["sample"], np.arange(sum(sizes)))
    assert_array_equal(records_Q["step"], np.repeat(np.arange(1, 6), sizes))
    loss_QS, is_in_QS = brute_force(run, records_Q)
    assert not is_in_QS.all()
    assert_array_equal(records_Q["n_tokens"], is_in_QS.sum(1))
    assert_allclose(records_Q["mean"], np.nanmean(loss_QS, axis=1), rtol=0, atol=1e-5)
    assert_allclose(records_Q["largest"], np.nanmax(loss_QS, axis=1), rtol=0, atol=1e-5)
    assert_array_equal(records_Q["position"], np.nanargmax(loss_QS, axis=1))
    assert np.std(records_Q["mean"]) > 1e-3  # the losses tell the samples apart
    sums = recorded(run).step_sums()
    logged = {record.step: record.training_loss for record in Run.open(run).records}
    assert_allclose(sums.mean_T, [logged[int(step)] for step in sums.step_T], rtol=1e-5)


def test_a_replayed_step_has_the_losses_of_its_samples_in_another_layout(corpus, trained):
    """Under the checkpoint of step 3: the step's own checkpoint has learned from its samples."""
    run = trained("DP2 with workers")
    flags = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replay", str(run))
    layout = ("--tensor-model-parallel-size", "2", "--ckpt-format", "torch_dist")
    run_job(corpus, 2, *flags, "--tokscale-replay-step", "5", *layout)
    (losses,) = SampleLosses.replayed(RunPaths(run).samples).values()
    assert losses.headers[0].checkpoint == 3
    assert losses.headers[0].run_id == Run.open(run).info.run_id
    records_Q = losses.read(5, 5)
    assert_array_equal(records_Q["sample"], np.arange(4 * 8, 5 * 8))
    tokens = sample_tokens(run, records_Q["sample"])
    loss_QS = losses_of(run, tokens)
    assert_array_equal(records_Q["n_tokens"], SEQ_LENGTH)
    assert_allclose(records_Q["mean"], loss_QS.mean(1), rtol=0, atol=1e-5)
    assert_allclose(records_Q["largest"], loss_QS.max(1), rtol=0, atol=1e-5)
    assert_array_equal(records_Q["position"], loss_QS.argmax(1))
    # The training's records, whose loss mask its script makes, are as they were.
    assert recorded(run).n_samples == 5 * 8


def test_a_job_killed_and_resumed_in_another_layout_has_each_sample_once(corpus, tmp_path):
    """Two data-parallel ranks are killed after step 7; one goes on from step 4's checkpoint."""
    save = ("--train-iters", "12", "--load", str(tmp_path), "--save-interval", "4")
    flags = (*recording(corpus, tmp_path), *save)
    log = tmp_path / "log"
    kill_job_at(corpus, 2, "tokscale probe at step 7", log, *flags)
    torn = next(RunPaths(tmp_path).samples.glob("rank_00001*"))
    torn.write_bytes(torn.read_bytes() + b"torn")
    before = recorded(tmp_path).read(1, 100)
    assert before["step"].max() >= 6
    run_job(corpus, 1, *flags)

    records_Q = recorded(tmp_path).read(1, 100)
    assert_array_equal(records_Q["sample"], np.arange(12 * 8))
    assert_array_equal(records_Q["step"], np.repeat(np.arange(1, 13), 8))
    is_kept = before["step"] <= 4
    assert_array_equal(records_Q[: 4 * 8], before[is_kept])
    abandoned = SampleLosses(sorted((RunPaths(tmp_path).samples / "abandoned").iterdir()))
    assert_array_equal(abandoned.read(1, 100), before[~is_kept])
    launches = Run.open(tmp_path).info.launches
    headers = recorded(tmp_path).headers
    assert {(each.first_step, each.launch_id) for each in headers} == {
        (launch.step, launch.launch_id) for launch in launches
    }
    assert {each.run_id for each in headers} == {Run.open(tmp_path).info.run_id}


NAN_AT_THIRD_STEP = """
import torch
from megatron_tokscale import pretrain

forward_step, calls = pretrain.forward_step, []

def poisoned_forward_step(iterator, model):
    output, loss = forward_step(iterator, model)
    calls.extend([1] * model.training)
    if len(calls) == 11:
        output = output * torch.where(torch.arange(2) == 1, torch.nan, 1.0)[:, None]
    return output, loss

pretrain.forward_step = poisoned_forward_step
pretrain.main()
"""


def test_the_sample_that_ends_a_job_with_nan_is_on_disk(corpus, tmp_path):
    """Of the third step's four microbatches, the third has a NaN: in its second sample."""
    script = tmp_path / "nan.py"
    script.write_text(NAN_AT_THIRD_STEP)
    flags = (*recording(corpus, tmp_path), "--train-iters", "4", "--log-interval", "100")
    with pytest.raises(AssertionError, match="NaN"):
        run_forked(1, str(script), *job_flags(corpus, *flags))
    records_Q = recorded(tmp_path).read(1, 100)
    assert_array_equal(records_Q["sample"], np.arange(3 * 8))
    assert records_Q["sample"][np.isnan(records_Q["mean"])].tolist() == [21]
    assert records_Q["step"][-1] == 3
    assert records_Q["n_tokens"][0] == SEQ_LENGTH

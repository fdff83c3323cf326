"""In every parallel layout: the losses of one process, and a training that no probe has touched.

One process trains each model; every layout loads those weights and trains on, with dropout, once
with probes and once without.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoints import checkpoint_differences, read_checkpoint
from jobs import MODEL, TESTS, Corpus, job_flags, run_forked
from numpy.testing import assert_allclose
from plain_gpt import plain_losses

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.sample_losses import SampleLosses

pytestmark = pytest.mark.megatron

PRETRAIN = ("-m", "megatron_tokscale.pretrain")
CONTEXT_PARALLEL = (str(TESTS / "context_parallel.py"),)
HYBRID = (str(TESTS / "hybrid.py"),)

TP2 = ("--tensor-model-parallel-size", "2")
SP = ("--sequence-parallel",)
PP2 = ("--pipeline-model-parallel-size", "2")
VPP2 = ("--num-layers-per-virtual-pipeline-stage", "1")
CP2 = ("--context-parallel-size", "2")
CP4 = ("--context-parallel-size", "4")
EP2 = ("--expert-model-parallel-size", "2")
ETP1 = ("--expert-tensor-parallel-size", "1")
ETP2 = ("--expert-tensor-parallel-size", "2")
OVERLAPS = (
    *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    # The other format keeps the padding between parameters, which nobody has written.
    "--dist-ckpt-optim-fully-reshardable",
)
RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
MOE = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-input-jitter-eps", "0.01"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
)
MAMBA = ("--mamba-head-dim", "8", "--mamba-num-groups", "2", "--mamba-state-dim", "6")


class Model(NamedTuple):
    """A kind of model: what it adds to and takes from the tests' flags, and who trains it."""

    flags: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    script: tuple[str, ...] = PRETRAIN


MODELS = {
    "dense": Model(),
    "tied": Model(without=("--untie-embeddings-and-output-weights",)),
    "bf16": Model(("--bf16",)),
    "MTP": Model(("--mtp-num-layers", "1")),
    "MoE": Model(MOE),
    "hybrid": Model((*MAMBA, "--hybrid-layer-pattern", "M*-M*-M-"), ("--num-layers",), HYBRID),
}

# No sum changes its order: not one bit may differ.
EXACT = 0.0
# Sums in another order, or matrix products of another shape, in float32. Seen: 1e-6.
CLOSE = 1e-5
# The same with 8 bits. Seen: 4e-3, which is also how far bf16 and float32 are apart on one process.
CLOSE_BF16 = 1e-2


class Layout(NamedTuple):
    """Ranks, flags, how far in nats from one process, and the script if it is not the model's."""

    model: str
    name: str
    ranks: int
    flags: tuple[str, ...]
    tolerance: float
    script: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


LAYOUTS = [
    Layout("dense", "one process", 1, (), EXACT),
    Layout("dense", "PP2", 2, PP2, EXACT),
    Layout("dense", "PP2 uneven", 2, (*PP2, "--decoder-first-pipeline-num-layers", "1"), EXACT),
    Layout("dense", "VPP 2x2", 2, (*PP2, *VPP2), EXACT),
    Layout("dense", "DP2", 2, (), EXACT),
    Layout("dense", "DP2 overlaps", 2, OVERLAPS, EXACT),
    Layout("dense", "VPP 2x2 x DP2 overlaps", 4, (*PP2, *VPP2, *OVERLAPS), EXACT),
    Layout("dense", "TP2", 2, TP2, CLOSE),
    Layout("dense", "TP2 SP", 2, (*TP2, *SP), CLOSE),
    Layout("dense", "TP2 x PP2", 4, (*TP2, *PP2), CLOSE),
    Layout("dense", "TP2 SP x DP2 overlaps", 4, (*TP2, *SP, *OVERLAPS), CLOSE),
    Layout("dense", "PP2 recompute", 2, (*PP2, *RECOMPUTE), EXACT),
    Layout("dense", "TP2 recompute", 2, (*TP2, *RECOMPUTE), CLOSE),
    Layout("dense", "CP2", 2, CP2, CLOSE, CONTEXT_PARALLEL),
    Layout("dense", "CP4", 4, CP4, CLOSE, CONTEXT_PARALLEL),
    Layout("dense", "CP2 x DP2 overlaps", 4, (*CP2, *OVERLAPS), CLOSE, CONTEXT_PARALLEL),
    Layout("dense", "TP2 SP x CP2", 4, (*TP2, *SP, *CP2), CLOSE, CONTEXT_PARALLEL),
    Layout("dense", "CP2 x VPP 2x2", 4, (*CP2, *PP2, *VPP2), CLOSE, CONTEXT_PARALLEL),
    Layout("tied", "PP2", 2, PP2, EXACT),
    Layout("tied", "VPP 2x2", 2, (*PP2, *VPP2), EXACT),
    Layout("tied", "TP2 x PP2", 4, (*TP2, *PP2), CLOSE),
    Layout("bf16", "PP2", 2, PP2, EXACT),
    Layout("bf16", "DP2 overlaps", 2, OVERLAPS, EXACT),
    Layout("bf16", "TP2", 2, TP2, CLOSE_BF16),
    Layout("MTP", "PP2", 2, PP2, EXACT),
    Layout("MTP", "VPP 2x2", 2, (*PP2, *VPP2), EXACT),
    Layout("MTP", "TP2 SP", 2, (*TP2, *SP), CLOSE),
    Layout("MoE", "PP2", 2, PP2, EXACT),
    Layout("MoE", "VPP 2x2", 2, (*PP2, *VPP2), EXACT),
    Layout("MoE", "DP2", 2, (), EXACT),
    Layout("MoE", "EP2 overlaps", 2, (*EP2, *OVERLAPS), CLOSE),
    Layout("MoE", "TP2 SP x ETP2", 2, (*TP2, *SP, *ETP2), CLOSE),
    Layout("MoE", "TP2 SP x ETP1 x EP2", 2, (*TP2, *SP, *ETP1, *EP2), CLOSE),
    Layout("MoE", "TP2 SP x ETP2 x EP2", 4, (*TP2, *SP, *ETP2, *EP2), CLOSE),
    Layout("MoE", "EP2 x CP2", 2, (*EP2, *CP2), CLOSE, CONTEXT_PARALLEL),
    Layout("hybrid", "PP2", 2, PP2, EXACT),
    Layout("hybrid", "VPP 2x2", 2, (*PP2, "--hybrid-layer-pattern", "M*|-M|*-|M-"), EXACT),
    Layout("hybrid", "DP2 overlaps", 2, OVERLAPS, EXACT),
    Layout("hybrid", "TP2 SP", 2, (*TP2, *SP), CLOSE),
    Layout("hybrid", "CP2", 2, CP2, CLOSE),
]


class Jobs:
    """The matrix's jobs, each run once, when it is asked for first."""

    def __init__(self, corpus: Corpus, folder: Path):
        self._corpus = corpus
        self._folder = folder
        self.reference = cache(self.reference)
        self.probed = cache(self.probed)
        self.unprobed = cache(self.unprobed)

    def reference(self, model: str) -> Path:
        """One process trains for 8 steps, and is probed before and after."""
        run = self._folder / model
        save = ("--save", str(run), "--save-interval", "8", "--train-iters", "8")
        self._run(Layout(model, "", 1, (), EXACT), *save, *self._probe("list:0,8"))
        return run

    def probed(self, layout: Layout) -> Path:
        """The trained weights in `layout`, trained on for 4 steps with probes and sample losses."""
        probe = self._probe("list:0,1,2,4")
        return self._continue(layout, "with", *probe, "--tokscale-sample-losses")

    def unprobed(self, layout: Layout) -> Path:
        return self._continue(layout, "without")

    def _continue(self, layout: Layout, name: str, *flags: str) -> Path:
        run = self._folder / f"{layout} {name}"
        load = ("--load", str(self.reference(layout.model)), "--finetune")
        save = ("--save", str(run), "--save-interval", "4", "--train-iters", "4")
        self._run(layout, *load, *save, *flags)
        return run

    def _probe(self, schedule: str) -> tuple[str, ...]:
        probe_set = ("--tokscale-probe-set", str(self._corpus.probe_set))
        return (*probe_set, "--tokscale-probe-schedule", schedule, "--tokscale-verify-isolation")

    def _run(self, layout: Layout, *flags: str) -> None:
        model = MODELS[layout.model]
        words = (*model.flags, *layout.flags, *flags, "--ckpt-format", "torch_dist")
        script = layout.script or model.script
        flags_of_job = job_flags(self._corpus, *words, without=model.without)
        run_forked(layout.ranks, *script, *flags_of_job)


@pytest.fixture(scope="module")
def jobs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Jobs that watch nine sequences, which neither two ranks nor two to a microbatch divide."""
    folder = tmp_path_factory.mktemp("layouts")
    whole = ProbeSet.load(corpus.probe_set)
    arrays = {name: value[:9] for name, value in vars(whole).items() if name.endswith("_BS")}
    replace(whole, **arrays).save(folder / "probe.safetensors")
    return Jobs(replace(corpus, probe_set=folder / "probe.safetensors"), folder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_are_those_of_one_process(jobs, layout):
    fresh_N, expected_N = Run.open(jobs.reference(layout.model)).read_losses().T
    losses_NK = Run.open(jobs.probed(layout)).read_losses()
    assert expected_N.mean() < fresh_N.mean() - 0.2
    assert expected_N.std() > 0.2
    assert_allclose(losses_NK[:, 0], expected_N, rtol=0, atol=layout.tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_model_has_the_size_that_it_has_on_one_process(jobs, layout):
    alone, cut = (Run.open(run).info for run in (jobs.reference(layout.model), jobs.probed(layout)))
    assert (
        cut.launches[0].layout["padded_vocab_size"]
        == (alone.launches[0].layout["padded_vocab_size"])
    )
    assert cut.size == alone.size


def test_the_model_size_counts_every_weight_once(jobs):
    run = jobs.reference("dense")
    weights = read_checkpoint(run / "iter_0000008")["sharded"]
    count = {
        name: weight.numel()
        for name, weight in weights.items()
        if name.startswith(("decoder.", "embedding.", "output_layer.")) and name.endswith("weight")
    }
    vocabulary = count["embedding.word_embeddings.weight"] + count["output_layer.weight"]
    size = Run.open(run).info.size
    assert size["parameters"] == sum(count.values())
    assert size["non_embedding"] == sum(count.values()) - vocabulary
    matrices = size["parameters"] - count["embedding.word_embeddings.weight"]
    assert 6 * matrices < size["flops_per_token"] < 7 * matrices


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_probes_leave_no_trace_in_the_training(jobs, layout):
    run = jobs.probed(layout)
    assert Run.open(run).step_K.tolist() == [0, 1, 2, 4]
    assert checkpoint_differences(run, jobs.unprobed(layout)) == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sample_losses_have_each_sample_once_and_sum_to_the_logged_loss(jobs, layout):
    """The logged loss of a step is Megatron's own reduction; MTP and MoE log theirs apart."""
    run = jobs.probed(layout)
    losses = SampleLosses.of_training(RunPaths(run).samples)
    assert losses.read(1, 4)["sample"].tolist() == list(range(4 * 8))
    assert losses.missing_ranks == []
    logged = {record.step: record.training_loss for record in Run.open(run).records[1:]}
    sums = losses.step_sums()
    assert sums.n_samples_T.tolist() == [8] * 4
    assert_allclose(sums.mean_T[[0, 1, 3]], [logged[step] for step in (1, 2, 4)], rtol=2e-6)


def test_sharded_parameters_are_current_when_probed(jobs):
    """Under the overlaps a rank has stale shards of the others until it asks for new ones."""
    fast = ("--lr-warmup-iters", "0")
    whole = Layout("dense", "DP2, no warmup", 2, fast, EXACT)
    sharded = Layout("dense", "DP2 overlaps, no warmup", 2, (*OVERLAPS, *fast), EXACT)
    whole_NK, sharded_NK = (
        Run.open(jobs.probed(layout)).read_losses() for layout in (whole, sharded)
    )
    assert (abs(whole_NK[:, 1:] - whole_NK[:, :-1]).max(axis=0) > 0.01).all()
    assert_allclose(sharded_NK, whole_NK, rtol=0, atol=CLOSE)


def test_context_parallel_training_is_training(jobs):
    """The tests' attention passes the right gradients back: without dropout nothing differs."""
    still = ("--attention-dropout", "0", "--hidden-dropout", "0")
    one = Layout("dense", "one process, no dropout", 1, still, EXACT)
    cut = Layout("dense", "CP2, no dropout", 2, (*CP2, *still), CLOSE, CONTEXT_PARALLEL)
    one_NK, cut_NK = (Run.open(jobs.probed(layout)).read_losses() for layout in (one, cut))
    assert abs(one_NK[:, -1] - one_NK[:, 0]).max() > 0.1
    assert_allclose(cut_NK, one_NK, rtol=0, atol=CLOSE)


def test_losses_are_those_of_a_plain_torch_model(jobs):
    run = jobs.reference("dense")
    weights = read_checkpoint(run / "iter_0000008")["sharded"]
    probe_set = Run.open(run).probe_set
    expected_BS = plain_losses(
        weights,
        probe_set.tokens_BS,
        probe_set.labels_BS,
        n_layers=int(MODEL["--num-layers"]),
        n_heads=int(MODEL["--num-attention-heads"]),
    )
    expected_N = expected_BS[torch.from_numpy(probe_set.mask_BS)]
    losses_N = Run.open(run).read_losses()[:, -1]
    assert_allclose(losses_N, expected_N.numpy(), rtol=0, atol=1e-5)

"""Changes that a forward step makes in a probe are undone, or stop the job."""

import pytest
import torch
from checkpoints import checkpoint_differences
from jobs import Corpus, job_flags, run_forked

from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron

# In evaluation, before the forward step of `pretrain` is called.
SCRIPT = """
import random
import numpy as np
import torch
from megatron_tokscale import pretrain
{setup}

forward_step = pretrain.forward_step

def meddling_forward_step(iterator, model):
    if not model.training:
        {meddle}
    return forward_step(iterator, model)

pretrain.forward_step = meddling_forward_step
pretrain.main()
"""


# Transformer Engine's tracker is not installed; a tracker of the tests stands in for it.
WITH_GENERATORS = "import generator_tracker; generator_tracker.install()"
WITHOUT_RESTORING = """
import contextlib
from megatron_tokscale.training.probe import isolation
isolation.restored_generators = contextlib.nullcontext
"""


def train(corpus: Corpus, run, *flags, meddle="pass", setup="", n_ranks=1):
    script = run.with_suffix(".py")
    script.write_text(SCRIPT.format(meddle=meddle, setup=setup))
    save = ("--save", str(run), "--save-interval", "4", "--train-iters", "4")
    run_forked(n_ranks, str(script), *job_flags(corpus, *save, *flags))
    return run


def probe(corpus: Corpus, *extra):
    probe_set = ("--tokscale-probe-set", str(corpus.probe_set))
    return (*probe_set, "--tokscale-probe-schedule", "list:0,1,3", *extra)


VERIFIED = ("--tokscale-verify-isolation",)


@pytest.fixture(scope="module")
def untouched(corpus, tmp_path_factory):
    return train(corpus, tmp_path_factory.mktemp("runs") / "untouched")


UNDONE = {
    "draws": "random.random(), np.random.rand(), torch.rand(1)",
    "seeds": "random.seed(1), np.random.seed(1), torch.manual_seed(1)",
    "modes": "model.module.embedding.train(), model.module.decoder.layers[0].train()",
}


@pytest.mark.parametrize("meddle", UNDONE)
def test_state_that_a_forward_step_changes_is_restored(corpus, tmp_path, untouched, meddle):
    run = train(corpus, tmp_path / "run", *probe(corpus, *VERIFIED), meddle=UNDONE[meddle])
    assert Run.open(run).step_K.tolist() == [0, 1, 3]
    assert checkpoint_differences(run, untouched) == []


def test_a_forward_step_that_changes_a_weight_stops_the_job(corpus, tmp_path):
    meddle = "next(model.parameters()).data.flatten()[0] += 1e-3"
    with pytest.raises(AssertionError, match="the probe at step 0 changed parameters"):
        train(corpus, tmp_path / "run", *probe(corpus, *VERIFIED), meddle=meddle)


@pytest.fixture(scope="module")
def untouched_with_generators(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "generators"
    return train(corpus, run, setup=WITH_GENERATORS)


def test_generators_from_which_a_probe_draws_are_restored(
    corpus, tmp_path, untouched_with_generators
):
    flags = probe(corpus, *VERIFIED)
    draw = "generator_tracker.draw()"
    run = train(corpus, tmp_path / "run", *flags, meddle=draw, setup=WITH_GENERATORS)
    assert Run.open(run).step_K.tolist() == [0, 1, 3]
    assert checkpoint_differences(run, untouched_with_generators) == []


def test_a_probe_that_moves_generators_changes_the_training_and_is_detected(
    corpus, tmp_path, untouched_with_generators
):
    """The proof that the tests above would see a generator that is not restored."""
    broken = {"meddle": "generator_tracker.draw()", "setup": WITH_GENERATORS + WITHOUT_RESTORING}
    run = train(corpus, tmp_path / "run", *probe(corpus), **broken)
    changed = "\n".join(checkpoint_differences(run, untouched_with_generators))
    assert "model-parallel-rng" in changed
    assert "decoder.layers.0" in changed
    with pytest.raises(AssertionError, match="step 0 changed Megatron's generator tracker"):
        train(corpus, tmp_path / "stopped", *probe(corpus, *VERIFIED), **broken)


# Rank 1 starts with other weights, as after an error in loading; ranks are not made equal then.
UNEQUAL = """
import os
model_provider = pretrain.model_provider

def unequal_model_provider(*args, **kwargs):
    model = model_provider(*args, **kwargs)
    if os.environ["RANK"] == "1":
        for parameter in model.parameters():
            parameter.data += 1e-3
    return model

pretrain.model_provider = unequal_model_provider
"""
OVERLAPS = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def test_a_probe_before_the_first_step_gathers_no_parameters(corpus, tmp_path):
    """Megatron gathers none before it either: a gather would repair ranks, or spread an error."""
    flags = (*OVERLAPS, "--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable")
    ranks = {"n_ranks": 2, "setup": UNEQUAL}
    unprobed = train(corpus, tmp_path / "unprobed", *flags, **ranks)
    probed = train(corpus, tmp_path / "probed", *flags, *probe(corpus, *VERIFIED), **ranks)
    assert checkpoint_differences(probed, unprobed) == []


def write_checkpoint(run, **changed):
    """A model, an optimizer and a generator of ones, but for what is changed."""
    state = dict.fromkeys(("model", "optimizer", "generator"), torch.ones(3)) | changed
    folder = run / "iter_0000004"
    folder.mkdir(parents=True)
    contents = {
        "model": state["model"],
        "optimizer": [{"exp_avg": state["optimizer"]}],
        "generator": ("MT19937", state["generator"].numpy()),
    }
    torch.save(contents, folder / "model_optim_rng.pt")
    return run


@pytest.mark.parametrize("name", ["model", "optimizer", "generator"])
def test_the_comparison_of_checkpoints_sees_one_bit(tmp_path, name):
    ones, more = torch.ones(3), torch.tensor([1.0, 1.0, 1 + 2**-23])
    left = write_checkpoint(tmp_path / "left")
    assert checkpoint_differences(left, write_checkpoint(tmp_path / "same", **{name: ones})) == []
    found = checkpoint_differences(left, write_checkpoint(tmp_path / "other", **{name: more}))
    assert len(found) == 1
    assert name in found[0]

"""Per-token losses are the same in every parallel layout, and those of a plain torch model."""

import pytest
import torch
from jobs import MODEL, Corpus, run_job
from numpy.testing import assert_allclose, assert_array_equal

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
EXACT = {
    "one process": (1, ()),
    "PP2": (2, PP2),
    "DP2": (2, ()),
    "VPP 2x2": (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")),
}
CLOSE = {
    "TP2": (2, TP2),
    "TP2 with sequence parallel": (2, (*TP2, "--sequence-parallel")),
    "TP2 x PP2": (4, (*TP2, *PP2)),
}


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory):
    """A checkpoint that every layout can load."""
    folder = tmp_path_factory.mktemp("trained")
    save = ("--save", str(folder), "--save-interval", "8", "--train-iters", "8")
    run_job(corpus, 1, *save, "--ckpt-format", "torch_dist")
    return folder


@pytest.fixture(scope="module")
def probe_in_layout(corpus, trained, tmp_path_factory):
    """Probe the trained weights in a layout, before its first step."""
    known = {}

    def probe(name):
        if name not in known:
            n_processes, flags = {**EXACT, **CLOSE}[name]
            run = tmp_path_factory.mktemp("layout")
            load = ("--load", str(trained), "--finetune", "--no-load-optim", "--no-load-rng")
            load = (*load, "--ckpt-format", "torch_dist", "--train-iters", "1")
            probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(run))
            probe = (*probe, "--tokscale-schedule", "list:0", "--tokscale-verify-isolation")
            run_job(corpus, n_processes, *flags, *load, *probe)
            known[name] = Run.open(run).read_losses()[:, 0]
        return known[name]

    return probe


@pytest.mark.parametrize("name", list(EXACT)[1:])
def test_losses_are_identical_where_no_sum_changes_its_order(probe_in_layout, name):
    assert_array_equal(probe_in_layout(name), probe_in_layout("one process"))


@pytest.mark.parametrize("name", CLOSE)
def test_losses_are_close_where_sums_change_their_order(probe_in_layout, name):
    assert_allclose(probe_in_layout(name), probe_in_layout("one process"), rtol=0, atol=1e-5)


def test_losses_are_those_of_a_plain_torch_model(corpus, trained, probe_in_layout, tmp_path):
    probe_set = ProbeSet.load(corpus.probe_set)
    weights = read_weights(trained, tmp_path / "weights.pt")
    expected_BS = plain_losses(weights, probe_set.tokens_BS, probe_set.labels_BS)
    expected_N = expected_BS[torch.from_numpy(probe_set.mask_BS)]
    losses_N = probe_in_layout("one process")
    assert losses_N.std() > 0.1
    assert_allclose(losses_N, expected_N.numpy(), rtol=0, atol=1e-5)


def read_weights(checkpoint, file):
    """Read the tensors of a torch_dist checkpoint without Megatron."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint / "iter_0000008", file)
    return torch.load(file, weights_only=False)


def plain_losses(weights, tokens_BS, labels_BS):
    """A GPT in plain torch: RMSNorm, rotary attention, SwiGLU, and the cross-entropy by token."""
    from torch.nn import functional

    n_heads, head = int(MODEL["--num-attention-heads"]), 8
    n_layers = int(MODEL["--num-layers"])

    def weight(name, layer=None):
        value = weights[name]
        return (value if layer is None else value[layer]).float()

    def norm(x, scale):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale

    def rotate(x, angle_Sh):
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * angle_Sh.cos() + turned * angle_Sh.sin()

    tokens, labels = torch.from_numpy(tokens_BS).long(), torch.from_numpy(labels_BS).long()
    n, length = tokens.shape
    frequency = 10000.0 ** (-torch.arange(0, head, 2).float() / head)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    x = weight("embedding.word_embeddings.weight")[tokens]
    for layer in range(n_layers):
        prefix = "decoder.layers."
        y = norm(x, weight(prefix + "self_attention.linear_qkv.layer_norm_weight", layer))
        qkv = y @ weight(prefix + "self_attention.linear_qkv.weight", layer).T
        q, k, v = qkv.view(n, length, n_heads, 3 * head).transpose(1, 2).split(head, dim=-1)
        y = functional.scaled_dot_product_attention(
            rotate(q, angle), rotate(k, angle), v, is_causal=True
        )
        y = y.transpose(1, 2).reshape(n, length, -1)
        x = x + y @ weight(prefix + "self_attention.linear_proj.weight", layer).T
        y = norm(x, weight(prefix + "mlp.linear_fc1.layer_norm_weight", layer))
        gate, up = (y @ weight(prefix + "mlp.linear_fc1.weight", layer).T).chunk(2, dim=-1)
        x = x + (functional.silu(gate) * up) @ weight(prefix + "mlp.linear_fc2.weight", layer).T
    logits = norm(x, weight("decoder.final_layernorm.weight")) @ weight("output_layer.weight").T
    return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

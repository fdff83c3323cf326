"""A GPT in plain torch: RMSNorm, rotary attention, SwiGLU.

Shapes: B sequences, S sequence length, h size of an attention head.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


def plain_losses(
    weights: Mapping[str, torch.Tensor],
    tokens_BS: NDArray[np.int32],
    labels_BS: NDArray[np.int32],
    *,
    n_layers: int,
    n_heads: int,
    device: str = "cpu",
) -> torch.Tensor:
    """Return the cross-entropy of each token, loss_BS in nats, from a checkpoint's weights."""

    def weight(name: str, layer: int | None = None) -> torch.Tensor:
        value = weights[name]
        return (value if layer is None else value[layer]).to(device).float()

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale

    def rotate(x: torch.Tensor, angle_Sh: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * angle_Sh.cos() + turned * angle_Sh.sin()

    tokens = torch.from_numpy(tokens_BS).long().to(device)
    labels = torch.from_numpy(labels_BS).long().to(device)
    n, length = tokens.shape
    embedding = weight("embedding.word_embeddings.weight")
    head = embedding.shape[1] // n_heads
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=device).float() / head)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency).repeat(1, 2)
    x = embedding[tokens]
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
    loss_BS = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return loss_BS.cpu()

"""Pre-train Megatron's HybridModel on the CPU: Mamba-2, attention and MLP layers without kernels.

Megatron's mixer calls a Triton kernel, einops and a fused norm; plain torch stands in for them, and
Megatron's local layers stand in for those of Transformer Engine. All else is Megatron's.

Shapes: b sequences, l positions, h heads, p head size, g groups of heads, n state size, c channels.
"""

from types import SimpleNamespace
from typing import Any

import torch
from context_parallel import use_gathering_attention
from torch.nn import functional

from megatron_tokscale import cpu, pretrain

cpu.enable()

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.ssm import mamba_context_parallel, mamba_mixer  # noqa: E402
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


def mamba_scan(
    zxbcdt_blc: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias_h: torch.Tensor,
    a_h: torch.Tensor,
    *,
    D: torch.Tensor,
    headdim: int,
    ngroups: int,
    **_: Any,
) -> torch.Tensor:
    """Gated output of the state space model, in its quadratic form (Mamba-2, arXiv 2405.21060)."""
    n_heads, inner, length = len(a_h), len(a_h) * headdim, zxbcdt_blc.shape[1]
    z, xbc, dt_blh = zxbcdt_blc.split([inner, len(conv_bias), n_heads], dim=-1)
    padded = functional.pad(xbc.transpose(1, 2), (conv_weight.shape[1] - 1, 0))
    convolved = functional.conv1d(padded, conv_weight[:, None], conv_bias, groups=len(conv_bias))
    rest = (len(conv_bias) - inner) // 2
    x, b, c = functional.silu(convolved).transpose(1, 2).split([inner, rest, rest], dim=-1)
    x_blhp = x.unflatten(-1, (n_heads, headdim))
    b_blhn, c_blhn = (
        part.unflatten(-1, (ngroups, -1)).repeat_interleave(n_heads // ngroups, dim=2)
        for part in (b, c)
    )
    dt_blh = functional.softplus(dt_blh + dt_bias_h)
    log_decay_bhl = (dt_blh * a_h).cumsum(1).transpose(1, 2)
    is_future = torch.ones(length, length).triu(1).bool()
    log_kept = log_decay_bhl[..., :, None] - log_decay_bhl[..., None, :]
    kept_bhll = log_kept.masked_fill(is_future, -torch.inf).exp()
    weight_bhll = torch.einsum("bihn,bjhn->bhij", c_blhn, b_blhn) * kept_bhll
    y_blhp = torch.einsum("bhij,bjh,bjhp->bihp", weight_bhll, dt_blh, x_blhp)
    return (y_blhp + D[:, None] * x_blhp).flatten(2) * functional.silu(z)


class GroupedNorm(torch.nn.Module):
    def __init__(self, size: int, eps: float, group_size: int, dtype: torch.dtype, **_: Any):
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.float().unflatten(-1, (-1, self.group_size))
        scaled = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * scaled.flatten(-2)).to(x.dtype)

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def rearrange(tensor: torch.Tensor, pattern: str) -> torch.Tensor:
    return tensor.squeeze(1) if pattern == "d 1 w -> d w" else tensor.transpose(0, 1)


def repeat(tensor: torch.Tensor, _: str, g: int, n: int, r: int) -> torch.Tensor:
    return tensor.unflatten(-1, (g, n)).repeat_interleave(r, dim=-2).flatten(-2)


def use_plain_torch() -> None:
    mamba_mixer.HAVE_MAMBA_SSM = mamba_mixer.HAVE_EINOPS = True
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba_scan
    mamba_mixer.ExtendedRMSNorm = GroupedNorm
    mamba_mixer.rearrange = rearrange
    mamba_context_parallel.HAVE_EINOPS = True
    mamba_context_parallel.repeat = repeat
    hybrid_block.TENorm = WrappedTorchNorm


def local_stack() -> ModuleSpec:
    layer = get_gpt_layer_local_submodules(normalization="RMSNorm")
    mixer = SimpleNamespace(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(mamba_mixer.MambaMixer, submodules=mixer),
        mamba_bda=layer.self_attn_bda,
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda
    )
    layers = hybrid_block.HybridStackSubmodules(
        mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
    )
    return ModuleSpec(hybrid_block.HybridStack, submodules=layers)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> HybridModel:
    """Build this pipeline stage's part, as Megatron's pretrain_hybrid.py does."""
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    return HybridModel(
        config=config or core_transformer_config_from_args(args),
        hybrid_stack_spec=local_stack(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


if __name__ == "__main__":
    use_gathering_attention()
    use_plain_torch()
    pretrain.model_provider = model_provider
    pretrain.prepare()
    pretrain.train()

"""A GPT pre-training script on megatron.training's public API, for users of the wheel alone.

    torchrun --nproc_per_node 8 -m megatron_tokscale.pretrain <Megatron flags> <--tokscale-* flags>

It keeps the contract of Megatron's own pretrain_gpt.py (which is in no wheel): the same flags, a
`forward_step` that returns the per-token losses and a loss function, and a datasets provider that
runs on every rank. Knowledge distillation, fill-in-the-middle, packed fine-tuning, custom layers
and ModelOpt are not in it, and their flags are refused (`training.gpt_flags`); use pretrain_gpt.py
with `-m megatron_tokscale.run` for those.
"""

import inspect
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.launch import prepare
from megatron_tokscale.training.gpt_flags import (
    MODEL_ARGUMENTS,
    flag_refusals,
    from_args,
    megatron_parser,
    value_refusals,
)
from megatron_tokscale.training.support import raise_first
from megatron_tokscale.training.upstream import initialize_runtime_services

# A loss this many times the largest one seen is reported; as in Megatron's pretrain_gpt.py.
_SPIKY_LOSS_FACTOR: Final = 10
_FIELDS: Final = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "position_ids": torch.int64,
}
type Microbatch = dict[str, torch.Tensor | None]


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build this pipeline stage's part of a GPT model, dense or mixture-of-experts."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    with exit_with_one_line():
        raise_first(value_refusals(args))  # --use-checkpoint-args may have set some of them
    config = config or core_transformer_config_from_args(args)
    use_te = args.transformer_impl == "transformer_engine"
    kind = {
        "use_transformer_engine": use_te,
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
        "vp_stage": vp_stage,
    }
    mtp = None
    if args.mtp_num_layers is not None:
        # The model's last layer: a stage with prediction layers alone has no layer of its own.
        last = get_gpt_decoder_layer_specs(config, **kind)[-1]
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=use_te, vp_stage=vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, **kind),
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        **from_args(MODEL_ARGUMENTS, args),
        mtp_block_spec=mtp,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _needs_batch(args: Namespace, vp_stage: int | None) -> bool:
    """Return whether this pipeline stage reads tokens or labels."""
    from megatron.core import mpu

    ends = {"ignore_virtual": False, "vp_stage": vp_stage}
    is_end = mpu.is_pipeline_first_stage(**ends) or mpu.is_pipeline_last_stage(**ends)
    return bool(is_end) or args.mtp_num_layers is not None


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None) -> Microbatch:
    """Read a microbatch on tensor-parallel rank 0, share it, and cut it for context parallelism.

    Returns:
        tokens, labels, loss_mask and position_ids, each [micro batch, sequence / CP]; None on
        pipeline stages that read none of them; the attention mask also where it is not used.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank
    from megatron.training import get_args

    args = get_args()
    names = [*_FIELDS, "attention_mask"]
    if not _needs_batch(args, vp_stage):
        return dict.fromkeys(names)

    shape = (args.micro_batch_size, args.seq_length)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(_FIELDS, shape)
    dtypes = dict(_FIELDS)
    if args.create_attention_mask_in_dataloader:
        sizes["attention_mask"] = (shape[0], 1, shape[1], shape[1])
        dtypes["attention_mask"] = torch.bool
    is_source = mpu.get_tensor_model_parallel_rank() == 0
    data = next(data_iterator) if is_source else {}
    batch: Microbatch = {}
    for name in names:
        if name not in sizes:
            batch[name] = None
            continue
        tensor = (
            data[name].to("cuda", dtypes[name], non_blocking=True)
            if is_source
            else torch.empty(sizes[name], dtype=dtypes[name], device="cuda")
        )
        if mpu.get_tensor_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                tensor,
                mpu.get_tensor_model_parallel_src_rank(),
                group=mpu.get_tensor_model_parallel_group(),
            )
        batch[name] = tensor

    if args.context_parallel_size > 1:
        accepted = inspect.signature(get_batch_on_this_cp_rank).parameters
        options = {"is_hybrid_cp": False, "cp_group": mpu.get_context_parallel_group()}
        options = {name: value for name, value in options.items() if name in accepted}
        batch = get_batch_on_this_cp_rank(batch, **options)
    return batch


def loss_func(
    loss_mask: torch.Tensor | None, output_tensor: torch.Tensor, model: Any = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses under the mask.

    Returns:
        The summed loss in nats, the number of unmasked tokens, and both for Megatron's log.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    args = get_args()
    assert loss_mask is not None, "the last pipeline stage has a loss mask"
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)

    machine = get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "found NaN in local forward loss calculation", True)]
        checks += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    if args.check_for_spiky_loss:
        is_spiky = partial(
            machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
        )
        checks += [(is_spiky, "Spiky loss", False)]
    for rejects, message, is_fatal in checks:
        machine.validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=is_fatal
        )
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    return loss, num_tokens, report


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: Any
) -> tuple[torch.Tensor, Any]:
    """Run one microbatch forward.

    Returns:
        On the last pipeline stage the loss of each token in nats, [micro batch, sequence / CP]
        (elsewhere the activations to send on), and `loss_func` bound to the loss mask.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers
    from megatron.training.training import stimer as stragglers  # a new one would turn it off

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with stragglers:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(loss_func, batch["loss_mask"], model=model)


def train_valid_test_datasets_provider(
    num_samples: Sequence[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the train, validation and test datasets, each blended as the flags say."""
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args, print_rank_0

    from megatron_tokscale.training.data.megatron_datasets import gpt_dataset_config

    args = get_args()

    def is_built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and _needs_batch(args, vp_stage)

    print_rank_0("> building train, validation, and test datasets for GPT ...")
    dataset_type = MockGPTDataset if args.mock_data else GPTDataset
    config = gpt_dataset_config(args)
    builder = BlendedMegatronDatasetBuilder(dataset_type, num_samples, is_built_here, config)
    train, valid, test = builder.build()
    return train, valid, test


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def embedding_ranks(pipeline_ranks: Sequence[int]) -> list[int]:
    """Return the ranks of a pipeline that hold the token embedding, ascending."""
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    ranks = {pipeline_ranks[0]}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pipeline_ranks[-1])
    ranks.update(get_mtp_ranks(list(pipeline_ranks), core_transformer_config_from_args(args)))
    return sorted(ranks)


def check_flags(words: Sequence[str]) -> None:
    """Refuse a command line with a flag that this script does not read.

    Raises:
        TokscaleError: the message names the first such flag.
    """
    parser = megatron_parser()
    try:
        refusals = flag_refusals(parser, words)
    except (TokscaleError, KeyError, AssertionError):  # Megatron reports the error itself
        return
    raise_first(refusals)


def main() -> None:
    """Check the flags, and train."""
    prepare()
    with exit_with_one_line():
        check_flags(sys.argv[1:])
    train()


def train() -> None:
    """Hand this script's parts to Megatron, which reads its flags and trains."""
    from megatron.core.enums import ModelType
    from megatron.training import arguments, pretrain

    flow: dict[str, Any] = {
        "train_valid_test_dataset_provider": train_valid_test_datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
        "get_embedding_ranks": embedding_ranks,
    }
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    if "cfg_container" in inspect.signature(pretrain).parameters:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        args = arguments.parse_and_validate_args(args_defaults=defaults)
        flow["cfg_container"] = pretrain_cfg_container_from_args(args)
        initialize_runtime_services(args)
    else:
        flow["args_defaults"] = defaults
    pretrain(**flow)


if __name__ == "__main__":
    main()

"""A small GPT in Megatron-Bridge's own training loop, on the CPU: the model and data of jobs.py.

    python bridge_job.py '{"data_path": [...], "cache": ..., "train_iters": 6, ...}'

The settings are JSON: see `Settings`. With "probe_set" the job has a `TokscaleCallback`.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the job; the other ones are those of jobs.py."""

    data_path: list[str]
    cache: str
    train_iters: int
    save: str | None = None
    load: str | None = None
    ckpt_step: int | None = None
    exit_interval: int | None = None
    save_interval: int = 1000
    overlap: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    callback: dict[str, Any] = field(default_factory=dict)


def config(settings: Settings) -> Any:
    """Bridge's config of the job: the flags of jobs.py, by Bridge's names."""
    import torch
    from jobs import SEQ_LENGTH, TRAINING, VOCAB_SIZE
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    model = GPTModelProvider(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        seq_length=SEQ_LENGTH,
        position_embedding_type="rope",
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
        make_vocab_size_divisible_by=128,
        vocab_size=None,
        attention_dropout=float(TRAINING["--attention-dropout"]),
        hidden_dropout=float(TRAINING["--hidden-dropout"]),
        transformer_layer_spec=local_layer_spec,
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
    )
    sharded = {
        "use_distributed_optimizer": settings.overlap,
        "overlap_param_gather": settings.overlap,
    }
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(
            train_iters=settings.train_iters,
            global_batch_size=8,
            micro_batch_size=2,
            exit_interval=settings.exit_interval,
        ),
        validation=bridge.ValidationConfig(eval_interval=1000, eval_iters=1),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=3e-3, min_lr=3e-4, weight_decay=0.01, adam_beta2=0.999, **sharded
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine",
            lr_decay_iters=16,
            lr_warmup_iters=2,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
        ),
        ddp=bridge.DistributedDataParallelConfig(overlap_grad_reduce=settings.overlap, **sharded),
        dataset=bridge.GPTDatasetConfig(
            seq_length=SEQ_LENGTH,
            data_path=settings.data_path,
            split=TRAINING["--split"],
            random_seed=1234,
            path_to_cache=settings.cache,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            dataloader_type="single",
            num_workers=0,
            pin_memory=False,
            persistent_workers=False,
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB_SIZE),
        logger=bridge.LoggerConfig(log_interval=1),
        checkpoint=bridge.CheckpointConfig(
            save=settings.save,
            load=settings.load,
            ckpt_step=settings.ckpt_step,
            save_interval=settings.save_interval,
            ckpt_format="torch_dist",
            async_save=False,
            dist_ckpt_optim_fully_reshardable=True,
        ),
        rng=bridge.RNGConfig(seed=1234),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
    )


def main() -> None:
    from megatron_tokscale import cpu

    cpu.enable()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    settings = Settings(**json.loads(sys.argv[1]))
    callbacks = []
    if settings.callback:
        from megatron_tokscale.callback import TokscaleCallback, TokscaleConfig

        callbacks.append(TokscaleCallback(TokscaleConfig(**settings.callback)))
    pretrain(config(settings), forward_step, callbacks=callbacks)


if __name__ == "__main__":
    main()

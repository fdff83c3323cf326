"""The flags of Megatron that `megatron_tokscale.pretrain` reads, and those that it refuses.

Megatron's parser has the flags of all of its training scripts. megatron.core and megatron.training
read most of them themselves; the remaining flags are for the script. Of these
`megatron_tokscale.pretrain` reads the flags in the first two tables and in its own source, and
refuses the others. The tables follow pretrain_gpt.py and the parsers of 0.17.1, 0.18.2, 0.19.0 and
main (August 2026).
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training.config import add_arguments
from megatron_tokscale.training.support import Refusal

# Parameters of GPTModel, and the flags that they take.
MODEL_ARGUMENTS: Final = {
    "vocab_size": "padded_vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "fp16_lm_cross_entropy": "fp16_lm_cross_entropy",
    "position_embedding_type": "position_embedding_type",
    "rotary_percent": "rotary_percent",
    "rotary_base": "rotary_base",
    "rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}

# Fields of GPTDatasetConfig, and the flags that they take.
DATASET_ARGUMENTS: Final = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "split": "split",
    "multiple_validation_sets": "multiple_validation_sets",
    "full_validation": "full_validation",
    "num_dataset_builder_threads": "num_dataset_builder_threads",
    "path_to_cache": "data_cache_path",
    "mmap_bin_files": "mmap_bin_files",
    "reset_position_ids": "reset_position_ids",
    "reset_attention_mask": "reset_attention_mask",
    "eod_mask_loss": "eod_mask_loss",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "object_storage_cache_path": "object_storage_cache_path",
    "mid_level_dataset_surplus": "mid_level_dataset_surplus",
    "allow_ambiguous_pad_tokens": "allow_ambiguous_pad_tokens",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "context_parallel_size": "context_parallel_size",
    "data_parallel_size": "data_parallel_size",
}

SCRIPT: Final = "use pretrain_gpt.py with -m megatron_tokscale.run"
_STANDARD_LAYERS: Final = f"its layers are the standard ones; {SCRIPT}"
_NOT_PACKED: Final = f"its batches are not packed; {SCRIPT}"
_GPT_ONLY: Final = "it builds GPT models; use pretrain_hybrid.py with -m megatron_tokscale.run"
_PLAIN_LOSS: Final = f"its loss is the cross entropy of the data; {SCRIPT}"

# Refused however they are turned on, in a checkpoint's arguments too.
REFUSED: Final = (
    Refusal("--yaml-cfg", f"its model is built from flags; {SCRIPT}"),
    Refusal("--use-legacy-models", "its models are those of megatron.core; drop it"),
    Refusal("--spec", _STANDARD_LAYERS),
    Refusal("--heterogeneous-layers-config-path", _STANDARD_LAYERS),
    Refusal("--heterogeneous-layers-config-encoded-json", _STANDARD_LAYERS),
    Refusal("--experimental-attention-variant", _STANDARD_LAYERS),
    Refusal("--use-grouped-gemm-for-dense-mlp", _STANDARD_LAYERS),
    Refusal("--transformer-impl", f"it is for inference; {SCRIPT}", ("inference_optimized",)),
    Refusal("--overlap-moe-expert-parallel-comm", f"its forward step has no schedule; {SCRIPT}"),
    Refusal("--is-hybrid-model", _GPT_ONLY),
    Refusal("--hybrid-layer-pattern", _GPT_ONLY),
    Refusal("--hybrid-override-pattern", _GPT_ONLY),
    Refusal("--mtp-hybrid-override-pattern", _GPT_ONLY),
    Refusal("--fim-data", f"it has no fill-in-the-middle; {SCRIPT}"),
    Refusal("--sft", _NOT_PACKED),
    Refusal("--dataloader-inter-document-masking", _NOT_PACKED),
    Refusal("--hybrid-context-parallel", _NOT_PACKED),
    Refusal("--logits-load-dir", _PLAIN_LOSS),
    Refusal("--perform-rl-step", "it is for pre-training; use train_rl.py"),
    Refusal("--vision-pretraining", "it is for language models"),
    Refusal("--inprocess-restart", f"it does not restart in its process; {SCRIPT}"),
    Refusal("--record-memory-history", f"it records no history; {SCRIPT}"),
)

# Refused where they are given: beginnings of flags that qualify a flag above, beginnings and whole
# names of flags for other scripts of Megatron.
_QUALIFIERS: Final = ("--fim-", "--logits-load-", "--inprocess-")
_OF_OTHER_SCRIPTS: Final = (
    *("--bert-", "--no-bert-", "--output-bert-", "--biencoder-", "--ict-", "--retriever-"),
    *(
        "--indexer-",
        "--dino-",
        "--swin-",
        "--vision-",
        "--grpo-",
        "--no-grpo-",
        "--rl-",
        "--no-rl-",
    ),
    *("--langrl-", "--inference-", "--no-inference-", "--mask-", "--retro-"),
)
_OF_OTHER_SCRIPTS_WHOLE: Final = (
    *("--block-data-path", "--evidence-data-path", "--titles-data-path", "--embedding-path"),
    *("--query-in-block-prob", "--use-one-sent-docs", "--short-seq-prob", "--vocab-extra-ids"),
    *("--relative-attention-num-buckets", "--relative-attention-max-distance"),
    *("--img-h", "--img-w", "--num-channels", "--num-classes", "--patch-dim", "--sample-rate"),
    *("--classes-fraction", "--data-per-class-fraction", "--iter-per-epoch", "--head-lr-mult"),
    *("--decode-only-cuda-graphs", "--max-tokens-to-oom", "--use-legacy-static-engine"),
    *("--openai-gelu", "--enable-full-sharding-in-hsdp"),
)


class _RaisingParser(ArgumentParser):
    """Parser that raises its error as a `TokscaleError` in the place of an exit."""

    def error(self, message: str) -> NoReturn:
        raise TokscaleError(f"Megatron cannot read the flags: {message}")


def megatron_parser() -> ArgumentParser:
    """Return Megatron's parser with the --tokscale-* flags, whether the plugin is installed or not.

    The parser raises `TokscaleError`; some of its readers of values raise KeyError or
    AssertionError.
    """
    from megatron.training import arguments

    parser = _RaisingParser(allow_abbrev=False, add_help=False)
    arguments.add_megatron_arguments(parser)
    if "--tokscale-cpu" not in parser._option_string_actions:
        add_arguments(parser)
    return parser


def flag_refusals(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return the reasons to refuse a command line of the script, one for each flag.

    Args:
        parser: Megatron's parser.
        words: the command line.
    """
    known = parser._option_string_actions
    given = dict.fromkeys(name for word in words if (name := word.partition("=")[0]) in known)
    refused = [refusal for flag in given for refusal in _refusals_of_flag(parser, flag)]
    args, _ = parser.parse_known_args(list(words))
    switched = [refusal for refusal in refused if not refusal.values or refusal.applies(args)]
    return [_refusal_line(refusal, args) for refusal in dict.fromkeys(switched)]


def value_refusals(args: Namespace) -> list[str]:
    """Return the reasons to refuse arguments of the script, whatever their source."""
    return [_refusal_line(refusal, args) for refusal in REFUSED if refusal.applies(args)]


def is_refused(flag: str) -> bool:
    """Return True for a flag that `megatron_tokscale.pretrain` refuses where it is given."""
    return (
        any(flag == refusal.flag for refusal in REFUSED)
        or flag in _OF_OTHER_SCRIPTS_WHOLE
        or flag.startswith((*_QUALIFIERS, *_OF_OTHER_SCRIPTS))
    )


def _refusals_of_flag(parser: ArgumentParser, flag: str) -> list[Refusal]:
    """Return the refusals of a flag, which may have several spellings."""
    spellings = parser._option_string_actions[flag].option_strings
    named = [refusal for refusal in REFUSED if refusal.flag in spellings]
    if named or not any(map(is_refused, spellings)):
        return named
    if flag.startswith(_QUALIFIERS):
        return [Refusal(flag, f"it qualifies an unsupported flag; {SCRIPT}")]
    return [Refusal(flag, "GPT pre-training does not read it; drop it")]


def _refusal_line(refusal: Refusal, args: Namespace) -> str:
    value = f" {getattr(args, refusal.dest)}" if refusal.values else ""
    return f"megatron_tokscale.pretrain does not support {refusal.flag}{value}: {refusal.reason}"


def from_args(table: dict[str, str], args: Namespace) -> dict[str, Any]:
    """Return the keyword arguments that a table above takes from `args`."""
    return {name: getattr(args, flag) for name, flag in table.items()}

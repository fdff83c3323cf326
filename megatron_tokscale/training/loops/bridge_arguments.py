"""Megatron's arguments as Megatron-Bridge's config gives them.

Bridge's config classes are Megatron's own, from which Megatron makes its flags; so most fields have
the name of the flag. The plugin's parts read the arguments by these names.
"""

from argparse import Namespace
from typing import Any, Final

# Sections of Bridge's config; where two have a field of one name, the later one counts.
_SECTIONS: Final = (
    *("dataset", "tokenizer", "rng", "rerun_state_machine", "dist", "ddp", "optimizer"),
    *("scheduler", "logger", "validation", "checkpoint", "train", "model"),
)


def megatron_arguments(config: Any, world_size: int) -> Namespace:
    """Return Megatron's arguments: its defaults, overridden by the fields of Bridge's config.

    Args:
        config: Bridge's `ConfigContainer`, validated by it.
        world_size: ranks of the job.
    """
    from megatron_tokscale.training.gpt_flags import megatron_parser

    args = megatron_parser().parse_args([])
    for name in _SECTIONS:
        section = getattr(config, name)
        for part in (section, getattr(section, "transformer", None)):
            fields = vars(part) if part is not None else {}
            vars(args).update({key: value for key, value in fields.items() if key[0] != "_"})
    vars(args).update(_renamed(config), **_of_the_data(config.dataset))
    args.world_size = world_size
    args.data_parallel_size = config.data_parallel_size
    return args


def _renamed(config: Any) -> dict[str, Any]:
    """Return the values that Bridge's config has under another name than Megatron's flag."""
    model = getattr(config.model, "transformer", config.model)
    return {
        "num_experts": model.num_moe_experts,
        "swiglu": model.gated_linear_unit,
        "group_query_attention": model.num_query_groups not in (None, model.num_attention_heads),
        "seq_length": config.model.seq_length,
        "decoder_seq_length": config.model.seq_length,
        "vocab_size": config.tokenizer.vocab_size,
        "padded_vocab_size": _padded_vocab_size(config.model),
        "create_attention_mask_in_dataloader": not getattr(
            config.dataset, "skip_getting_attention_mask_from_dataset", True
        ),
        "skip_train": bool(config.validation.skip_train),
    }


def _padded_vocab_size(model: Any) -> int:
    """Return the rows of the output layer, as Bridge's model provider pads them."""
    if not getattr(model, "should_pad_vocab", False):
        return int(model.vocab_size)
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    return int(-(-model.vocab_size // multiple) * multiple)


def _of_the_data(dataset: Any) -> dict[str, Any]:
    """Return the data flags that give the datasets of a dataset config."""
    flags: dict[str, Any] = {
        "data_cache_path": getattr(dataset, "path_to_cache", None),
        "mock_data": bool(getattr(dataset, "mock", False)),
        "fim_data": bool(getattr(dataset, "fim_data", False)),
    }
    if blend := getattr(dataset, "blend", None):
        flags["data_path"] = _words(*blend)
    elif per_split := getattr(dataset, "blend_per_split", None):
        flags["data_path"] = None
        for part, blend in zip(("train", "valid", "test"), per_split, strict=True):
            flags[f"{part}_data_path"] = _words(*blend) if blend else None
    return flags


def _words(prefixes: list[str], weights: list[float] | None) -> list[str]:
    """Return the words of --data-path: prefixes, each behind its weight if it has one."""
    if weights is None:
        return list(prefixes)
    pairs = zip(weights, prefixes, strict=True)
    return [word for weight, prefix in pairs for word in (str(weight), prefix)]

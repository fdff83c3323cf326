"""`megatron-tokscale probe build --plan`: the documents that a plan keeps out of the training."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatron_tokscale.cli.parsing import Arguments
from megatron_tokscale.cli.probe_cost import refuse_training
from megatron_tokscale.core.errors import TokscaleError

if TYPE_CHECKING:
    from megatron_tokscale.probe import ProbeSet

_OF_A_PART: Final = {
    "seq_length": None,
    "sequences": None,
    "budget": None,
    "part": "valid",
    "per_dataset": "equal",
    "duplicates": "ignore",
    "unseen_by": None,
}
"""Flags that choose documents of a part of the data, and their defaults."""


def add_plan(build: argparse.ArgumentParser) -> None:
    """Add the flags of a probe set of held-out documents."""
    group = build.add_argument_group("documents that a plan keeps out of the training")
    group.add_argument(
        "--plan",
        type=Path,
        metavar="PLAN",
        help="watch these documents, instead of a part of the data; each stratum of the plan is a "
        "dataset of the set (its data have moved: give the data flags too)",
    )
    group.add_argument(
        "--scores-dir",
        type=Path,
        metavar="DIR",
        help="folder of the scores that the plan was made with (default: beside the data)",
    )


def build_from_plan(arguments: Arguments) -> "ProbeSet":
    """Return the probe set of the documents that the plan keeps out of the training.

    Raises:
        TokscaleError: a flag does nothing beside --plan, the vocabulary is not known, or the plan's
            documents cannot be read or are too few.
    """
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.data import Plan
    from megatron_tokscale.data.held_out import held_out_of_plan
    from megatron_tokscale.probe.build import ProbeSettings, build_held_out_set

    has_moved = DataSource.is_given(arguments)
    for name, default in (_OF_A_PART if has_moved else {**_OF_A_PART, "split": None}).items():
        if (value := getattr(arguments, name)) != default:
            flag = f"{value}-{name}" if name == "duplicates" else name.replace("_", "-")
            raise TokscaleError(
                f"--{flag} does nothing beside --plan, whose documents and "
                "sequence length the set has; drop it"
            )
    refuse_training(arguments)
    plan = Plan.load(arguments.plan)
    data = DataSource.from_flags(arguments) if has_moved else None
    portions, vocab_size = held_out_of_plan(plan, arguments.scores_dir, data)
    if (vocab_size := arguments.vocab_size or vocab_size) is None:
        raise TokscaleError(
            "the vocabulary is not known, as the plan's scores do not name it; expected the size "
            "of the job's; give --vocab-size"
        )
    prefixes = list(dict.fromkeys(portion.tokens.prefix for portion in portions))
    settings = ProbeSettings(
        data_path={"train": prefixes},
        part="train",
        seq_length=plan.seq_length,
        vocab_size=vocab_size,
        n_tokens=arguments.tokens,
        eod=arguments.eod,
        seed=arguments.seed,
    )
    return build_held_out_set(portions, settings, plan.fingerprint)

"""Command line `megatron-tokscale VERB`: everything that is done outside a training job."""

from megatron_tokscale.cli.entry import main

__all__ = ["main"]

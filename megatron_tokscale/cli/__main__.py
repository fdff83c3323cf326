"""`python -m megatron_tokscale.cli VERB`, for torchrun."""

from megatron_tokscale.cli.entry import main

main()

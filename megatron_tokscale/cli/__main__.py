"""Run `python -m megatron_tokscale.cli VERB`, the form that torchrun can launch."""

from megatron_tokscale.cli.entry import main

main()

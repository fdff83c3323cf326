"""Check on a GPU: the main promises of the tests, with a GPU's kernels and streams, and NCCL.

`make gpu-check` runs it. Each part starts Megatron jobs or calls the package itself, and gives a
verdict on each promise. A part's results are on disk when it ends, so a check that was stopped
continues with the part that it was in.
"""

"""Check on a GPU: what the tests prove on CPUs, proven again where kernels, streams and NCCL are.

`make gpu-check` runs it. Each part starts Megatron jobs or calls the package itself, and says for
each promise whether it held. A part's results are on disk when it ends, so a check that was stopped
continues with the next part.
"""

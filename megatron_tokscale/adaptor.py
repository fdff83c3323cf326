"""`import megatron_tokscale.adaptor` as the first line of one's own launch script.

It reads the command line: with no --tokscale-* flag it changes nothing.
"""

from megatron_tokscale.launch import prepare

prepare()

"""The plugin for a launch script of your own: `import megatron_tokscale.adaptor` on its first line.

The import reads the command line: with no --tokscale-* flag it changes nothing.
"""

from megatron_tokscale.launch import prepare

prepare()

"""Run an unedited Megatron training script under the plugin.

torchrun --nproc_per_node 8 -m megatron_tokscale.run pretrain_gpt.py <its flags> <--tokscale-*>
"""

import runpy
import sys
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.launch import prepare


def main() -> None:
    """Run the script that the first argument names, as `python SCRIPT ...` would."""
    with exit_with_one_line():
        if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
            given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
            raise TokscaleError(
                f"the script is {given}; expected a file such as pretrain_gpt.py; give "
                "torchrun ... -m megatron_tokscale.run SCRIPT <flags>"
            )
    script = sys.argv[1]
    del sys.argv[0]
    # A Megatron checkout is imported from the folder of its script, as Python itself does it. The
    # first entry is the one of `-m`, which Python leaves out under -P, -I or PYTHONSAFEPATH.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(script).resolve().parent)]
    prepare()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""The doctor's page: installed packages, hooks in Megatron, refusals of a job's flags.

    megatron-tokscale doctor [-- [SCRIPT] FLAG ...]

Nothing is written, no process group is made, and no GPU is needed.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from megatron_tokscale import __version__
from megatron_tokscale.core.errors import EXIT_CODE
from megatron_tokscale.doctor.installed import Line, hooks, installed

_PRETRAIN: Final = "megatron_tokscale.pretrain"


def examine(words: Sequence[str]) -> None:
    """Print the findings on this machine and, if there are any, on a job's `words`.

    Args:
        words: the job's command line behind the launcher: a script, if it has one, and the flags.

    Raises:
        SystemExit: with code 2, if something is wrong.
    """
    flags, is_own_script = enter_folder_of_script(words)
    with quiet():
        found = hooks(bool(flags))
        sections = {"installed": installed(), "hooks": found}
        if flags:
            has_hooks = not any(line.is_wrong for line in found)
            unread = Line("not checked", "the flags, while a hook is missing")
            sections["job"] = _job(flags, is_own_script=is_own_script) if has_hooks else [unread]
    print(f"megatron-tokscale {__version__}")
    for title, lines in sections.items():
        print(title)
        for line in lines:
            print(f"  {line.state:<18}  {line.text}")
    n_wrong = sum(line.is_wrong for lines in sections.values() for line in lines)
    print(f"{n_wrong} wrong" if n_wrong else "nothing is wrong")
    if n_wrong:
        raise SystemExit(EXIT_CODE)


def enter_folder_of_script(words: Sequence[str]) -> tuple[list[str], bool]:
    """Drop `-m MODULE` and the script; import Megatron from the script's checkout.

    Returns:
        The flags, and True if the job is `megatron_tokscale.pretrain`, as it is if no script is
        named.
    """
    rest, module = list(words), _PRETRAIN
    if rest[:1] == ["-m"]:
        module, rest = " ".join(rest[1:2]), rest[2:]
    if rest and rest[0].endswith(".py"):
        sys.path.insert(0, str(Path(rest.pop(0)).resolve().parent))
        return rest, False
    if rest and not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd()))  # the current folder, as Python has it for -m
    return rest, module == _PRETRAIN


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of Megatron and torch when they are imported without a GPU."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _job(flags: Sequence[str], *, is_own_script: bool) -> list[Line]:
    """Check the flags of a job."""
    from megatron_tokscale.doctor.preflight import check_flags

    findings = check_flags(flags, is_own_script=is_own_script)
    return [
        *(Line("REFUSED", text, is_wrong=True) for text in findings.refused),
        *(Line("WARNING", text) for text in findings.warned),
        *(Line("ok", text) for text in findings.passed),
        *(Line("not checked", text) for text in findings.unchecked),
    ]

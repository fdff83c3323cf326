"""Study: does a plan by learnability reach the baseline's loss sooner than baseline and controls?

    python examples/learnability_study/study.py [--folder study-run] [--out TABLE.md]

Trains 22 small models on five kinds of text on the CPU (50 minutes on two cores): a reference run,
which gives the learning times, and per seed the baseline blend, the method (`plan build frontier`),
three controls, and two variants that were tried afterwards. A step whose result exists is skipped.
The tables are written from the runs that are finished, and name those that are not; `--until none`
trains nothing and writes the tables.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from arms import PHASES, Settings, Study, run_steps
from tables import report

from megatron_tokscale.core.errors import exit_with_one_line
from megatron_tokscale.core.files import write_text


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("study-run"))
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--at-once", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--until", choices=PHASES, default=PHASES[-1], help="last phase")
    for field in fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    arguments = parser.parse_args(words)
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    with exit_with_one_line():
        study = Study.open(arguments.folder, settings)
        try:
            run_steps(study.phases(arguments.until), arguments.at_once)
        finally:
            text = report(study)
            print(text)
            if arguments.out:
                write_text(arguments.out, text)


if __name__ == "__main__":
    main()

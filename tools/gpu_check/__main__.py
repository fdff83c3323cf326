"""Run the parts of the check, and print a table of what was proven.

    make gpu-check                       # python3 tools/gpu_check --out FILE
    python3 tools/gpu_check --only fit,cost --minutes 3 --out FILE

It needs one GPU, torch, numpy, scipy, numba, safetensors, pyarrow, megatron-core and this checkout;
`--wheels FOLDER` unpacks wheels and imports them before what is installed. It takes about eight
minutes on one GPU without Transformer Engine. A part that has run is not run again; `--only PART`
runs some parts. Without a GPU, `--on-cpu` runs the check itself at toy sizes.
"""

import argparse
import sys
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / each) for each in (".", "tools", "benchmarks", "tests/support")]


def main() -> int:
    """Run the check; return 1 if a promise did not hold."""
    arguments = parser().parse_args()
    if arguments.wheels:
        _unpack(arguments.wheels, arguments.folder / "wheels")
    import torch

    if not arguments.on_cpu and not torch.cuda.is_available():
        print(
            "no GPU is visible; expected one or more; run it where there is one, or try the check "
            "itself with --on-cpu",
            file=sys.stderr,
        )
        return 2
    from gpu_check.parts import PARTS
    from gpu_check.site import Site

    site = Site(arguments.folder.resolve(), arguments.on_cpu, torch.cuda.device_count())
    names = arguments.only.split(",") if arguments.only else [part.name for part in PARTS]
    unknown = sorted(set(names) - {part.name for part in PARTS})
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        print(f"--only {unknown[0]} is unknown; expected parts among {known}", file=sys.stderr)
        return 2
    return _run(site, names, arguments.minutes, arguments.out)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the check's flags."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("gpu-check-run"),
        help="folder of the results and of the jobs' files",
    )
    parser.add_argument("--only", metavar="PART,...", help="parts to run (default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="start no part that would end later, counted from the start of this call (default: 8)",
    )
    parser.add_argument("--out", type=Path, help="file for the table, in markdown")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to unpack, and to import before the installed"
    )
    parser.add_argument(
        "--on-cpu", action="store_true", help="run the check itself, at toy sizes on the CPU"
    )
    return parser


def _unpack(wheels: Path, target: Path) -> None:
    """Unpack wheels and put them first on this process's path and its jobs' path."""
    import os

    for wheel in sorted(wheels.glob("*.whl")):
        if not (target / f"{wheel.stem}.done").exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            (target / f"{wheel.stem}.done").touch()
    sys.path.insert(0, str(target.resolve()))
    paths = [str(target.resolve()), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _run(site: "Site", names: list[str], minutes: float, out: Path | None) -> int:  # noqa: F821
    from gpu_check.checks import FAILED, NOT_RUN, Check, read_checks, write_checks
    from gpu_check.parts import PARTS

    identity = _identity(site)
    started = time.monotonic()
    table: list[tuple[str, Check]] = []
    for part in PARTS:
        path = site.folder / f"{part.name}.json"
        checks = read_checks(path, identity)
        left = 60 * minutes - (time.monotonic() - started)
        if checks is None and part.name not in names:
            continue
        if checks is None and part.seconds > left and not site.on_cpu:
            detail = f"needs {part.seconds} s of --minutes, {max(left, 0):.0f} s are left"
            checks = [Check(f"part '{part.name}'", NOT_RUN, f"{detail}; run the check again")]
        elif checks is None:
            print(f"[{part.name}] about {part.seconds} s", flush=True)
            part_started = time.monotonic()
            checks = list(part.run(site))
            seconds = time.monotonic() - part_started
            write_checks(path, identity, checks, seconds)
            print(f"[{part.name}] took {seconds:.0f} s", flush=True)
        for check in checks:
            print(f"  {check.verdict:8} {check.promise}: {check.detail}", flush=True)
        table += [(part.name, check) for check in checks]
    text = _markdown(identity, table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    print(text)
    return int(any(check.verdict == FAILED for _, check in table))


def _identity(site: "Site") -> dict[str, str]:  # noqa: F821
    """Return the machine and the versions: results of a part with others are not used."""
    import torch

    from megatron_tokscale import __version__

    found = {"machine": "CPU" if site.on_cpu else torch.cuda.get_device_name(0)}
    found |= {"GPUs": str(site.gpus), "megatron-tokscale": __version__}
    for name in ("torch", "megatron-core", "transformer-engine", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _markdown(identity: dict[str, str], table: list[tuple[str, "Check"]]) -> str:  # noqa: F821
    from table import markdown

    rows = [[part, c.promise, c.verdict, c.detail.replace("|", "/")] for part, c in table]
    versions = ", ".join(f"{name} {value}" for name, value in identity.items())
    return f"{versions}\n\n{markdown(['part', 'promise', 'verdict', 'detail'], rows)}\n"


if __name__ == "__main__":
    sys.exit(main())

"""Memory and time of `megatron-tokscale import` and `export` of N tokens x K columns.

    OMP_NUM_THREADS=1 python benchmarks/import_scale.py [--tokens 10000000 --columns 60]

The peer of each import is `numpy.load` of the same file and one write of the matrix: the least that
a program does that holds the matrix in memory. Every import and every peer is a process of its own;
its peak memory is the kernel's (wait4). Each is run `--repeats` times in turn, and the median is
shown. The disk's cache is warm: the file was just written. N tokens, K columns.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from table import heading, markdown

FORMATS = ("npz", "npz deflated", "npy", "npy by columns", "safetensors", "parquet")
_PIECE = 2**18  # tokens of a piece that the benchmark writes
PEERS = {
    ".npy": "np.load(path)",
    ".npz": "np.load(path)['loss_matrix']",
    ".safetensors": "safetensors.numpy.load_file(path)['loss_matrix']",
    ".parquet": "np.stack([c.to_numpy() for c in pq.read_table(path).columns], axis=1)",
}


@dataclass(frozen=True)
class Cost:
    """Seconds and peak memory of a process."""

    seconds: float
    megabytes: float


def write_file(folder: str, form: str, n_tokens: int, n_columns: int) -> None:
    """Write a matrix of random losses, in pieces, in a format that keeps float32."""
    rng = np.random.default_rng(0)

    def pieces():
        for start in range(0, n_tokens, _PIECE):
            yield rng.random((min(_PIECE, n_tokens - start), n_columns), dtype=np.float32)

    path = file_of(Path(folder), form)
    if form == "parquet":
        write_parquet(path, pieces(), n_columns)
        return
    matrix = Path(folder) / "matrix.npy"
    order = "F" if form == "npy by columns" else "C"
    header = {"descr": "<f4", "fortran_order": order == "F", "shape": (n_tokens, n_columns)}
    with matrix.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces():  # random numbers may lie in any order
            file.write(piece.data)
    if form.startswith("npz"):
        loss_NK = np.load(matrix, mmap_mode="r")
        save = np.savez_compressed if form == "npz deflated" else np.savez
        number_N = np.arange(n_tokens)
        save(path, loss_matrix=loss_NK, sample_id=number_N // 1000, token_pos=number_N % 1000)
    elif form == "safetensors":
        from safetensors.numpy import save_file

        save_file({"loss_matrix": np.load(matrix)}, path)
    else:
        matrix.rename(path)
    matrix.unlink(missing_ok=True)


def write_parquet(path: Path, pieces, n_columns: int) -> None:
    """Write a table with a column per value of the axis."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [str(k + 1) for k in range(n_columns)]
    schema = pa.schema([(name, pa.float32()) for name in names])
    with pq.ParquetWriter(path, schema) as writer:
        for piece in pieces:
            writer.write_table(pa.table(list(piece.T.copy()), schema=schema))


def file_of(folder: Path, form: str) -> Path:
    """Return the path of the file of a format."""
    return folder / f"losses.{form.split(maxsplit=1)[0]}"


def cost_of(words: list[str]) -> Cost:
    """Run a program to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: {error}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss / 1024)


def median(costs: list[Cost]) -> Cost:
    """Return the medians of several runs."""
    return Cost(*(statistics.median(values) for values in zip(*map(astuple, costs), strict=True)))


def astuple(cost: Cost) -> tuple[float, float]:
    return cost.seconds, cost.megabytes


def measure(folder: Path, form: str, n_columns: int, repeats: int) -> dict[str, Cost]:
    """Return the costs of import, peer, export and its peer, by name."""
    path, run, copy = file_of(folder, form), folder / "run", folder / "copy.npy"
    values = ",".join(str(k + 1) for k in range(n_columns))
    verb = [sys.executable, "-m", "megatron_tokscale.cli"]
    words = ["import", str(path), "--out", str(run), "--axis", "T", "--values", values]
    imports = "import numpy as np, safetensors.numpy, pyarrow.parquet as pq"
    peer = f"{imports}; path = {str(path)!r}; np.save({str(copy)!r}, {PEERS[path.suffix]})"
    found: dict[str, list[Cost]] = {"import": [], "peer": [], "export": []}
    for _ in range(repeats):
        shutil.rmtree(run, ignore_errors=True)
        found["import"].append(cost_of([*verb, *words, "--unit", "step"]))
        found["peer"].append(cost_of([sys.executable, "-c", peer]))
        out = folder / "export.npz"
        found["export"].append(cost_of([*verb, "export", str(run), "--out", str(out)]))
        out.unlink()
        copy.unlink()
    shutil.rmtree(run)
    return {name: median(costs) for name, costs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--limit-mb", type=float, help="fail if an import takes more memory")
    parser.add_argument("--folder", type=Path, help="folder for the files (default: a temporary)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, worst = [], 0.0
    for form in arguments.formats:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            # A process of its own: a child's peak counts the memory of the process that starts it.
            shape = (arguments.tokens, arguments.columns)
            writer = multiprocessing.get_context("spawn").Process(
                target=write_file, args=(folder, form, *shape)
            )
            writer.start()
            writer.join()
            size = file_of(Path(folder), form).stat().st_size / 2**20
            cost = measure(Path(folder), form, arguments.columns, arguments.repeats)
        ours, peer, export = cost["import"], cost["peer"], cost["export"]
        worst = max(worst, ours.megabytes, export.megabytes)
        rows.append(
            [
                form,
                f"{size:,.0f}",
                f"{ours.seconds:.1f}",
                f"{ours.seconds / peer.seconds:.2f}",
                f"{ours.megabytes:,.0f}",
                f"{ours.megabytes / peer.megabytes:.2f}",
                f"{export.seconds:.1f}",
                f"{export.megabytes:,.0f}",
            ]
        )
    columns = [
        "format",
        "file, MB",
        "import, s",
        "over peer",
        "peak memory, MB",
        "over peer",
        "export, s",
        "peak memory, MB",
    ]
    title = f"{arguments.tokens:,} tokens, {arguments.columns} columns, float32"
    text = f"{heading(numpy=np.__version__)}\n\n{title}\n\n{markdown(columns, rows)}\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.limit_mb and worst > arguments.limit_mb:
        raise SystemExit(f"an import or export took {worst:.0f} MB; limit {arguments.limit_mb:.0f}")


if __name__ == "__main__":
    main()

"""Seconds and memory of `spectrum_run` on ten million tokens, and what brute force would take.

    python benchmarks/spectrum_scale.py [--tokens 10000000] [--folder DIR] [--out FILE]

One child process makes a fitted run on disk; another opens and analyses it, and its seconds,
processor time and peak memory (resource.getrusage) are its own. The files are then in the page
cache, and the compiled code in numba's. A third times the peer, on few tokens: a bootstrap that
draws documents literally, and takes the means over their tokens anew each time.

Shapes: N tokens, K probe steps, E transitions, R resamples (the first is the data as they are), C
bins.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow
import scipy
from fitted_run import make_run
from table import heading, markdown

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.progress import NoProgress
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results import FittedRun
from megatron_tokscale.spectrum import Bins, DocumentSums, Units, events_of
from megatron_tokscale.spectrum.run_spectrum import spectrum_run
from megatron_tokscale.store import Run

PROBES = 60
RESAMPLES = 200
PEER_TOKENS = 50_000
RESAMPLED = "sums over the tokens", "reconstructions"


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, processor seconds of all threads, and the peak memory by then."""

    name: str
    seconds: float
    cpu: float
    gigabytes: float


class PhaseCosts(NoProgress):
    """The costs of one phase after the other."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []
        self._name, self._started = "", self._now()

    def stage(self, what: str) -> None:
        """End the phase under way, and begin another."""
        seconds, cpu = (b - a for a, b in zip(self._started, self._now(), strict=True))
        if self._name:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            self.costs.append(Cost(self._name, seconds, cpu, peak))
        self._name, self._started = what, self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def analyse(path: Path, seed: int) -> list[Cost]:
    """Measure the costs of each phase of an analysis."""
    phases = PhaseCosts()
    phases.stage("opening the run")
    run = Run.open(path)
    phases.stage("documents, their weights")
    spectrum_run(run, n_resamples=RESAMPLES, seed=seed, progress=phases)
    phases.stage("")
    return phases.costs


@dataclass(frozen=True)
class Peer:
    """Brute force and ours on the same few items, and ours on all; processor seconds.

    `difference` is the largest between the two on the few, over the largest value.
    """

    name: str
    few: int
    brute: float
    ours_on_few: float
    difference: float
    all: int
    ours: float


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def bootstrap(path: Path, seed: int) -> dict[str, Any]:
    """Time the bootstrap of a whole small run, the peer of the package's own."""
    source = FittedRun.open(Run.open(path))
    tokens, x_K = source.run.probe_set, source.x_K
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed)
    weight_RU = units.weights(RESAMPLES, seed)

    def ours() -> list[Floats]:
        blocks = ((fits, loss_NK, units.unit_N[at]) for at, fits, loss_NK in source.blocks())
        found = DocumentSums.from_blocks(x_K, blocks, len(units)).resampled(x_K, weight_RU)
        return [found.loss_RK, found.full_RK, found.count_RC, found.drop_RC]

    def brute() -> list[Floats]:
        fits = SigmoidFits.load(source.run.paths.fits)
        loss_NK = np.concatenate([block_NK for _, _, block_NK in source.blocks()])
        model_NK = fits.predict(x_K).astype(np.float32)
        events, edges = events_of(fits), Bins.over(x_K).edges
        rows = []
        for weight_U in weight_RU.astype(int):
            drawn_N = np.repeat(np.arange(len(fits)), weight_U[units.unit_N])
            drawn_E = np.repeat(
                np.arange(len(events.drop_E)), weight_U[units.unit_N[events.token_E]]
            )
            midpoint, drop = events.midpoint_E[drawn_E], events.drop_E[drawn_E]
            rows.append(
                [
                    loss_NK[drawn_N].mean(axis=0, dtype=np.float64),
                    model_NK[drawn_N].mean(axis=0, dtype=np.float64),
                    np.histogram(midpoint, edges)[0] / len(drawn_N),
                    np.histogram(midpoint, edges, weights=drop)[0] / len(drawn_N),
                ]
            )
        return [np.stack(column) for column in zip(*rows, strict=True)]

    ours()
    seconds, found = timed(ours)
    brute_seconds, expected = timed(brute)
    differences = (relative(a, b) for a, b in zip(found, expected, strict=True))
    return {
        "name": f"{RESAMPLES} resamples, tokens",
        "few": len(tokens.label_N),
        "brute": brute_seconds,
        "ours_on_few": seconds,
        "difference": max(differences),
    }


def relative(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own, so that no other work counts as its memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def cost_table(costs: list[Cost], n_tokens: int) -> str:
    seconds, cpu = (sum(getattr(each, name) for each in costs) for name in ("seconds", "cpu"))
    whole = Cost("all", seconds, cpu, costs[-1].gigabytes)
    rows = [
        [
            each.name,
            f"{each.seconds:.1f}",
            f"{each.cpu:.1f}",
            f"{each.gigabytes:.2f}",
            f"{n_tokens / each.seconds:,.0f}",
        ]
        for each in (*costs, whole)
    ]
    columns = ["phase", "seconds", "processor seconds", "peak GB by its end", "tokens/s"]
    return markdown(columns, rows)


def peer_table(peer: Peer) -> str:
    at_its_rate = peer.brute / peer.few * peer.all
    row = [
        peer.name,
        f"{peer.few:,}",
        f"{peer.brute:.2f}",
        f"{peer.ours_on_few:.2f}",
        f"{peer.difference:.0e}",
        f"{peer.all:,}",
        f"{peer.ours:.1f}",
        f"{at_its_rate:,.0f}",
        f"{at_its_rate / peer.ours:,.0f}",
    ]
    few = ["few", "brute force on them, s", "ours, s", "difference"]
    return markdown(["", *few, "all", "ours, s", "brute force at its rate, s", "ratio"], [row])


def run_all(folder: Path, n_tokens: int, seed: int) -> str:
    """Both tables, with the load when the analysis began."""
    large, small = folder / "large", folder / "small"
    for path, size in ((large, n_tokens), (small, PEER_TOKENS)):
        in_child(make_run, path, size, PROBES, seed)
    in_child(analyse, small, seed)
    versions = {each.__name__: each.__version__ for each in (np, scipy, numba, pyarrow)}
    at_start = heading(**versions)
    costs = in_child(analyse, large, seed)
    ours = sum(each.cpu for each in costs if each.name in RESAMPLED)
    peer = Peer(**in_child(bootstrap, small, seed), all=n_tokens, ours=ours)
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "not set")
    return f"""{at_start}, seed {seed}, OPENBLAS_NUM_THREADS {blas}

{n_tokens:,} tokens at {PROBES} probes, {RESAMPLES} resamples; the load is that just before.

{cost_table(costs, n_tokens)}

Brute force on few of the tokens, in processor seconds of one core. Ours on all
of them is from the phases "{RESAMPLED[0]}" and "{RESAMPLED[1]}" above, which read
the files too and do more than the means and the spectrum that brute force does.

{peer_table(peer)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where there are 4 GB for the run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = run_all(Path(folder), arguments.tokens, arguments.seed)
    print(text)
    if arguments.out:
        command = "python benchmarks/spectrum_scale.py --out benchmarks/results/spectrum_scale.md"
        intro = f"# Ten million tokens\n\n`{command}`, {date.today():%d %B %Y}.\n\n"
        arguments.out.write_text(intro + text)


if __name__ == "__main__":
    main()

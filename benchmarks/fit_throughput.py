"""Tokens per second of fit_sigmoids against scipy's curve_fit, one core, the same tokens.

    OMP_NUM_THREADS=1 python benchmarks/fit_throughput.py [--long] [--out FILE]

Ours finds the basin itself, and gives errors and classes; curve_fit gets one start that is already
near (the level of the last losses, the steepest step) and gives a covariance. N tokens, K probes.
"""

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.optimize import curve_fit
from scipy.special import expit
from table import heading, markdown

from megatron_tokscale.fit import fit_sigmoids

FAR = -1e4  # stands for x = -inf of step 0, which curve_fit refuses


@dataclass(frozen=True)
class Planted:
    x_K: NDArray[np.float64]
    loss_NK: NDArray[np.float32]


def plant(n_tokens: int, n_probes: int, seed: int) -> Planted:
    """Sigmoids over wide ranges of midpoint, width and drop, with white noise."""
    rng = np.random.default_rng(seed)
    x_K = np.concatenate([[-np.inf], np.linspace(0, np.log(20_000), n_probes - 1)])
    column = (n_tokens, 1)
    floor, drop = rng.uniform(0, 3, column), rng.uniform(0.5, 8, column)
    midpoint, width = rng.uniform(2.5, 8, column), np.exp(rng.uniform(-3, 0, column))
    noise = rng.uniform(0.05, 0.4, column) * rng.standard_normal((n_tokens, n_probes))
    loss_NK = floor + drop * expit((midpoint - x_K) / width) + noise
    return Planted(x_K, loss_NK.astype(np.float32))


def sigmoid(
    x: NDArray[np.float64], floor: float, drop: float, midpoint: float, log_width: float
) -> NDArray[np.float64]:
    return floor + drop * expit((midpoint - x) / np.exp(log_width))


def curve_fit_sses(planted: Planted) -> NDArray[np.float64]:
    """SSE of curve_fit for every token; infinite where it gives up."""
    x_K = np.maximum(planted.x_K, FAR)
    sses = []
    for loss_K in planted.loss_NK.astype(np.float64):
        low = loss_K[-3:].mean()
        start = (low, loss_K[:3].mean() - low, x_K[1:][np.argmin(np.diff(loss_K))], -1.5)
        try:
            found, _ = curve_fit(sigmoid, x_K, loss_K, start)
        except RuntimeError:
            sses.append(np.inf)
            continue
        sses.append(((sigmoid(x_K, *found) - loss_K) ** 2).sum())
    return np.array(sses)


def compare(n_probes: int, n_ours: int, n_peer: int, seed: int) -> list[str]:
    """One row of the table; the peer's tokens are the first of ours."""
    planted = plant(n_ours, n_probes, seed)
    few = Planted(planted.x_K, planted.loss_NK[:n_peer])
    fit_sigmoids(few.x_K, few.loss_NK)  # loads torch's kernels
    start = time.perf_counter()
    fits = fit_sigmoids(planted.x_K, planted.loss_NK)
    ours = n_ours / (time.perf_counter() - start)
    start = time.perf_counter()
    sse_N = curve_fit_sses(few)
    peer = n_peer / (time.perf_counter() - start)
    worse = np.mean(fits.sse_N[:n_peer] > sse_N * 1.001)
    peer_worse = np.mean(sse_N > fits.sse_N[:n_peer] * 1.001)
    return [
        str(n_probes),
        f"{ours:,.0f} ({n_ours:,})",
        f"{peer:,.0f} ({n_peer:,})",
        f"{ours / peer:,.0f}",
        f"{100 * worse:.1f}%",
        f"{100 * peer_worse:.1f}%",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="also 500 probes")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--peer-tokens", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    columns = [
        "probes",
        "ours, tokens/s (tokens)",
        "curve_fit, tokens/s (tokens)",
        "ratio",
        "our SSE higher by 0.1%",
        "curve_fit's higher by 0.1%",
    ]
    rows = [
        compare(n_probes, arguments.tokens, arguments.peer_tokens, arguments.seed)
        for n_probes in ([60, 500] if arguments.long else [60])
    ]
    about = heading(torch=torch.__version__, scipy=scipy.__version__, numpy=np.__version__)
    text = f"{about}, {arguments.threads} thread(s), seed {arguments.seed}\n\n"
    text += markdown(columns, rows)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Tokens per second of `fit_sigmoids` beside scipy's curve_fit and Chang et al.'s procedure.

    OMP_NUM_THREADS=1 python benchmarks/fit_throughput.py [--quick] [--device cuda] [--out FILE]

`fit_sigmoids` (ours) finds the basins itself, and gives errors and classes; the peers, on one core,
fit one sigmoid to the first of the same tokens. All take turns in one process. A second table gives
the cost of each of our stages on one thread, beside the least cost of its arithmetic and its memory
traffic on this machine. curve_fit starts at the best split of the losses into two levels, from one
width or from three, the best taken: of the starts tried, these came nearest to our sums of squares.
Chang et al.'s (2024) second stage, a GAM of each curve, is far slower, and left out.

Shapes: N tokens, K probe steps, M sigmoids per token, J tangents.
"""

import argparse
import functools
import math
import os
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numba
import numpy as np
import scipy
import torch
from scipy.optimize import curve_fit
from scipy.signal import lfilter
from scipy.special import expit
from table import heading, markdown
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.fit import SigmoidFits, block, fit_sigmoids, grid, kernels, noise

FAR = -1e4  # stands for x = -inf of step 0, which curve_fit refuses
LAST_STEP = 20_000
BLOCK_LOSSES = 2**22  # fit_sigmoids gives each thread as many at once
CLOSE = 1e-4
CHANCE_BITS = np.log2(50_004)


@dataclass(frozen=True)
class PlantedLosses:
    """Losses, and their midpoints: NaN for tokens that are not one sigmoid.

    `midpoint_se_N` is the least standard error that the losses allow (Cramer and Rao), for the
    first tokens; infinite where there is no midpoint.
    """

    x_K: Floats
    loss_NK: Floats32
    midpoint_N: Floats
    midpoint_se_N: Floats

    def tokens(self, part: slice) -> "PlantedLosses":
        per_token = (self.loss_NK, self.midpoint_N, self.midpoint_se_N)
        return PlantedLosses(self.x_K, *(each[part] for each in per_token))

    def missed(self, midpoint_N: Floats) -> tuple[int, int]:
        """Count the midpoints off by more than 0.5 among those determined to 0.1; return both
        counts.
        """
        told_N = self.midpoint_se_N < 0.1
        near_N = np.abs(midpoint_N - self.midpoint_N)[told_N] <= 0.5
        return int((~near_N).sum()), int(told_N.sum())


def plant(n_tokens: int, n_probes: int, n_checked: int, seed: int, *, mixed: bool) -> PlantedLosses:
    """Draw trajectories over the ranges of the demo's run; `n_checked` get a Cramer-Rao bound.

    All fall with white noise or, if mixed, have the demo's shares of classes and its noise's
    autocorrelation. Ranges (5-95%), shares and the noise's quartiles were measured on its fits.
    """
    rng = np.random.default_rng(seed)
    x_K = np.concatenate([[-np.inf], np.linspace(0, np.log(LAST_STEP), n_probes - 1)])
    column, span = (n_tokens, 1), x_K[-1]
    shares = {"fall": 0.38, "rise": 0.01, "two": 0.22, "ramp": 0.23, "flat": 0.16}
    names = rng.choice(list(shares), column, p=list(shares.values())) if mixed else "fall"
    kind = np.broadcast_to(names, column)
    low, high = (1.6, 8.7) if mixed else (0.5, 9.0)
    drop, later_drop = rng.uniform(low, high, column), rng.uniform(low / 2, high / 2, column)
    drop *= np.select([kind == "rise", np.isin(kind, ["ramp", "flat"])], [-1, 0], 1)
    later_drop *= np.where(kind == "two", rng.choice([-1, 1], column), 0)
    width, later_width = np.exp(rng.uniform(np.log(0.05), np.log(1.1), (2, *column)))
    midpoint = rng.uniform(0, np.where(kind == "two", span - 1.5, span))
    later = rng.uniform(midpoint + 1.5, np.maximum(span, midpoint + 1.5))
    onset = rng.uniform(0, 2 / 3 * span, column)
    fall = np.where(kind == "ramp", rng.uniform(0.5, 6, column), 0)
    loss_NK = drop * expit((midpoint - x_K) / width)
    if mixed:
        loss_NK += later_drop * expit((later - x_K) / later_width)
        loss_NK -= fall * np.maximum(np.maximum(x_K, 0) - onset, 0) / (span - onset)
    loss_NK += rng.uniform(0, 6, column) - loss_NK.min(axis=1, keepdims=True)
    deviation = np.clip(np.exp(np.log(0.47) + 0.29 * rng.standard_normal(column)), 0.2, 0.8)
    phi = 0.6 if mixed else 0.0
    loss_NK += deviation * noise_of(rng, loss_NK.shape, phi)
    single = np.isin(kind, ["fall", "rise"])
    truth = (each[:n_checked] for each in (drop, midpoint, width, deviation))
    bound_N = np.full(n_tokens, np.inf)
    bound_N[:n_checked] = least_error(np.maximum(x_K, FAR), *truth, phi)
    return PlantedLosses(
        x_K,
        loss_NK.astype(np.float32),
        np.where(single, midpoint, np.nan)[:, 0],
        np.where(single[:, 0], bound_N, np.inf),
    )


def noise_of(rng: np.random.Generator, shape: tuple[int, ...], phi: float) -> Floats:
    """Draw an autoregression of order one and of variance one, along the probes."""
    shock_NK = rng.standard_normal(shape)
    shock_NK[:, 1:] *= np.sqrt(1 - phi**2)
    return lfilter([1.0], [1.0, -phi], shock_NK, axis=1) if phi else shock_NK


def least_error(
    x_K: Floats,
    drop_N1: Floats,
    midpoint_N1: Floats,
    width_N1: Floats,
    noise_N1: Floats,
    phi: float,
) -> Floats:
    """Return the Cramer-Rao bound of the midpoint's standard error; infinite if singular."""
    u_NK = (midpoint_N1 - x_K) / width_N1
    s_NK = expit(u_NK)
    bump_NK = s_NK * (1 - s_NK) * drop_N1 / width_N1
    jacobian_NKP = np.stack([np.ones_like(s_NK), s_NK, bump_NK, u_NK * bump_NK], axis=-1)
    white_NKP = jacobian_NKP.copy()
    white_NKP[:, 1:] -= phi * jacobian_NKP[:, :-1]
    white_NKP[:, 1:] /= np.sqrt(1 - phi**2)
    gram_NPP = white_NKP.transpose(0, 2, 1) @ white_NKP + 1e-12 * np.eye(4)
    sharp_N = np.linalg.cond(gram_NPP) < 1e10
    bound_N = np.full(len(gram_NPP), np.inf)
    variance_N = np.linalg.inv(gram_NPP[sharp_N])[:, 2, 2]
    bound_N[sharp_N] = noise_N1[sharp_N, 0] * np.sqrt(variance_N)
    return bound_N


def sigmoid(x: Floats, floor: float, drop: float, midpoint: float, log_width: float) -> Floats:
    return floor + drop * expit((midpoint - x) / np.exp(log_width))


@dataclass(frozen=True)
class Found:
    """A peer's fit of one token, in natural units; an infinite SSE where it gave up."""

    sse: float
    midpoint: float = np.nan
    width: float = np.nan


def best_split(x_K: Floats, loss_K: Floats) -> tuple[float, float, float]:
    """Return floor, drop and place of the step with the least sum of squared residuals."""
    before = np.arange(1, len(loss_K))
    after = len(loss_K) - before
    total = loss_K.cumsum()
    high, low = total[:-1] / before, (total[-1] - total[:-1]) / after
    cut = int(np.argmax((high - low) ** 2 * before * after))
    return low[cut], high[cut] - low[cut], x_K[cut + 1]


def by_curve_fit(x_K: Floats, loss_K: Floats, log_widths: tuple[float, ...]) -> Found:
    """Return the best fit of scipy's curve_fit from the best split and each of the widths."""
    x_K = np.maximum(x_K, FAR)
    split = best_split(x_K, loss_K)
    best = Found(np.inf)
    for log_width in log_widths:
        try:
            found, _ = curve_fit(sigmoid, x_K, loss_K, (*split, log_width))
        except RuntimeError:
            continue
        sse = float(((sigmoid(x_K, *found) - loss_K) ** 2).sum())
        if sse < best.sse:
            best = Found(sse, found[2], np.exp(found[3]))
    return best


def chang_sigmoid(x: Floats, start: float, end: float, xmid: float, scale: float) -> Floats:
    return start + (end - start) / (1 + np.exp((xmid - x) / scale))


def by_chang(x_K: Floats, loss_K: Floats) -> Found:
    """Fit a sigmoid and its age of acquisition as Chang et al. (TACL 2024) do.

    The data are negative surprisal in bits over log10 step, without step 0. The age is timed with
    the fit; the midpoint is the sigmoid's.
    """
    log10_K, y_K = x_K[1:] / np.log(10), -loss_K[1:] / np.log(2)
    start, tolerance = [y_K.min(), y_K.max(), log10_K.mean(), 1.0], 1e-8
    while True:
        try:
            found, _ = curve_fit(
                chang_sigmoid, log10_K, y_K, start, maxfev=1_000_000, ftol=tolerance
            )
            break
        except RuntimeError:
            tolerance *= 10
    age_of_acquisition(log10_K, y_K, *found)
    sse_bits = ((chang_sigmoid(log10_K, *found) - y_K) ** 2).sum()
    midpoint, width = found[2] * np.log(10), abs(found[3]) * np.log(10)
    return Found(float(sse_bits * np.log(2) ** 2), midpoint, width)


def age_of_acquisition(
    log10_K: Floats, y_K: Floats, start: float, end: float, xmid: float, scale: float
) -> float:
    """Return where the fit is halfway between chance and the best surprisal, within the probes."""
    half = (y_K.max() - CHANCE_BITS) / 2
    falls = (end - start) * scale < 0
    if half >= max(start, end) or y_K.max() <= -CHANCE_BITS or falls:
        return float(log10_K[-1])
    if half <= min(start, end):
        return float(log10_K[0])
    return float(xmid - scale * np.log((end - start) / (half - start) - 1))


Peer = Callable[[Floats, Floats], Found]
CHANG = "Chang et al.: sigmoid and age"
PEERS: dict[str, Peer] = {
    "curve_fit, one start": functools.partial(by_curve_fit, log_widths=(-1.5,)),
    "curve_fit, best of three starts": functools.partial(by_curve_fit, log_widths=(-2.5, -1, 0)),
    CHANG: by_chang,
}


def sse_of(fits: SigmoidFits, planted: PlantedLosses) -> Floats:
    """Return the SSE of the reported parameters in float64, as for the peers."""
    columns = (fits.floor_N, fits.drop_N, fits.midpoint_N, np.log(fits.width_N))
    parameters = (each[:, None].astype(np.float64) for each in columns)
    fitted_NK = sigmoid(np.maximum(planted.x_K, FAR), *parameters)
    return ((fitted_NK - planted.loss_NK) ** 2).sum(axis=1)


def on_threads(
    count: int, planted: PlantedLosses, loss: Any = None, device: str = "cpu"
) -> tuple[float, SigmoidFits]:
    """Return the seconds of our fit, and the fits; `loss` replaces the planted losses."""
    torch.set_num_threads(count)
    start = time.perf_counter()
    fits = fit_sigmoids(planted.x_K, planted.loss_NK if loss is None else loss)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, fits


def by_peer(peer: Peer, planted: PlantedLosses) -> tuple[float, list[Found]]:
    """Return the seconds of a peer's fits, and the fits."""
    loss_NK = planted.loss_NK.astype(np.float64)
    start = time.perf_counter()
    found = [peer(planted.x_K, loss_K) for loss_K in loss_NK]
    return time.perf_counter() - start, found


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark: our blocks, our checked tokens, tokens of each peer, turns."""

    blocks: int
    checked: int
    peers: int
    turns: int
    cuda_losses: int

    def tokens(self, n_probes: int) -> int:
        return self.blocks * (BLOCK_LOSSES // n_probes)


@dataclass
class Turns:
    """Results of the turns, by our threads or by peer; our fits are those of the last turn."""

    rates: dict[Any, list[float]] = field(default_factory=lambda: defaultdict(list))
    cores: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    found: dict[str, list[Found]] = field(default_factory=lambda: defaultdict(list))
    fits: SigmoidFits | None = None


def take_turns(planted: PlantedLosses, sizes: Sizes, threads: int) -> Turns:
    """Take turns: ours on one and on all threads, then every peer on some of its tokens."""
    turns, step = Turns(), sizes.peers // sizes.turns
    on_threads(1, planted.tokens(slice(1000)))  # loads the kernels
    for turn in range(sizes.turns):
        for count in (1, threads):
            busy = time.process_time()
            seconds, turns.fits = on_threads(count, planted)
            turns.rates[count].append(len(planted.loss_NK) / seconds)
            turns.cores[count].append((time.process_time() - busy) / seconds)
        few = planted.tokens(slice(turn * step, (turn + 1) * step))
        for peer, fit in PEERS.items():
            seconds, found = by_peer(fit, few)
            turns.rates[peer].append(step / seconds)
            turns.found[peer] += found
    return turns


def measure(
    name: str, planted: PlantedLosses, sizes: Sizes, threads: int, device: str
) -> list[Any]:
    """Return the rows of one kind of data."""
    turns = take_turns(planted, sizes, threads)
    rate = {who: median(each) for who, each in turns.rates.items()}
    few = planted.tokens(slice(len(turns.found[CHANG])))
    about, empty = [name, str(len(planted.x_K))], [""] * 3
    rows = []
    for count in (1, threads):
        who = f"ours, {count} thread(s), on {median(turns.cores[count]):.2f} cores"
        rows.append([*about, who, f"{rate[count]:,.0f}", *empty, ""])
    midpoint_N = turns.fits.midpoint_N
    missed = planted.missed(midpoint_N), few.missed(midpoint_N[: len(few.loss_NK)])
    rows[0][-1] = "; ".join("{} of {:,}".format(*each) for each in missed)
    if device != "cpu":
        on_it = on_device(planted, sizes, device)
        rows.append([*about, f"ours, {device}", f"{on_it:,.0f}", *empty, ""])
    for peer, found in turns.found.items():
        ratios = " / ".join(f"{rate[count] / rate[peer]:,.0f}" for count in (1, threads))
        row = [*about, peer, f"{rate[peer]:,.0f}", ratios]
        rows.append(row + beside(few, found, drop_first=peer == CHANG))
    return rows


def beside(planted: PlantedLosses, found: list[Found], *, drop_first: bool) -> list[str]:
    """Count the higher sums of squares on either side, and the peer's wrong basins.

    Ours is fitted again without step 0 beside a peer that leaves it out.
    """
    sse_N, midpoint_N, width_N = np.array([(f.sse, f.midpoint, f.width) for f in found]).T
    same = planted
    if drop_first:
        same = replace(planted, x_K=planted.x_K[1:], loss_NK=planted.loss_NK[:, 1:])
    ours_N = sse_of(fit_sigmoids(same.x_K, same.loss_NK), same)
    inside_N = (midpoint_N >= planted.x_K[1]) & (midpoint_N <= planted.x_K[-1])
    inside_N &= width_N <= planted.x_K[-1] - planted.x_K[1]
    higher_N = ours_N > sse_N * (1 + CLOSE)
    return [
        f"{higher_N.sum()} ({(higher_N & inside_N).sum()}) of {len(sse_N)}",
        f"{(sse_N > ours_N * (1 + CLOSE)).sum()} of {len(sse_N)}",
        "{} of {:,}".format(*planted.missed(midpoint_N)),
    ]


def on_device(planted: PlantedLosses, sizes: Sizes, device: str) -> float:
    """Return tokens per second on a GPU that holds the losses already."""
    loss_NK = torch.as_tensor(planted.loss_NK, device=device)
    loss_NK = loss_NK.repeat(-(-sizes.cuda_losses // loss_NK.numel()), 1)
    seconds = [on_threads(1, planted, loss_NK, device)[0] for _ in range(1 + sizes.turns)]
    return len(loss_NK) / median(seconds[1:])


COLUMNS = [
    "planted",
    "probes",
    "fitted by",
    "tokens/s",
    "ours on {} / it",
    "our SSE higher (its fit in our box)",
    "its SSE higher",
    "wrong basin",
]


# The cost of the stages, and its lower bound.

REST, TWO = "the rest", "refining two sigmoids"
STAGES = [
    ("grid search", grid.Grid, "starts"),
    ("refining one sigmoid", block, "fit_one"),
    ("residuals, tangents, errors", block, "_examine"),
    ("residuals, tangents, errors", noise.Residuals, "from_fit"),
    ("residuals, tangents, errors", noise, "standard_errors"),
    ("best second cell, best ramp", grid.Grid, "second"),
    ("best second cell, best ramp", grid.Grid, "ramp"),
    (TWO, block, "fit_two"),
    ("best pair of cells", grid.Grid, "pair"),
]


@dataclass
class Stage:
    """Cost and work of one stage: seconds, FLOPs of compiled loops, bytes, matrix products."""

    seconds: float = 0.0
    in_loops: float = 0.0
    loop_flops: float = 0.0
    moved: float = 0.0
    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    tokens: int = 0
    evaluations: int = 0


def loop_flops(kernel: str, n_sigmoids: int) -> int:
    """Return FLOPs per loss and pass over a token, by `fit/kernels.py`; a sigmoid takes 23.

    The rows are a residual and three of each sigmoid. `descend` sums them and the products of all
    pairs once per evaluation; `tangents` makes them orthonormal and takes the lag-one products of
    all pairs.
    """
    n_rows = 3 * n_sigmoids + 1
    pairs = n_rows * (n_rows + 1) // 2
    if kernel == "descend":
        return 1 + 31 * n_sigmoids + n_rows + 2 * pairs
    return 1 + 31 * n_sigmoids + n_rows + 4 * pairs + 2 + 4 * pairs


class Watch:
    """Time of each stage, less that of its inner stages; or, while counting, its work.

    The work is the matrix products that torch computes, and the compiled loops. Their
    inputs and results are moved once, and the results of matrix products read once more.
    """

    def __init__(self, counting: bool) -> None:
        self.counting = counting
        self.stages: dict[str, Stage] = defaultdict(Stage)
        self._open = [REST]
        self._since = time.perf_counter()

    @property
    def stage(self) -> Stage:
        return self.stages[self._open[-1]]

    def book(self) -> None:
        """Add the time since the last call to the running stage."""
        now = time.perf_counter()
        self.stage.seconds += now - self._since
        self._since = now

    def timed(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            self.book()
            self._open.append(name)
            self.stage.tokens += len(arguments[1]) if name == TWO else 0
            outermost = self.counting and len(self._open) == 2
            with Products(self) if outermost else nullcontext():
                result = function(*arguments)
            self.book()
            self._open.pop()
            return result

        return wrapper

    def loop(self, kernel: str, function: Any) -> Any:
        def wrapper(theta_PN: Any, *others: Any) -> None:
            start = time.perf_counter()
            evaluations = function(theta_PN, *others)
            stage = self.stage
            stage.in_loops += time.perf_counter() - start
            y_NK = others[1 if kernel == "descend" else 2]
            passes = len(y_NK) if evaluations is None else evaluations
            stage.loop_flops += passes * y_NK.shape[1] * loop_flops(kernel, len(theta_PN) // 2)
            stage.evaluations += evaluations or 0
            stage.moved += sum(each.nbytes for each in others if isinstance(each, np.ndarray))

        return wrapper


class Products(TorchDispatchMode):
    """Records every product of two matrices."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.matmul.default):
            rows, inner = arguments[0].shape
            columns = arguments[1].shape[1]
            stage = self.watch.stage
            stage.products[rows, inner, columns] += 1
            stage.moved += 4 * (rows * inner + inner * columns + 2 * rows * columns)
        return operation(*arguments, **(named or {}))


def watch_fit(planted: PlantedLosses, *, counting: bool) -> dict[str, Stage]:
    """Return the stages of one fit on one thread, whose functions are wrapped until its end."""
    torch.set_num_threads(1)
    watch = Watch(counting)
    with ExitStack() as stack:
        for name, owner, attribute in STAGES:
            wrapped = watch.timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, wrapped))
        for kernel in ("descend", "tangents"):
            wrapped = watch.loop(kernel, getattr(kernels, kernel))
            stack.enter_context(mock.patch.object(kernels, kernel, wrapped))
        watch.book()
        watch.stages.clear()
        fit_sigmoids(planted.x_K, planted.loss_NK)
        watch.book()
    return watch.stages


def fastest(action: Callable[[], Any], seconds: float) -> float:
    """Return the shortest time of an action, in seconds."""
    action()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def product_seconds(rows: int, inner: int, columns: int) -> float:
    """Time a float32 matrix product alone, both factors with `inner` last in memory.

    The best of several places in memory: on some machines the speed depends on it.
    """
    seconds = []
    for _ in range(4):
        one, other = torch.randn(rows, inner), torch.randn(columns, inner)
        made = torch.empty(rows, columns)
        product = functools.partial(torch.mm, one, other.T, out=made)
        seconds.append(fastest(product, 0.02))
    return min(seconds)


def peak() -> float:
    """Measure the FLOP/s of a large matrix product."""
    return 2 * 2048**3 / product_seconds(2048, 2048, 2048)


@functools.cache
def bandwidth() -> float:
    """Measure the bytes per second read and written by copying 256 MB."""
    source, target = torch.zeros(2, 2**26).unbind()
    return 2 * 4 * 2**26 / fastest(lambda: target.copy_(source), 0.5)


STAGE_COLUMNS = [
    "planted",
    "probes",
    "stage",
    "us",
    "share",
    "in compiled loops, us",
    "matrix products alone, us",
    "loops' arithmetic at the peak, us",
    "memory at the bandwidth, us",
]


def stage_rows(name: str, planted: PlantedLosses) -> list[list[str]]:
    """Return the rows of one kind of data; costs are per token of all tokens."""
    n_tokens, about = len(planted.loss_NK), [name, str(len(planted.x_K))]
    time_of, work_of = (watch_fit(planted, counting=counting) for counting in (False, True))
    total = sum(stage.seconds for stage in time_of.values())

    def per_token(seconds: float, amount: float = 0, unit: str = "") -> str:
        more = f" ({amount / 1e3 / n_tokens:.1f} {unit})" if unit else ""
        return f"{1e6 * seconds / n_tokens:.2f}{more}" if seconds else ""

    rows = []
    for label in [*dict.fromkeys(each[0] for each in STAGES), REST]:
        took, did = time_of[label], work_of[label]
        remarks = []
        if label == TWO:
            remarks += [f"{100 * took.tokens / n_tokens:.0f}% of the tokens"]
        if did.evaluations:
            remarks += [f"{did.evaluations / n_tokens:.1f} evaluations"]
        shapes = did.products.items()
        flops = sum(2 * count * math.prod(shape) for shape, count in shapes)
        alone = sum(count * product_seconds(*shape) for shape, count in shapes)
        row = [
            label + (f" ({', '.join(remarks)})" if remarks else ""),
            per_token(took.seconds),
            f"{100 * took.seconds / total:.0f}%",
            per_token(took.in_loops),
            per_token(alone, flops, "kFLOP"),
            per_token(did.loop_flops / peak(), did.loop_flops, "kFLOP"),
            per_token(did.moved / bandwidth(), did.moved, "kB"),
        ]
        rows.append(about + row)
    return [*rows, [*about, "all", per_token(total), "100%", *[""] * 4]]


def legend(arguments: argparse.Namespace, sizes: Sizes) -> str:
    ours = " and ".join(f"{sizes.tokens(k):,} tokens of {k} probes" for k in (60, 500))
    return (
        f"Medians of {sizes.turns} turns. Ours, with errors and classes: {ours}.\n"
        "Cores: the processor time that ours was given; less than its threads on a busy machine.\n"
        f"Peers, without: the first {sizes.peers} of these tokens, on one core.\n"
        "Single: falling, white noise. Mixed: falling 38%, rising 1%, two-step 22%, gradual 23%,\n"
        "flat 16%, noise with an autocorrelation of 0.6.\n"
        "SSE higher: by more than 1e-4. Our box: a midpoint within the probes and a width of at\n"
        "most their range; the peers have none. Chang et al. leave out step 0; there the SSE of\n"
        "ours is of a fit without it too. Wrong basin: |c - planted c| > 0.5, of the planted\n"
        "sigmoids whose losses tell c to 0.1 (Cramer-Rao); ours of the first "
        f"{sizes.checked:,} tokens, and\nof the peers'. Seed {arguments.seed}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}."
    )


def stage_legend() -> str:
    return (
        "One thread, per token of all tokens; what a stage takes, and on the right what parts of\n"
        "its work take at best: its matrix products by themselves, in the same shapes; the\n"
        "arithmetic of its compiled loops at the peak, "
        f"{peak() / 1e9:.0f} GFLOP/s (a float32 product of 2048 x 2048);\n"
        "reading and writing what both work on at "
        f"{bandwidth() / 1e9:.1f} GB/s (a copy of 256 MB; a chunk can stay\nin the cache)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens: rates mean little")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cuda: ours there as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    modules = {"torch": torch, "scipy": scipy, "numpy": np, "numba": numba}
    about = heading(**{name: module.__version__ for name, module in modules.items()})
    sizes = Sizes(blocks=6, checked=20_000, peers=900, turns=3, cuda_losses=2**28)
    if arguments.quick:
        sizes = Sizes(blocks=1, checked=5_000, peers=40, turns=1, cuda_losses=2**24)
    rows, stages = [], []
    for mixed in (False, True):
        for n_probes in (60, 500):
            name, n_tokens = "mixed" if mixed else "single", sizes.tokens(n_probes)
            planted = plant(n_tokens, n_probes, sizes.checked, arguments.seed, mixed=mixed)
            rows += measure(name, planted, sizes, arguments.threads, arguments.device)
            stages += stage_rows(name, planted.tokens(slice(2 * BLOCK_LOSSES // n_probes)))
    columns = [each.format(f"1 / {arguments.threads} threads") for each in COLUMNS]
    command = " ".join(["python", "benchmarks/fit_throughput.py", *sys.argv[1:]])
    parts = [
        "# Tokens fitted per second",
        f"`{command}`, {date.today():%-d %B %Y}.",
        about,
        legend(arguments, sizes),
        markdown(columns, rows),
        "## What each stage costs",
        stage_legend(),
        markdown(STAGE_COLUMNS, stages),
    ]
    text = "\n\n".join(parts)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Learning times with a known truth: multitask sparse parity (Michaud et al., arXiv 2303.13506).

    python examples/sparse_parity.py --out FOLDER [--plot] [--markdown FILE]

A small network learns many subtasks at once. A control bit names the subtask, and the label is the
parity of the few task bits that this subtask reads. Subtask i is drawn with probability p_i ~
i^-1.4. So the quanta and their frequencies are known, each is learned in one step, and the mean
loss is smooth. The losses of single test samples are fitted as a language model's tokens are.

Differences from the paper's Figure 2: it is smaller (24 subtasks, 32 bits, batches of 500, 20,000
steps in place of 500, 100, 20,000 and 200,000), and no two subtasks have the same bits: with few
bits they often would, and be learned at once. Networks differ in initialisation and data, not in
subtasks and test samples. A document is one test sample of every subtask, so documents come from
one distribution and any of them stand for all subtasks: even documents are fitted; on odd ones the
convergence times and the mean curves are measured. The trained networks' losses stay in FOLDER,
and are read again when the settings are the same.

The problem, the network and its training are in sparse_parity_network.py.

Shapes: T subtasks, N test samples, document by document, K probe steps, E events, G grid points.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import scipy.optimize
import torch
from scipy.stats import linregress, norm, spearmanr, t
from sparse_parity_network import Settings, SparseParity, probe_steps, trained

import megatron_tokscale
from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.files import write_text
from megatron_tokscale.fit import SigmoidFits, TokenClass, fit_sigmoids
from megatron_tokscale.spectrum import (
    Comparison,
    LearningTimeSpectrum,
    learning_times,
    reconstruct,
)

CONVERGED = 0.1 * math.log(2)  # nats; the paper's 0.1 bits


@dataclass(frozen=True)
class Watched:
    """One network: its fits, and the truth measured on held-out documents.

    Attributes:
        fits: fits of the even documents' samples.
        fitted_loss_K: mean loss of the same samples.
        held_loss_TK: mean loss of every subtask over the odd documents.
        learned_x_T: ln(learning time) by the fits; NaN where the samples' drops are under half
            of ln 2 nats each.
        event_x_T: the same from all falling steps of the samples.
        converged_x_T: ln(convergence time) on the odd documents; NaN if not reached in the run.
    """

    fits: SigmoidFits
    fitted_loss_K: Floats
    held_loss_TK: Floats
    learned_x_T: Floats
    event_x_T: Floats
    converged_x_T: Floats

    @classmethod
    def from_losses(cls, settings: Settings, loss_NK: Floats32) -> Self:
        """Fit the even documents, and measure the odd ones."""
        with np.errstate(divide="ignore"):
            x_K = np.log(probe_steps(settings.steps))
        document_N, task_N = np.divmod(np.arange(len(loss_NK)), settings.tasks)
        even_N = document_N % 2 == 0
        fits = fit_sigmoids(x_K, loss_NK[even_N])
        held_loss_TK = np.stack(
            [loss_NK[~even_N & (task_N == i)].mean(0, float) for i in range(settings.tasks)]
        )
        return cls(
            fits,
            loss_NK[even_N].mean(0, float),
            held_loss_TK,
            learned_x(fits, task_N[even_N], settings.tasks),
            event_x(fits, task_N[even_N], settings.tasks),
            np.array([converged_x(x_K, loss_K) for loss_K in held_loss_TK]),
        )


def converged_x(x_K: Floats, loss_K: Floats) -> float:
    """Return x where a mean loss first falls below 0.1 bits, between two probes, or NaN."""
    below_K = loss_K < CONVERGED
    if not below_K.any():
        return math.nan
    last = int(below_K.argmax())
    return float(np.interp(-CONVERGED, -loss_K[last - 1 : last + 1], x_K[last - 1 : last + 1]))


def learned_x(fits: SigmoidFits, task_N: Integers, tasks: int) -> Floats:
    """Return the drop-weighted median of the learning times of every subtask's samples."""
    time_N = learning_times(fits)
    known_N = np.isfinite(time_N)
    return median_x(
        time_N[known_N], fits.drop_N[known_N], task_N[known_N], np.bincount(task_N), tasks
    )


def event_x(fits: SigmoidFits, task_N: Integers, tasks: int) -> Floats:
    """Return the same from all falling steps: up to two per two-step sample."""
    moves = fits.transitions
    falls_E = moves.placed_E & (moves.drop_E > 0)
    task_E = task_N[moves.token_E[falls_E]]
    return median_x(
        moves.midpoint_E[falls_E], moves.drop_E[falls_E], task_E, np.bincount(task_N), tasks
    )


def median_x(
    midpoint_E: Floats, drop_E: Floats, task_E: Integers, samples_T: Floats, tasks: int
) -> Floats:
    """Return the drop-weighted median per subtask; NaN if the drops are under half of ln 2."""
    x_T = np.full(tasks, np.nan)
    for task in range(tasks):
        of_task_E = np.flatnonzero(task_E == task)
        of_task_E = of_task_E[midpoint_E[of_task_E].argsort()]
        fallen_E = drop_E[of_task_E].cumsum()
        if len(fallen_E) and fallen_E[-1] > math.log(2) / 2 * samples_T[task]:
            x_T[task] = midpoint_E[of_task_E[np.searchsorted(fallen_E, fallen_E[-1] / 2)]]
    return x_T


def agreement(x_T: Floats, converged_x_T: Floats) -> float:
    """Return Spearman's correlation of learning and convergence times, where both are known."""
    both_T = np.isfinite(x_T) & np.isfinite(converged_x_T)
    return float(spearmanr(x_T[both_T], converged_x_T[both_T]).statistic)


def frequency_exponent(frequency_T: Floats, x_T: Floats) -> tuple[float, float]:
    """Return b of S ~ p^-b by least squares over the subtasks that have an S, and its half-width.

    The half-width is that of the 95% interval.
    """
    known_T = np.isfinite(x_T)
    line = linregress(np.log(frequency_T[known_T]), x_T[known_T])
    return -float(line.slope), float(line.stderr * t.ppf(0.975, known_T.sum() - 2))


def censored_exponent(frequency_T: Floats, x_T: Floats, last_x: float) -> float:
    """Return b of S ~ p^-b, where subtasks without an S count as later than the run's end.

    It is the most likely line with normal scatter (Tobin). Least squares over the other subtasks is
    biased low: of the rarest subtasks it sees only those that were learned early.
    """
    known_T, log_p_T = np.isfinite(x_T), np.log(frequency_T)
    least_T = np.where(known_T, x_T, last_x)

    def misfit(parameters: Floats) -> float:
        level, b, log_scatter = parameters
        z_T = (least_T - level + b * log_p_T) / math.exp(log_scatter)
        likelihood_T = np.where(known_T, norm.logpdf(z_T) - log_scatter, norm.logsf(z_T))
        return -float(likelihood_T.sum())

    line = linregress(log_p_T[known_T], x_T[known_T])
    start = [line.intercept, -line.slope, -2.0]
    found = scipy.optimize.minimize(misfit, start, method="Nelder-Mead", options={"maxiter": 2000})
    return float(found.x[1])


def scores(source: Watched, target: Watched) -> dict[str, float]:
    """Return R^2 of the target's held-out -dL/dx, by reconstruction from the source's fits.

    The last reconstruction reads no samples: it is the fit of the source's mean curve.
    """
    held_loss_K = target.held_loss_TK.mean(axis=0)
    compared = reconstruct(source.fits, held_loss_K)
    mean_curve = fit_sigmoids(source.fits.x_K, source.fitted_loss_K[None])
    of_mean_curve = reconstruct(mean_curve, held_loss_K).by_name["full"].r2
    found = {name: each.r2 for name, each in compared.by_name.items()}
    return found | {"fit of the mean curve": of_mean_curve}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview(settings: Settings, networks: Sequence[Watched]) -> str:
    """Return the table of results, one column per network."""
    frequency_T = SparseParity(settings).frequency_T
    last_x = math.log(settings.steps)
    nexts = [*networks[1:], networks[0]]

    def count(each: Watched) -> str:
        learned_T, converged_T = np.isfinite(each.learned_x_T), np.isfinite(each.converged_x_T)
        only = (learned_T & ~converged_T).sum(), (converged_T & ~learned_T).sum()
        return f"{converged_T.sum()}, {learned_T.sum()} ({only[0]}, {only[1]})"

    def lead(each: Watched) -> str:
        return f"{np.nanmedian(np.exp(each.learned_x_T - each.converged_x_T)):.2f}"

    def slope(x_T: Floats) -> str:
        b, reach = frequency_exponent(frequency_T, x_T)
        every = censored_exponent(frequency_T, x_T, last_x)
        return f"{b:.2f} ± {reach:.2f} ({every:.2f})"

    rows = [
        ["subtasks converged, learned by the fits (only by the fits, only converged)"]
        + [count(each) for each in networks],
        ["Spearman, learning time and convergence time"]
        + [f"{agreement(each.learned_x_T, each.converged_x_T):.3f}" for each in networks],
        ["the same, learning time by the events of the samples' classes"]
        + [f"{agreement(each.event_x_T, each.converged_x_T):.3f}" for each in networks],
        ["learning time / convergence time, median", *map(lead, networks)],
        ["b, convergence time ~ p^-b: converged (and censored) subtasks"]
        + [slope(each.converged_x_T) for each in networks],
        ["b, learning time ~ p^-b: learned (and censored) subtasks"]
        + [slope(each.learned_x_T) for each in networks],
        ["samples falling, two-step, flat"] + [classes(each.fits) for each in networks],
    ]
    for where, targets in (("held-out documents", networks), ("the next network", nexts)):
        columns = [scores(*pair) for pair in zip(networks, targets, strict=True)]
        rows += [
            [f"R² of -dL/dx of {where}: {name}", *(f"{column[name]:.3f}" for column in columns)]
            for name in columns[0]
        ]
    return table(["", *(f"network {i}" for i in range(len(networks)))], rows)


def classes(fits: SigmoidFits) -> str:
    """Return the shares of samples by class."""
    groups = (
        (TokenClass.FALLING,),
        (TokenClass.TWO_STEP,),
        (TokenClass.FLAT_KNOWN, TokenClass.FLAT_UNLEARNED),
    )
    return ", ".join(f"{fits.is_class(*group).mean():.0%}" for group in groups)


def times(settings: Settings, networks: Sequence[Watched]) -> str:
    """Return the table of convergence and learning times of every subtask, in steps."""
    frequency_T = SparseParity(settings).frequency_T
    columns = ["subtask", "p"] + [f"network {i}" for i in range(len(networks))]

    def steps(x: float) -> str:
        return f"{math.exp(x):,.0f}" if math.isfinite(x) else "-"

    rows = [
        [str(i + 1), f"{frequency_T[i]:.4f}"]
        + [f"{steps(each.converged_x_T[i])} / {steps(each.learned_x_T[i])}" for each in networks]
        for i in range(settings.tasks)
    ]
    return table(columns, rows)


def plot(path: Path, settings: Settings, networks: Sequence[Watched]) -> None:
    """Plot subtask curves, times by frequency, and the spectrum beside another network's -dL/dx."""
    from matplotlib.figure import Figure

    first, other = networks[0], networks[1]
    x_K = first.fits.x_K
    frequency_T = SparseParity(settings).frequency_T
    compared: Comparison = reconstruct(first.fits, other.held_loss_TK.mean(axis=0))
    spectrum = LearningTimeSpectrum.from_fits(first.fits)
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, frequency, density = figure.subplots(1, 3)
    curves.plot(np.exp(x_K[1:]), first.held_loss_TK[:, 1:].T, color="tab:blue", linewidth=0.7)
    mean_K = first.held_loss_TK.mean(axis=0)
    curves.plot(np.exp(x_K[1:]), mean_K[1:], color="black", label="mean of the subtasks")
    curves.set(xscale="log", xlabel="optimizer step", ylabel="held-out loss (nats)")
    for i, each in enumerate(networks):
        for name, x_T, marker in (
            ("convergence", each.converged_x_T, "o"),
            ("learning", each.learned_x_T, "x"),
        ):
            label = f"{name} time, network {i}"
            frequency.plot(frequency_T, np.exp(x_T), marker, color=f"C{i}", label=label)
    frequency.set(xscale="log", yscale="log", xlabel="frequency p of a subtask", ylabel="step")
    steps_G = np.exp(compared.x_G)
    density.plot(steps_G, compared.measured_G, color="black", label="-dL/dx, network 1")
    kernel_G = compared.by_name["kernel"].derivative_G
    density.plot(steps_G, kernel_G, label="from the learning times of network 0")
    density.fill_between(
        np.exp(spectrum.x_G), spectrum.drop_weighted_G, alpha=0.3, label="spectrum, network 0"
    )
    density.set(xscale="log", xlabel="optimizer step", ylabel="nats per unit of ln(step)")
    for axes in (curves, frequency, density):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def command(settings: Settings, networks: int) -> str:
    """Return the command that makes the same table again."""
    changed = [
        f"--{field.name.replace('_', '-')} {getattr(settings, field.name)}"
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    words = ["python examples/sparse_parity.py --out FOLDER --networks", str(networks), *changed]
    return " ".join(words)


def watch(folder: Path, settings: Settings, networks: int) -> list[Watched]:
    """Train the networks that `folder` does not hold yet, and fit them all."""
    return [Watched.from_losses(settings, trained(folder, settings, i)) for i in range(networks)]


def main(words: Sequence[str] | None = None) -> None:
    """Train, fit, and print the findings beside the truth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained losses")
    parser.add_argument("--networks", type=int, default=2, help="seeds of the network; at least 2")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--plot", action="store_true", help="also write sparse_parity.png there")
    parser.add_argument("--markdown", type=Path, help="write the tables with command and versions")
    for field in fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    arguments = parser.parse_args(words)
    if arguments.networks < 2:
        parser.error(f"--networks is {arguments.networks}; expected 2 or more; give --networks 2")
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    torch.set_num_threads(arguments.threads)
    networks = watch(arguments.out, settings, arguments.networks)
    found = overview(settings, networks)
    per_subtask = times(settings, networks)
    print(f"{found}\n\nConvergence time / learning time in steps:\n\n{per_subtask}")
    if arguments.plot:
        plot(arguments.out / "sparse_parity.png", settings, networks)
    if arguments.markdown:
        text = [
            "# Learning times against a known truth: multitask sparse parity",
            f"`{command(settings, arguments.networks)}`",
            f"megatron-tokscale {megatron_tokscale.__version__}, Python "
            f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"scipy {scipy.__version__}; {json.dumps(asdict(settings))[1:-1]}",
            found,
            "**Convergence time / learning time in steps** (-: not within the run)",
            per_subtask,
        ]
        write_text(arguments.markdown, "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()

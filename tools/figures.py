"""Draw the picture of the README from the demo's run: docs/images/spectrum.svg.

    python tools/figures.py [RUN] [--tokenizer FILE]     # `make figures`: demo-run/baseline

Left: four tokens' losses at the probes with their fitted sigmoids. Right: the learning-time
spectrum over the measured slope of the mean loss curve. The run must be fitted.

Shapes: K probe steps, G grid points, N tokens.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.spectrum import LearningTimeSpectrum, SlopeEstimator
from megatron_tokscale.store import Run

OUT = Path(__file__).parents[1] / "docs/images"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by all readers
LEAST_DROP = 2.0  # nats: a fall that is clear beside the losses' noise
CLEAR = 0.2  # units of x: largest standard error of a midpoint that is shown
CONTEXT = 5  # tokens before the watched one that are shown
SHOWN = 34  # characters of a label

mpl.rcParams.update(
    {
        "svg.fonttype": "path",
        "svg.hashsalt": "megatron-tokscale",  # the same file from the same run
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def main() -> None:
    """Draw the picture of the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("demo-run/baseline"))
    parser.add_argument("--tokenizer", type=Path, default=Path("demo-run/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    run = Run.open(arguments.run)
    fits = SigmoidFits.load(run.paths.fits)
    figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    draw_tokens(left, run, fits, arguments.tokenizer)
    draw_spectrum(right, run, fits)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "spectrum.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
    print(path)


def draw_tokens(axes: Axes, run: Run, fits: SigmoidFits, tokenizer: Path) -> None:
    """Draw some tokens' losses over the steps, each with its sigmoid."""
    x_K = run.x_K()
    finite_K = np.isfinite(x_K)
    x_G = np.linspace(x_K[finite_K][0], x_K[finite_K][-1], 300)
    for token, colour in zip(chosen(fits), COLOURS, strict=False):
        loss_K = run.read_losses(token, token + 1)[0]
        axes.plot(np.exp(x_K[finite_K]), loss_K[finite_K], ".", ms=3.5, color=colour, alpha=0.65)
        curve_G = fits.rows([token]).predict(x_G)[0]
        axes.plot(np.exp(x_G), curve_G, color=colour, lw=1.6, label=label(run, token, tokenizer))
    axes.set(xscale="log", xlabel="optimizer step", ylabel="loss of the token (nats)")
    axes.set_title("Four tokens: loss at the probes, and fitted sigmoid", fontsize=10)
    axes.set_ylim(0, None)
    axes.legend(fontsize=7.5, frameon=False, title="context[token]", title_fontsize=7.5)


def chosen(fits: SigmoidFits) -> list[int]:
    """Return four falling tokens, one from each quarter of the range of clear learning times.

    In each quarter it is the token with the smallest error of its midpoint among those that drop by
    more than `LEAST_DROP`: the picture shows clear cases, not average ones.
    """
    clear_N = fits.is_class(TokenClass.FALLING) & (fits.drop_N > LEAST_DROP)
    clear_N &= fits.midpoint_se_N < CLEAR
    edges = np.linspace(*np.quantile(fits.midpoint_N[clear_N], [0.05, 0.95]), len(COLOURS) + 1)
    found = []
    for low, high in pairwise(edges):
        inside_N = clear_N & (fits.midpoint_N >= low) & (fits.midpoint_N < high)
        found.append(int(np.where(inside_N, fits.midpoint_se_N, np.inf).argmin()))
    return found


def label(run: Run, token: int, tokenizer: Path) -> str:
    """Return the watched token in brackets after the end of its context."""
    row, column = (places[token] for places in np.nonzero(run.probe_set.mask_BS))
    before = run.probe_set.tokens_BS[row, max(0, column + 1 - CONTEXT) : column + 1].tolist()
    target = [int(run.probe_set.labels_BS[row, column])]
    text = f"{decoded(tokenizer, before)}[{decoded(tokenizer, target)}]".replace("\n", "⏎")
    return (text if len(text) <= SHOWN else f"…{text[-SHOWN:]}").replace("$", r"\$")


def decoded(tokenizer: Path, ids: Sequence[int]) -> str:
    """Return the text of token ids; the ids themselves without a tokenizer."""
    if not tokenizer.exists():
        return " ".join(map(str, ids))
    from tokenizers import Tokenizer

    text: str = Tokenizer.from_file(str(tokenizer)).decode(list(ids))
    return text


def draw_spectrum(axes: Axes, run: Run, fits: SigmoidFits) -> None:
    """Draw the drop-weighted spectrum over the slope of the mean loss."""
    spectrum = LearningTimeSpectrum.from_fits(fits)
    complete_N = fits.complete_N
    mean_K = run.read_losses()[complete_N].mean(axis=0, dtype=np.float64)
    estimator = SlopeEstimator.from_curve(fits.x_K, mean_K)
    slope_G = estimator.slopes(mean_K[None], spectrum.x_G)[0]
    error_G = estimator.error(spectrum.x_G)
    step_G = np.exp(spectrum.x_G)
    axes.fill_between(
        step_G,
        spectrum.drop_weighted_G,
        color=COLOURS[0],
        alpha=0.3,
        lw=0,
        label="learning-time spectrum\n(tokens' drops at their learning times)",
    )
    axes.plot(step_G, slope_G, color="black", lw=1.4, label="measured slope −dL/dx")
    axes.fill_between(
        step_G, slope_G - 2 * error_G, slope_G + 2 * error_G, color="black", alpha=0.15, lw=0
    )
    axes.set(xscale="log", xlabel="optimizer step", ylabel="nats per unit of x = ln(step)")
    axes.set_title(
        f"All {complete_N.sum():,} tokens: learning times, and slope of the mean", fontsize=10
    )
    axes.set_ylim(0, 1.35 * max(spectrum.drop_weighted_G.max(), slope_G.max()))
    axes.legend(fontsize=7.5, frameon=False, loc="upper right")


if __name__ == "__main__":
    main()

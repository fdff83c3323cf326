"""Read a run and plot one token: its losses through training and its fitted sigmoid.

    python examples/plot_token.py demo-run/baseline token.png --tokenizer demo-run/tokenizer.json

Without --token it plots the falling token whose learning time has the smallest error among those
that dropped by more than 2 nats. It needs matplotlib and tokenizers: pip install
'megatron-tokscale[report]'.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.store import Run


def best_known_token(fits: SigmoidFits) -> int:
    """Return the falling token with a drop over 2 nats whose midpoint has the smallest error."""
    candidates = fits.is_class(TokenClass.FALLING) & (fits.drop_N > 2)
    error_N = np.where(candidates & np.isfinite(fits.midpoint_se_N), fits.midpoint_se_N, np.inf)
    return int(error_N.argmin())


def context_of(run: Run, token: int, tokenizer: Path | None, length: int = 12) -> str:
    """Return the tokens before the watched one, then the watched one in brackets."""
    row, column = (places[token] for places in np.nonzero(run.probe_set.mask_BS))
    before = run.probe_set.tokens_BS[row, max(0, column - length) : column + 1].tolist()
    target = int(run.probe_set.labels_BS[row, column])
    if tokenizer is None:
        return f"{before} [{target}]"
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer))
    return f"{decoder.decode(before)}[{decoder.decode([target])}]"


def main() -> None:
    """Plot one token of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory (holds tokscale/)")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--token", type=int, help="number of the token in the probe set")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, to show text")
    arguments = parser.parse_args()

    run = Run.open(arguments.run)
    fits = SigmoidFits.load(run.paths.fits)
    token = best_known_token(fits) if arguments.token is None else arguments.token
    losses_K = run.read_losses(token, token + 1)[0]
    x_K = run.x_K()
    x_G = np.linspace(x_K[np.isfinite(x_K)].min(), x_K.max(), 400)

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.exp(x_K[1:]), losses_K[1:], ".", color="black", label="loss at the probes")
    axes.plot(np.exp(x_G), fits.rows([token]).predict(x_G)[0], label="fit")
    axes.axvline(np.exp(fits.midpoint_N[token]), linestyle=":", label="learning time")
    axes.set(xscale="log", xlabel="optimizer step", ylabel="loss (nats)")
    axes.set_title(context_of(run, token, arguments.tokenizer).replace("$", r"\$"), fontsize=9)
    axes.legend()
    figure.savefig(arguments.out, dpi=150)
    print(
        f"token {token}: learning time {np.exp(fits.midpoint_N[token]):.0f} steps, "
        f"drop {fits.drop_N[token]:.2f} nats, {TokenClass(fits.class_N[token]).label}"
    )


if __name__ == "__main__":
    main()

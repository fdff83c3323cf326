"""`fit_run`: a run on disk, streamed by blocks of tokens, to fits.parquet and fit.json.

Shapes: N tokens, K probe steps.
"""

import time as clock
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import write_json
from megatron_tokscale.fit.axis import MIN_PROBES, Axis
from megatron_tokscale.fit.sigmoids import fit_sigmoids
from megatron_tokscale.fit.table import FitStatus, ParquetRows, SigmoidFits, TokenClass

if TYPE_CHECKING:
    from megatron_tokscale.store import Run
    from megatron_tokscale.store.reader import Time

SCHEMA_VERSION = 1
_VALUES_PER_READ = 2**24


def fits_path(run: "Run") -> Path:
    """Where `fit_run` puts the fits of a run."""
    return run.analysis / "fits.parquet"


def fit_run(
    run: "Run",
    *,
    time: "Time" = "step",
    block_tokens: int | None = None,
    device: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fit every watched token of `run`; write RUN/analysis/fits.parquet and fit.json.

    Memory does not grow with the number of tokens. The parquet has one row per token: the columns
    of `SigmoidFits` and the token's label, domain, document, position and context length.

    Args:
        run: an opened run.
        time: "step", "tokens" or "lr-sum"; x is its natural logarithm.
        block_tokens: tokens read at once; by default 64 MB of losses.
        device: where to compute; by default the CPU.
        progress: called with (tokens done, tokens in all) after every block.

    Returns:
        The content of fit.json.

    Raises:
        TokscaleError: too few probes, a damaged losses file, or a time the run does not know.
    """
    n_probes = len(run.records)
    if n_probes < MIN_PROBES:
        raise TokscaleError(
            f"{run.path} has {n_probes} probe steps, a sigmoid needs at least {MIN_PROBES}; "
            "train on, or probe more often (--tokscale-schedule)"
        )
    axis = Axis.of(run.x_K(time))
    run.verify()
    started = clock.monotonic()
    block_tokens = block_tokens or max(_VALUES_PER_READ // n_probes, 1)
    made_of = {
        "version": __version__,
        "time": time,
        "steps": run.step_K.tolist(),
        "probe_fingerprint": run.probe_set.fingerprint,
    }
    tally = _Tally()
    with ParquetRows(fits_path(run), axis.x_K, made_of) as rows:
        for start in range(0, run.n_tokens, block_tokens):
            stop = min(start + block_tokens, run.n_tokens)
            loss_NK = run.read_losses(start, stop)
            fits = fit_sigmoids(axis.x_K, loss_NK, device=device)
            rows.append(fits, _probe_columns(run, start, stop))
            tally.add(fits, loss_NK)
            if progress:
                progress(stop, run.n_tokens)
    seconds = clock.monotonic() - started
    summary = {
        "schema_version": SCHEMA_VERSION,
        **made_of,
        "n_tokens": run.n_tokens,
        "n_probes": n_probes,
        **tally.summary(),
        "settings": _settings(),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(run.n_tokens / max(seconds, 1e-9), 1),
    }
    write_json(fits_path(run).with_name("fit.json"), summary)
    return summary


def _probe_columns(run: "Run", start: int, stop: int) -> dict[str, tuple[NDArray[Any], str]]:
    """What the probe set knows of the tokens."""
    part, tokens = slice(start, stop), run.probe_set
    return {
        "label": (tokens.label_N[part], "token id"),
        "domain": (tokens.domain_N[part], "index into the probe set's domains"),
        "document": (tokens.document_N[part], "index in the domain"),
        "position": (tokens.position_N[part], "tokens from the document's start"),
        "context": (tokens.context_N[part], "tokens predicted from"),
    }


def _settings() -> dict[str, Any]:
    from megatron_tokscale.fit import classes

    return {
        "criterion": "BIC",
        "margin": classes.MARGIN,
        "parameters": classes.PARAMETERS,
        "known_below_nats": classes.KNOWN_BELOW,
    }


class _Tally:
    """Counts over the blocks: tokens and fall per class, tokens per status, non-finite losses."""

    def __init__(self) -> None:
        self.tokens: Counter[int] = Counter()
        self.statuses: Counter[int] = Counter()
        self.fall = dict.fromkeys(TokenClass, 0.0)
        self.non_finite = 0

    def add(self, fits: SigmoidFits, loss_NK: NDArray[np.float32]) -> None:
        """Count one block."""
        self.non_finite += int((~np.isfinite(loss_NK)).sum())
        self.statuses.update(fits.status_N.tolist())
        for token_class in TokenClass:
            of_class = fits.is_class(token_class)
            self.tokens[token_class] += int(of_class.sum())
            self.fall[token_class] += float(np.nansum(fits.fall_N[of_class], dtype=np.float64))

    def summary(self) -> dict[str, Any]:
        """Counts and shares as plain JSON values.

        A class's share of the fall is its part of the sum over tokens of the measured loss at the
        first probe minus that at the last: no model, the shares add up to one, and a
        class that forgets has a negative share.
        """
        n_tokens, fall = self.tokens.total(), sum(self.fall.values())
        return {
            "classes": {
                token_class.label: {
                    "tokens": self.tokens[token_class],
                    "share": self.tokens[token_class] / max(n_tokens, 1),
                    "fall_nats": self.fall[token_class],
                    "fall_share": self.fall[token_class] / fall if fall else None,
                }
                for token_class in TokenClass
            },
            "fall_nats": fall,
            "status": {status.label: self.statuses[status] for status in FitStatus},
            "non_finite": {
                "tokens": self.statuses[FitStatus.NON_FINITE],
                "losses": self.non_finite,
            },
        }

"""Sums of the losses of all runs by resampling unit and group, from one pass over the tokens.

Shapes: N tokens, U resampling units, C groups, R resamples, I runs, P probes of all runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import Progress
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import loss_sums
from megatron_tokscale.store import Run

UNITS = 256
"""Most units of resampling (our choice): a table of all runs' probes by unit and group is kept."""
_VALUES_PER_READ = 2**24  # losses of a block of tokens: 64 MB
_SAMPLE = 50_000  # tokens whose last losses are kept, for the isotonic thresholds (our choice)


@dataclass(frozen=True)
class AxisSums:
    """Sums over the tokens whose losses are finite at all probes of all runs.

    Attributes:
        names: names of the groups, by name of the grouping.
        tokens_UC: number of tokens by unit and group, by name of the grouping.
        loss_UCP: sums of their losses in nats.
        last_NI: last losses of a sample of the tokens.
    """

    names: Mapping[str, Sequence[str]]
    tokens_UC: Mapping[str, Floats]
    loss_UCP: Mapping[str, Floats]
    last_NI: Floats32

    @classmethod
    def read(
        cls, runs: Sequence[Run], groupings: Mapping[str, Groups], units: Units, progress: Progress
    ) -> "AxisSums":
        """Read all losses of the runs, block by block.

        Raises:
            TokscaleError: no token has finite losses at all probes of all runs, or a losses file is
                damaged.
        """
        n_units, n_tokens = len(units), runs[0].n_tokens
        last_I = np.cumsum([len(run.step_K) for run in runs]) - 1
        probes = int(last_I[-1]) + 1
        tokens = {name: np.zeros((n_units, len(each.names))) for name, each in groupings.items()}
        sums = {name: np.zeros((*counts.shape, probes)) for name, counts in tokens.items()}
        sampled, share = [], min(_SAMPLE / max(n_tokens, 1), 1.0)
        rng = np.random.default_rng(0)
        block = max(_VALUES_PER_READ // probes, 1)
        meter = progress.meter("losses of the runs", n_tokens, "tokens")
        for start in range(0, n_tokens, block):
            loss_NP = np.concatenate([run.read_losses(start, start + block) for run in runs], 1)
            finite_N = np.isfinite(loss_NP).all(axis=1)
            token_N = start + np.flatnonzero(finite_N)
            loss_NP, unit_N = loss_NP[finite_N], units.unit_N[token_N]
            for name, groups in groupings.items():
                n_groups = len(groups.names)
                cell_N = unit_N.astype(np.int64) * n_groups + groups.group_N[token_N]
                n_cells = n_units * n_groups
                tokens[name] += np.bincount(cell_N, minlength=n_cells).reshape(n_units, -1)
                sums[name] += loss_sums(loss_NP, cell_N, n_cells).reshape(sums[name].shape)
            sampled.append(loss_NP[rng.random(len(loss_NP)) < share][:, last_I])
            meter(min(start + block, n_tokens))
        last_NI = np.concatenate(sampled)
        if not any(counts.any() for counts in tokens.values()):
            raise TokscaleError(
                f"no token has finite losses at all probes of all {len(runs)} runs; leave out the "
                "runs that have diverged"
            )
        names = {name: each.names for name, each in groupings.items()}
        return cls(names, tokens, sums, last_NI)

    def means(self, name: str, weight_RU: Floats) -> tuple[Floats, Floats]:
        """Return the mean losses of a grouping under each row of weights, and the tokens' shares.

        Returns:
            (R, C, P) in nats, 0 for an empty group; (R, C).
        """
        tokens_RC = weight_RU @ self.tokens_UC[name]
        loss_RCP = np.tensordot(weight_RU, self.loss_UCP[name], axes=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share_RC = tokens_RC / tokens_RC.sum(axis=1, keepdims=True)
        return loss_RCP / np.maximum(tokens_RC, 1)[:, :, None], share_RC

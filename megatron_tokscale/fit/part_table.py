"""The table of a part of a fit, and the totals over the parts.

Shapes: N tokens, K probe steps, B sequences.
"""

import json
import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.fit.summary import ClassTotal
from megatron_tokscale.fit.table import ExtraColumns, SigmoidFits, TokenClass

if TYPE_CHECKING:
    import pyarrow as pa

    from megatron_tokscale.probe import ProbeSet

_NON_FINITE = b"non_finite"  # metadata of a part: numbers of tokens and losses that are not finite


def part_table(
    fits: SigmoidFits, loss_NK: Floats32, probe_set: "ProbeSet", tokens: slice
) -> "pa.Table":
    """Return the table of a part: fits, columns of the probe set, counts of non-finite losses.

    Args:
        fits: the fits of a block of tokens.
        loss_NK: their losses.
        probe_set: the probe set of the run.
        tokens: the place of the block among the watched tokens.
    """
    non_finite_NK = ~np.isfinite(loss_NK)
    counts = {
        "tokens": int(non_finite_NK.any(axis=1).sum()),
        "losses_K": non_finite_NK.sum(axis=0).tolist(),
    }
    table = fits.to_arrow(_probe_columns(probe_set, tokens))
    return table.replace_schema_metadata({_NON_FINITE: json.dumps(counts)})


def _probe_columns(tokens: "ProbeSet", part: slice) -> ExtraColumns:
    """Return label, dataset, document, position and context of a slice of the watched tokens.

    Only the sequences that hold the slice are read.
    """
    first_B = np.concatenate([[0], tokens.mask_BS.sum(axis=1).cumsum()])
    low = int(np.searchsorted(first_B, part.start, side="right")) - 1
    rows = slice(low, int(np.searchsorted(first_B, part.stop)))
    part = slice(part.start - int(first_B[low]), part.stop - int(first_B[low]))
    mask_BS = tokens.mask_BS[rows]
    context_N = (np.nonzero(mask_BS)[1] + 1).astype(np.int32)
    return {
        "label": (tokens.labels_BS[rows][mask_BS][part], "token id"),
        "dataset": (tokens.dataset_BS[rows][mask_BS][part], "index into the probe set's datasets"),
        "document": (tokens.document_BS[rows][mask_BS][part], "index in the dataset"),
        "position": (tokens.position_BS[rows][mask_BS][part], "tokens from the document's start"),
        "context": (context_N[part], "tokens predicted from"),
    }


class PartTotals:
    """Totals over the parts: tokens and fall per class, tokens per status, non-finite losses."""

    def __init__(self, n_probes: int) -> None:
        self.tokens: Counter[int] = Counter()
        self.statuses: Counter[int] = Counter()
        self.fall = dict.fromkeys(TokenClass, 0.0)
        self.non_finite_tokens = 0
        self.non_finite_K = np.zeros(n_probes, np.int64)

    def add(self, table: "pa.Table") -> None:
        """Add one part, a pyarrow table."""
        class_N, fall_N = (table[name].to_numpy() for name in ("class", "fall"))
        non_finite = json.loads(table.schema.metadata[_NON_FINITE])
        self.non_finite_tokens += non_finite["tokens"]
        self.non_finite_K += non_finite["losses_K"]
        self.statuses.update(table["status"].to_pylist())
        for token_class in TokenClass:
            of_class = class_N == token_class
            self.tokens[token_class] += int(of_class.sum())
            self.fall[token_class] += float(np.nansum(fall_N[of_class], dtype=np.float64))

    def classes(self) -> tuple[dict[str, ClassTotal], float]:
        """Return the totals of each class by its label, and the fall of all tokens in nats.

        The fall is the measured loss at the first probe minus the loss at the last, summed over
        tokens: it needs no model, the shares of the classes add up to one, and a class that forgets
        has a negative share.
        """
        n_tokens, fall = self.tokens.total(), sum(self.fall.values())
        classes = {
            token_class.label: ClassTotal(
                tokens=self.tokens[token_class],
                share=self.tokens[token_class] / max(n_tokens, 1),
                fall_nats=self.fall[token_class],
                fall_share=self.fall[token_class] / fall if fall else math.nan,
            )
            for token_class in TokenClass
        }
        return classes, fall

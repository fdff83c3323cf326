"""The table of a part of a fit, and the totals over the parts.

Shapes: N tokens, K probe steps.
"""

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.fit.summary import ClassTotal
from megatron_tokscale.fit.table import ExtraColumns, SigmoidFits, TokenClass

if TYPE_CHECKING:
    import pyarrow as pa

    from megatron_tokscale.store.tokens import TokenColumns

_NON_FINITE = b"non_finite"  # metadata of a part: numbers of tokens and losses that are not finite
_UNITS: Final = {
    "label_N": "token id",
    "dataset_N": "index into the names of the datasets",
    "document_N": "index in the dataset",
    "sample_N": "index in the dataset",
    "position_N": "tokens from the start of the document or sample",
    "context_N": "tokens predicted from",
}


def part_table(fits: SigmoidFits, loss_NK: Floats32, tokens: "TokenColumns") -> "pa.Table":
    """Return the table of a part: fits, what is known of the tokens, counts of non-finite losses.

    Args:
        fits: the fits of a block of tokens.
        loss_NK: their losses.
        tokens: what is known of the tokens.
    """
    non_finite_NK = ~np.isfinite(loss_NK)
    counts = {
        "tokens": int(non_finite_NK.any(axis=1).sum()),
        "losses_K": non_finite_NK.sum(axis=0).tolist(),
    }
    table = fits.to_arrow(_token_columns(tokens))
    return table.replace_schema_metadata({_NON_FINITE: json.dumps(counts)})


def _token_columns(tokens: "TokenColumns") -> ExtraColumns:
    """Return what is known of the tokens: dataset, document, sample, position, context, label."""
    return {
        name.removesuffix("_N"): (array_N, _UNITS[name]) for name, array_N in tokens.known().items()
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

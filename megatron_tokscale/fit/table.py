"""The table of fits: arrays with a row per token, their units, and the curves that they describe.

Shapes: N tokens, K probe steps, G grid points, E transitions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self, get_type_hints

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from megatron_tokscale.core.arrays import (
    AnyArray,
    Floats,
    Floats32,
    Integers,
    Integers8,
    Integers32,
    Mask,
)
from megatron_tokscale.core.records import JSON
from megatron_tokscale.fit.fits_file import FitsWriter, read_rows

if TYPE_CHECKING:
    import pyarrow as pa


ExtraColumns = Mapping[str, tuple[AnyArray, str]]
"""Array and unit of further columns of a table of fits, by name."""


class TokenClass(IntEnum):
    """The model that describes a token's trajectory best; `fit.classes` chooses it."""

    UNFITTED = -1
    FLAT_KNOWN = 0
    FLAT_UNLEARNED = 1
    FALLING = 2
    RISING = 3
    TWO_STEP = 4
    GRADUAL = 5

    @property
    def label(self) -> str:
        """The name in JSON and in figures, e.g. "flat-known"."""
        return self.name.lower().replace("_", "-")


class FitStatus(IntEnum):
    """Outcome of the one-sigmoid fit of a token.

    CONVERGED: an optimum inside the bounds.
    AT_BOUND: the midpoint lies outside the probed range, or the width is the whole range; the
        parameters cannot be trusted and have no errors.
    TOO_FEW_POINTS: fewer than two probes lie inside the transition; the midpoint is known to the
        probes' spacing, which its error allows for, and the width is only known to be small.
    NON_FINITE: fewer than five losses are finite; nothing was fitted. NaN and infinite losses of
        other tokens are left out of their fit (`n_probes_N` counts the losses used).
    UNDETERMINED: the 95% interval of the midpoint is at least as long as the probed range; the
        losses do not determine the place of the transition.
    STEP_LIMIT: the search ended although the next step would lower the SSE by over a millionth.
    """

    CONVERGED = 0
    AT_BOUND = 1
    TOO_FEW_POINTS = 2
    NON_FINITE = 3
    STEP_LIMIT = 4
    UNDETERMINED = 5

    @property
    def label(self) -> str:
        """The name in JSON, e.g. "at-bound"."""
        return self.name.lower().replace("_", "-")


class Column(NamedTuple):
    """The unit and the description of a per-token array."""

    unit: str
    about: str


@dataclass(frozen=True)
class Transitions:
    """The sigmoids of the class models: one per falling or rising token, two per two-step token.

    Attributes:
        token_E: index of the token.
        drop_E: fall in nats, negative for a rise.
        midpoint_E: midpoint in units of x.
        width_E: width w in units of x.
        placed_E: true if the midpoint can be trusted (inside the probed range, not at a bound).
    """

    token_E: Integers
    drop_E: Floats
    midpoint_E: Floats
    width_E: Floats
    placed_E: Mask

    def rows(self, index_E: Integers | Mask) -> Self:
        """Return the transitions selected by an index array or a mask."""
        return type(self)(*(getattr(self, field.name)[index_E] for field in fields(self)))


@dataclass(frozen=True)
class SigmoidFits:
    """One sigmoid l(x) = f + A s((c - x)/w) per token, and the class of its trajectory.

    Every token has a sigmoid, whatever its class; the sigmoid of a flat token follows its noise.
    The parameters of the other models are NaN except for tokens of that class. `predict` uses the
    model of the class. Errors are standard errors from J^T J and the residual variance, widened by
    the residuals' autocorrelation (`fit.noise`); NaN where they are undefined.
    """

    x_K: Floats
    floor_N: Annotated[Floats32, Column("nats", "f: the loss after the transition")]
    drop_N: Annotated[
        Floats32, Column("nats", "A: the fall through the transition; negative for a rise")
    ]
    midpoint_N: Annotated[
        Floats32, Column("x", "c: midpoint of the transition; learning time = e^c")
    ]
    width_N: Annotated[Floats32, Column("x", "w: width; the 10-90% width is 4.394 w")]
    floor_se_N: Annotated[Floats32, Column("nats", "standard error of f")]
    drop_se_N: Annotated[Floats32, Column("nats", "standard error of A")]
    midpoint_se_N: Annotated[Floats32, Column("x", "standard error of c")]
    width_se_N: Annotated[Floats32, Column("x", "standard error of w")]
    sse_N: Annotated[Floats32, Column("nats^2", "sum of squared residuals of the sigmoid")]
    r2_N: Annotated[Floats32, Column("1", "share of the variance that the sigmoid explains")]
    level_N: Annotated[
        Floats32, Column("nats", "mean loss over the probes; the model of a flat token")
    ]
    fall_N: Annotated[
        Floats32, Column("nats", "measured loss at the first probe minus that at the last")
    ]
    onset_N: Annotated[Floats32, Column("x", "gradual: constant until here, then straight in x")]
    slope_N: Annotated[
        Floats32, Column("nats/x", "gradual: slope after the onset; negative for a fall")
    ]
    onset_loss_N: Annotated[Floats32, Column("nats", "gradual: the loss until the onset")]
    steps_floor_N: Annotated[Floats32, Column("nats", "two-step: the loss after both transitions")]
    step1_drop_N: Annotated[
        Floats32, Column("nats", "two-step: fall through the earlier transition")
    ]
    step1_midpoint_N: Annotated[
        Floats32, Column("x", "two-step: midpoint of the earlier transition")
    ]
    step1_width_N: Annotated[Floats32, Column("x", "two-step: width of the earlier transition")]
    step1_midpoint_se_N: Annotated[
        Floats32, Column("x", "two-step: standard error of the earlier midpoint")
    ]
    step2_drop_N: Annotated[Floats32, Column("nats", "two-step: fall through the later transition")]
    step2_midpoint_N: Annotated[Floats32, Column("x", "two-step: midpoint of the later transition")]
    step2_width_N: Annotated[Floats32, Column("x", "two-step: width of the later transition")]
    step2_midpoint_se_N: Annotated[
        Floats32, Column("x", "two-step: standard error of the later midpoint")
    ]
    evidence_N: Annotated[
        Floats32, Column("1", "by how much BIC favours the class over the runner-up")
    ]
    autocorrelation_N: Annotated[
        Floats32,
        Column("1", "lag-one autocorrelation of the sigmoid's residuals; its errors allow for it"),
    ]
    n_probes_N: Annotated[Integers32, Column("1", "losses that were finite and used")]
    class_N: Annotated[Integers8, Column("code", "TokenClass")]
    runner_up_N: Annotated[Integers8, Column("code", "TokenClass of the next best model")]
    status_N: Annotated[Integers8, Column("code", "FitStatus of the one-sigmoid fit")]

    def __len__(self) -> int:
        return len(self.floor_N)

    @staticmethod
    def columns() -> dict[str, Column]:
        """Return the unit and the description of each per-token array, by its field's name."""
        hints = get_type_hints(SigmoidFits, include_extras=True).items()
        return {name: hint.__metadata__[0] for name, hint in hints if name.endswith("_N")}

    def rows(self, index: slice | Integers | Mask) -> Self:
        """Return the tokens selected by a slice, an index array or a mask."""
        return type(self)(self.x_K, *(getattr(self, name)[index] for name in self.columns()))

    @classmethod
    def concatenate(cls, parts: Sequence["SigmoidFits"]) -> Self:
        """Return the tokens of all parts, which have the same probes, in order."""
        columns = (
            np.concatenate([getattr(part, name) for part in parts]) for name in cls.columns()
        )
        return cls(parts[0].x_K, *columns)

    @property
    def complete_N(self) -> Mask:
        """Mask of the tokens that are fitted and miss no loss; mean curves are taken over these."""
        return np.asarray(np.isfinite(self.level_N) & (self.n_probes_N == len(self.x_K)))

    @property
    def trusted_N(self) -> Mask:
        """Mask of the one-sigmoid midpoints known with an error or to the probes' spacing."""
        return np.isin(self.status_N, (FitStatus.CONVERGED, FitStatus.TOO_FEW_POINTS))

    def is_class(self, *classes: TokenClass) -> Mask:
        """Return a mask of the tokens that belong to one of `classes`."""
        return np.isin(self.class_N, classes)

    def predict(self, x_G: ArrayLike) -> Floats:
        """Return the loss in nats of every token at `x_G` by its class's model; NaN if unfitted."""
        x_G = np.asarray(x_G, dtype=np.float64)
        loss_NG = np.repeat(self.constant_N[:, None], len(x_G), axis=1)
        single = self.is_class(TokenClass.FALLING, TokenClass.RISING)
        double = self.is_class(TokenClass.TWO_STEP)
        for prefix, rows in (("", single), ("step1_", double), ("step2_", double)):
            drop, midpoint, width = (
                getattr(self, f"{prefix}{name}_N")[rows, None].astype(np.float64)
                for name in ("drop", "midpoint", "width")
            )
            loss_NG[rows] += drop * expit((midpoint - x_G) / width)
        gradual = self.is_class(TokenClass.GRADUAL)
        onset, slope = (a[gradual, None].astype(np.float64) for a in (self.onset_N, self.slope_N))
        loss_NG[gradual] += slope * np.maximum(x_G - onset, 0)
        return loss_NG

    @property
    def constant_N(self) -> Floats:
        """The part of `predict` that does not depend on x: level, floor, or loss at the onset."""
        constant_N = self.level_N.astype(np.float64)
        for array, classes in (
            (self.floor_N, (TokenClass.FALLING, TokenClass.RISING)),
            (self.steps_floor_N, (TokenClass.TWO_STEP,)),
            (self.onset_loss_N, (TokenClass.GRADUAL,)),
        ):
            rows = self.is_class(*classes)
            constant_N[rows] = array[rows]
        return constant_N

    @cached_property
    def transitions(self) -> Transitions:
        """The sigmoids in the models of `predict`."""
        single = np.flatnonzero(self.is_class(TokenClass.FALLING, TokenClass.RISING))
        double = np.flatnonzero(self.is_class(TokenClass.TWO_STEP))
        joined = {
            name: np.concatenate(
                [
                    getattr(self, f"{name}_N")[single],
                    getattr(self, f"step1_{name}_N")[double],
                    getattr(self, f"step2_{name}_N")[double],
                ]
            ).astype(np.float64)
            for name in ("drop", "midpoint", "width")
        }
        low = self.x_K[np.isfinite(self.x_K)].min()
        inside = (joined["midpoint"] >= low) & (joined["midpoint"] <= self.x_K.max())
        return Transitions(
            token_E=np.concatenate([single, double, double]),
            drop_E=joined["drop"],
            midpoint_E=joined["midpoint"],
            width_E=joined["width"],
            placed_E=inside
            & np.concatenate([self.trusted_N[single], np.ones(2 * len(double), bool)]),
        )

    def to_arrow(self, extra: ExtraColumns | None = None) -> "pa.Table":
        """Return a pyarrow table with a unit per column, and the `extra` columns."""
        import pyarrow as pa

        columns = {
            name.removesuffix("_N"): (getattr(self, name), *about)
            for name, about in self.columns().items()
        } | {
            name: (array, unit, "from the watched tokens")
            for name, (array, unit) in (extra or {}).items()
        }
        schema = pa.schema(
            [
                pa.field(
                    name, pa.from_numpy_dtype(array.dtype), metadata={"unit": unit, "about": about}
                )
                for name, (array, unit, about) in columns.items()
            ]
        )
        return pa.table([pa.array(array) for array, _, _ in columns.values()], schema=schema)

    def save(self, path: Path, metadata: Mapping[str, JSON] | None = None) -> None:
        """Write the table and its metadata to `path` (parquet), whole or not at all."""
        with FitsWriter(path, self.x_K, metadata or {}) as rows:
            rows.append(self.to_arrow())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table of fits.

        Raises:
            TokscaleError: the file is missing, damaged, of another schema, or not a table of fits.
        """
        return cls.concatenate(list(cls.blocks(path)))

    @classmethod
    def blocks(cls, path: Path) -> Iterator[Self]:
        """Yield a table of fits by the blocks in which it was written.

        Raises:
            TokscaleError: as `load`.
        """
        columns = cls.columns()
        x_K, groups = read_rows(path, [name.removesuffix("_N") for name in columns])
        for arrays in groups:
            yield cls(x_K, *arrays)

"""Steps whose training loss stands out, and the samples and datasets that make it stand out.

Formulas (our choice; losses in nats per token):

- The level of a step is the median of the losses of the steps around it, itself left out: up to
  WINDOW / 2 on either side, and at the start of the run as many behind it as before it.
- A step stands out by (loss - level) / (1.4826 MAD), with the median absolute deviation from the
  level over the same steps. 1.4826 MAD is the standard deviation of normal noise.
- The expected loss of a sample is the level of its dataset: the median of the dataset's mean losses
  in the same steps. Where the datasets are not known it is the level of the step.
- Of the step's excess, the sum over its tokens of loss - level, a sample has the share
  tokens x (its loss - its expected loss) / excess. The shares of the samples of a step sum to 1 but
  for the mixture of datasets: a step with more samples of a hard dataset has a higher loss.

A replayed step has no steps around it: the level of a dataset is the median of the losses of its
own samples, and the level of the step the mean of their expected losses.

Shapes: T steps, W steps around a step, Q samples, D datasets.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there, sealed, write_json
from megatron_tokscale.core.records import JSON, to_json
from megatron_tokscale.core.schemas import SPIKES_SCHEMA
from megatron_tokscale.data.record import record_path
from megatron_tokscale.store import RunPaths
from megatron_tokscale.store.sample_losses import (
    Records,
    SampleLosses,
    StepSums,
    training_files,
)
from megatron_tokscale.trace.named import SPIKES_KIND
from megatron_tokscale.trace.trace import Trace

WINDOW: Final = 64
"""Steps around a step. Our choice: enough for a median and MAD within 20%, and short beside the
time in which a loss curve bends."""

_LEAST_AROUND: Final = 8  # steps around a step without which it has no level
_ROWS_AT_ONCE: Final = 2**14  # steps whose windows are sorted at a time: 8 MB
_LEAST_DEVIATION: Final = 1e-6  # nats: equal losses differ by float32 rounding
_OF_NORMAL: Final = 1.4826  # standard deviation of a normal distribution over its MAD
_EXPLAINED: Final = 0.8  # of the excess: more samples are not listed
_MOST_SAMPLES: Final = 8  # of a step that are listed
LEAST_DEVIATIONS: Final = 5.0
"""Robust standard deviations below which a step does not stand out (our choice): of a million
steps of normal noise few are further out."""
_LEAST_SHARE: Final = 0.05
"""Of the excess: a sample with less is not named to be left out. Our choice: a spike of which
no sample has a twentieth comes from the model, not from its data."""


@dataclass(frozen=True)
class PieceOf:
    """Tokens `start` to `stop` (exclusive) of a document that a sample reads."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class SpikeSample:
    """A sample of a step that stands out.

    Attributes:
        sample: its number k in the job.
        loss: its mean loss in nats.
        expected: its expected loss in nats.
        share: its share of the step's excess.
        largest: its largest token loss in nats.
        position: token POSITION of the sample predicts the token of that loss.
        n_tokens: tokens in its loss.
        dataset: name of its dataset; None, as the next four, where the run's data are not known.
        number: its number in the dataset.
        stratum: its stratum; None without a plan.
        epoch: epochs of the stratum before; None without a plan.
        pieces: the documents that it reads.
    """

    sample: int
    loss: float
    expected: float
    share: float
    largest: float
    position: int
    n_tokens: int
    dataset: str | None = None
    number: int | None = None
    stratum: str | None = None
    epoch: int | None = None
    pieces: tuple[PieceOf, ...] = ()


@dataclass(frozen=True)
class SpikeDataset:
    """A dataset in a step that stands out.

    Attributes:
        name: its name.
        n_samples: its samples in the step.
        loss: their mean loss per token in nats.
        level: level of the dataset in nats.
        share: its share of the step's excess.
    """

    name: str
    n_samples: int
    loss: float
    level: float
    share: float


@dataclass(frozen=True)
class Spike:
    """A step whose loss stands out.

    Attributes:
        step: number of the optimizer step.
        loss: its mean loss per token in nats.
        level: its level in nats.
        deviations: robust standard deviations by which it stands out; NaN for a replayed step.
        n_samples: samples of the step.
        datasets: the datasets, by descending share.
        samples: the samples with the largest shares, until they have 80% of the excess; 8 at most.
        checkpoint: step of the saved checkpoint whose weights gave the losses, for a replayed step;
            None for the losses of the training itself.
    """

    step: int
    loss: float
    level: float
    deviations: float
    n_samples: int
    datasets: tuple[SpikeDataset, ...]
    samples: tuple[SpikeSample, ...]
    checkpoint: int | None = None

    @property
    def named(self) -> list[int]:
        """Samples with at least a twentieth of the excess."""
        return [each.sample for each in self.samples if each.share >= _LEAST_SHARE]


@dataclass(frozen=True)
class Spikes:
    """The steps of a run that stand out most.

    Attributes:
        run_id: id of the run.
        n_steps: steps with recorded losses.
        window: steps around a step.
        spikes: by descending deviations; replayed steps last.
        notes: sentences on samples and steps without records.
    """

    run_id: str
    n_steps: int
    window: int
    spikes: tuple[Spike, ...]
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write the spikes as JSON, whole or not at all, with the samples that they name.

        Raises:
            OSError: the file cannot be written.
        """
        named = sorted({k for spike in self.spikes for k in spike.named})
        content = cast("dict[str, JSON]", to_json(self))
        about: dict[str, JSON] = {"kind": SPIKES_KIND, "schema_version": SPIKES_SCHEMA}
        write_json(path, sealed({**about, **content, "samples": named}))


def find_spikes(run: Path, n_spikes: int) -> Spikes:
    """Return the steps of a run that stand out most, from the recorded losses of its samples.

    It reads the losses of all samples once, in blocks, and those around each spike again.

    Args:
        run: the run directory.
        n_spikes: number of steps.

    Raises:
        TokscaleError: there is no run, it has no losses of samples, or a file is damaged.
    """
    paths = RunPaths(run)
    if not paths.folder.is_dir():
        raise TokscaleError(
            f"no run in {run}: {paths.folder} is not there; name the directory of a run"
        )
    folder = paths.samples
    trace = Trace.open(run) if is_there(record_path(run)) else None
    replayed = SampleLosses.replayed(folder)
    if replayed and not training_files(folder):
        header = next(iter(replayed.values())).headers[0]
        return Spikes(header.run_id, 0, WINDOW, _replayed(trace, replayed, n_spikes))
    losses = SampleLosses.of_training(folder)
    sums = losses.step_sums()
    level_T, deviations_T = stand_out(sums.mean_T)
    order = np.argsort(-deviations_T, kind="stable")  # NaN last
    chosen = [t for t in order[:n_spikes].tolist() if deviations_T[t] > 0]
    spikes = [_spike(trace, losses, sums, t, level_T[t], deviations_T[t]) for t in chosen]
    known = {*sums.step_T.tolist()}
    others = {step: each for step, each in replayed.items() if step not in known}
    run_id = losses.headers[0].run_id
    shown = (*spikes, *_replayed(trace, others, n_spikes - len(spikes)))
    return Spikes(run_id, len(known), WINDOW, shown, tuple(_notes(losses, sums.step_T)))


def _notes(losses: SampleLosses, step_T: Integers) -> list[str]:
    """Return sentences on files and steps that are missing among the recorded ones."""
    ranks_of = {header.first_step: header.ranks for header in losses.headers}
    missing = Counter(first_step for first_step, _ in losses.missing_ranks)
    notes = [
        f"{count} of {ranks_of[first_step]} data-parallel ranks of the launch at step {first_step} "
        "have no file: the losses of its steps are those of the other ranks' samples"
        for first_step, count in missing.items()
    ]
    absent = int(step_T[-1] - step_T[0]) + 1 - len(step_T) if len(step_T) else 0
    if absent:
        notes.append(
            f"{absent:,} of the steps from {step_T[0]:,} to {step_T[-1]:,} have no records"
        )
    return notes


def around(n_steps: int, t: int) -> tuple[int, int]:
    """Return the first of the steps around step number `t` of `n_steps`, and the one behind them.

    At the start there are no more steps behind `t` than before it: a loss that falls fast would lie
    above the median of later steps alone.
    """
    before = min(WINDOW // 2, t)
    return t - before, min(t + before, n_steps - 1) + 1


def stand_out(loss_T: Floats) -> tuple[Floats, Floats]:
    """Return the level of each step, and the robust deviations by which its loss stands out.

    A step without enough finite losses around it has NaN, and a loss that is not finite stands out
    infinitely.

    Args:
        loss_T: mean losses of steps in nats.
    """
    n_steps, half = len(loss_T), WINDOW // 2
    level_T, deviations_T = np.full(n_steps, np.nan), np.full(n_steps, np.nan)
    finite_T = np.where(np.isfinite(loss_T), loss_T, np.nan)
    padded = np.concatenate([np.full(half, np.nan), finite_T, np.full(half, np.nan)])
    offset_W = np.arange(-half, half + 1)
    for start in range(0, n_steps, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, n_steps))
        window_TW = padded[rows[:, None] + half + offset_W]
        window_TW[:, half] = np.nan
        window_TW[offset_W[None, :] > rows[:, None]] = np.nan  # as `around` has it
        level = _median(window_TW)
        mad = _median(np.abs(window_TW - level[:, None]))
        deviation = np.maximum(_OF_NORMAL * mad, _LEAST_DEVIATION)
        with np.errstate(invalid="ignore"):
            found = (loss_T[rows] - level) / deviation
        found[~np.isfinite(loss_T[rows])] = np.inf
        found[np.isfinite(window_TW).sum(axis=1) < _LEAST_AROUND] = np.nan
        level_T[rows], deviations_T[rows] = level, found
    return level_T, deviations_T


def _median(value_TW: Floats) -> Floats:
    """Return the median of the finite values of each row; NaN without any."""
    sorted_TW = np.sort(value_TW, axis=1)  # NaN last
    count_T = np.isfinite(value_TW).sum(axis=1)
    rows = np.arange(len(value_TW))
    low_T, high_T = (
        sorted_TW[rows, np.maximum(place, 0)] for place in ((count_T - 1) // 2, count_T // 2)
    )
    return np.where(count_T > 0, (low_T + high_T) / 2, np.nan)


def _spike(
    trace: Trace | None,
    losses: SampleLosses,
    sums: StepSums,
    t: int,
    level: float,
    deviations: float,
) -> Spike:
    """Return the spike of step number t of the recorded ones."""
    first, stop = around(len(sums.step_T), t)
    step = int(sums.step_T[t])
    records_Q = losses.read(int(sums.step_T[first]), int(sums.step_T[stop - 1]))
    is_own_Q = records_Q["step"] == step
    trace, names, dataset_Q = _datasets(trace, records_Q)
    others_Q = ~is_own_Q
    level_D = _dataset_levels(records_Q[others_Q], dataset_Q[others_Q], len(names))
    level_D = np.where(np.isnan(level_D), level, level_D)
    return _explained(
        trace, records_Q[is_own_Q], names, dataset_Q[is_own_Q], level, level_D, deviations
    )


def _replayed(
    trace: Trace | None, replayed: dict[int, SampleLosses], n_spikes: int
) -> tuple[Spike, ...]:
    """Return the first replayed steps, each beside the medians of its own samples."""
    spikes = []
    for step in sorted(replayed)[: max(n_spikes, 0)]:
        records_Q = replayed[step].read(step, step)
        known, names, dataset_Q = _datasets(trace, records_Q)
        mean_Q = np.where(np.isfinite(records_Q["mean"]), records_Q["mean"], np.nan).astype(float)
        level_D = [_median(mean_Q[None, dataset_Q == d])[0] for d in range(len(names))]
        spikes.append(
            _explained(
                known,
                records_Q,
                names,
                dataset_Q,
                None,
                np.array(level_D),
                math.nan,
                replayed[step].headers[0].checkpoint,
            )
        )
    return tuple(spikes)


def _datasets(trace: Trace | None, records_Q: Records) -> tuple[Trace | None, list[str], Integers]:
    """Return the trace, the names of the datasets of some samples, and the dataset of each.

    The trace is None, and all samples are of one dataset, where the origin of one is not known, as
    of samples that are not of Megatron's GPT datasets.
    """
    if trace is not None:
        with suppress(TokscaleError):
            names, dataset_Q = np.unique(trace.names_of(records_Q["sample"]), return_inverse=True)
            return trace, [str(name) for name in names], dataset_Q
    return None, [""], np.zeros(len(records_Q), np.int64)


def _dataset_levels(records_Q: Records, dataset_Q: Integers, n_datasets: int) -> Floats:
    """Return the median over steps of each dataset's mean loss; NaN for one without samples."""
    steps, step_Q = np.unique(records_Q["step"], return_inverse=True)
    cell_Q = step_Q * n_datasets + dataset_Q
    n_tokens_Q, nats_Q = _nats(records_Q)
    nats, n_tokens = (
        np.bincount(cell_Q, value_Q, len(steps) * n_datasets).reshape(-1, n_datasets)
        for value_Q in (nats_Q, n_tokens_Q)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_TD = nats / n_tokens
    mean_TD[~np.isfinite(mean_TD)] = np.nan
    return _median(mean_TD.T) if len(steps) else np.full(n_datasets, np.nan)


def _nats(records_Q: Records) -> tuple[Floats, Floats]:
    """Return the tokens of each sample, and the sum of their losses in nats."""
    n_tokens_Q = records_Q["n_tokens"].astype(float)
    return n_tokens_Q, np.where(n_tokens_Q > 0, records_Q["mean"].astype(float) * n_tokens_Q, 0.0)


def _explained(
    trace: Trace | None,
    records_Q: Records,
    names: Sequence[str],
    dataset_Q: Integers,
    level: float | None,
    level_D: Floats,
    deviations: float,
    checkpoint: int | None = None,
) -> Spike:
    """Return a spike with the shares of its samples and datasets in its excess.

    A level of None is the mean of the expected losses of its samples.
    """
    n_tokens_Q, nats_Q = _nats(records_Q)
    n_tokens = n_tokens_Q.sum()
    loss = float(nats_Q.sum() / n_tokens) if n_tokens else math.nan
    expected_Q = n_tokens_Q * level_D[dataset_Q]
    if level is None:
        level = float(expected_Q.sum() / max(n_tokens, 1.0))
    above_Q, excess = nats_Q - expected_Q, (loss - level) * n_tokens
    if not np.isfinite(nats_Q).all():
        # Losses that are not finite are the whole excess, in equal shares.
        above_Q = (~np.isfinite(nats_Q)).astype(float)
        excess = above_Q.sum()
    share_Q = above_Q / excess if excess > 0 else np.zeros(len(above_Q))
    order = np.argsort(-above_Q, kind="stable")
    # Samples below their levels have negative shares, which lower the sum again.
    explained_Q = np.maximum.accumulate(np.cumsum(share_Q[order]))
    n_listed = int(np.searchsorted(explained_Q, _EXPLAINED)) + 1
    samples = tuple(
        _sample(trace, records_Q[q], float(level_D[dataset_Q[q]]), float(share_Q[q]))
        for q in order[: min(n_listed, _MOST_SAMPLES)].tolist()
    )
    datasets = [
        _dataset(name, d, dataset_Q, n_tokens_Q, nats_Q, share_Q, float(level_D[d]))
        for d, name in enumerate(names)
        if trace is not None and (dataset_Q == d).any()
    ]
    datasets.sort(key=lambda dataset: -dataset.share)
    step = int(records_Q["step"][0])
    return Spike(
        step, loss, level, deviations, len(records_Q), tuple(datasets), samples, checkpoint
    )


def _dataset(
    name: str,
    d: int,
    dataset_Q: Integers,
    n_tokens_Q: Floats,
    nats_Q: Floats,
    share_Q: Floats,
    level: float,
) -> SpikeDataset:
    own = dataset_Q == d
    loss = float(nats_Q[own].sum() / max(n_tokens_Q[own].sum(), 1.0))
    return SpikeDataset(name, int(own.sum()), loss, level, float(share_Q[own].sum()))


def _sample(trace: Trace | None, record: np.void, expected: float, share: float) -> SpikeSample:
    found = SpikeSample(
        sample=int(record["sample"]),
        loss=float(record["mean"]),
        expected=expected,
        share=share,
        largest=float(record["largest"]),
        position=int(record["position"]),
        n_tokens=int(record["n_tokens"]),
    )
    if trace is None:
        return found
    traced = trace.sample(found.sample)
    return replace(
        found,
        dataset=traced.name or traced.dataset.name,
        number=traced.number,
        stratum=traced.stratum,
        epoch=traced.epoch,
        pieces=tuple(PieceOf(*piece) for piece in traced.pieces),
    )

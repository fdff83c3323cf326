"""Item losses of 22 Gemstone models at 35 checkpoints: the axis M, and the learning order.

`gemstone_items.npz`: losses of 14,319 items of four tasks, loss_NMK, in nats of the right answer.

Shapes: N items, M models, K checkpoints, P probes of all models, R resamples of the items.
"""

import numpy as np

from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.axis import Top
from megatron_tokscale.results.estimate import UndefinedError, format_estimate
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.groups import GroupCurves, corrected, predict_groups
from megatron_tokscale.spectrum.axes.measured import Curves, Fitted, measure_shift
from megatron_tokscale.spectrum.axes.tops import choose_top, highest_first
from megatron_tokscale.spectrum.evidence.order import OTHER_RUN, learning_order
from megatron_tokscale.spectrum.groups import deciles
from megatron_tokscale.spectrum.isotonic import isotonic

RESAMPLES = 200
LEAST_FALL = 0.5  # nats that an item falls by, to have a learning time
REFERENCE = "2048x27"  # the largest but for two models of other shapes: its times form deciles
PAIRS = (
    ("2048x27", "2048x27"),
    ("2048x27", "1536x50"),
    ("2048x27", "3072x12"),
    ("2048x27", "1280x36"),
    ("2048x27", "1024x28"),
    ("2048x27", "512x16"),
    ("2048x27", "256x23"),
    ("512x16", "512x14"),
)
M_AXIS = """Losses of the right answer of each item (`gemstone_items.npz`, from
mcleish7/gemstone-scaling-laws at 5f42047). Size: non-embedding parameters 12 width² depth, 18M to
1.4B; clock: tokens, 10 to 350 billion. No checkpoint is before 10 billion tokens, so no checkpoint
shows the top of the model, and kappa depends on it: both choices are in the table, first the one
with the smaller squares, which `spectrum` takes. The floor is a share of the fall from the top; in
nats if the top is not known. Intervals: over items and models; in the round brackets over items,
then over models. Errors: mean absolute error of a left-out model's curve over its 35 checkpoints,
in nats. Groups: items by decile of their learning time in 2048x27; without a top the floor is the
same for all groups, so that nothing but kappa tells them apart. A gain whose interval holds 0 has
no share.

"""
M_COLUMNS = [
    *("task", "top", "kappa", "floor", "gain", "share of the same earlier", "earlier"),
    "errors: shift and floor / plain shift / E + A N^-a + B t^-b",
    *("worst model", "R² of last losses", "groups"),
]
ORDER = """An item's learning time in a model: where its loss, made to descend (isotonic
regression), has done half of its fall, if it falls by half a nat or more; the shift of a checkpoint
that all items of the task share is taken out first. "partial": beyond cubics in the ranks of the
item's mean loss in the first model; the verdict is on "at least 0.1". The first row of a task is
one model's even checkpoints against its odd ones: what the noise of the checkpoints leaves of an
order that is the same. All losses are of one training each, and items that share a
checkpoint's noise count as independent.

"""
ORDER_COLUMNS = ["task", "models", "items", "Spearman", "partial beyond the mean loss"]


def sections(folder, lines):
    """Return the sections of the report: title, text, columns, rows."""
    data = Items(folder / "gemstone_items.npz")
    return [
        ("Gemstone, axis M: 22 models", M_AXIS, M_COLUMNS, m_rows(data, lines)),
        ("Gemstone, learning order between models", ORDER, ORDER_COLUMNS, order_rows(data, lines)),
    ]


class Items:
    """The item losses, models by ascending size."""

    def __init__(self, path):
        with np.load(path) as file:
            size_M = 12.0 * file["width_M"].astype(float) ** 2 * file["depth_M"]
            order_M = np.argsort(size_M, kind="stable")
            self.loss_NMK = file["loss_NMK"][:, order_M]
            self.log_size_M = np.log(size_M[order_M])
            self.models = [str(file["models"][m]) for m in order_M]
            self.task_N, self.tasks = file["task_N"], [str(each) for each in file["tasks"]]
            self.x_K = np.log(file["tokens_K"].astype(float))

    def of(self, task):
        """Return loss_NMK of a task's items in double precision."""
        return self.loss_NMK[self.task_N == self.tasks.index(task)].astype(float)


def m_rows(data, lines):
    for task in data.tasks:
        for rank in (0, 1):
            key = (f"axis M, {task}, top {rank}",)
            yield lines.once(key, lambda task=task, rank=rank: m_row(data, task, rank))


def m_row(data, task, rank):
    """Return the row of one task on the axis M, with the better top (rank 0) or the other (1)."""
    loss_NMK = data.of(task)
    points = Points.of_runs([data.x_K] * len(data.models), data.log_size_M)
    loss_NP = loss_NMK.reshape(len(loss_NMK), -1)
    units = Units.from_documents(np.zeros(len(loss_NP)), np.arange(len(loss_NP)), 0, 256)
    weight_RU = units.weights(RESAMPLES, 0)

    def means(group_N, groups):
        cell_N = units.unit_N * groups + group_N
        count = np.bincount(cell_N, minlength=len(units) * groups).reshape(len(units), groups)
        total = np.zeros((len(units) * groups, loss_NP.shape[1]))
        np.add.at(total, cell_N, loss_NP)
        count_RC = weight_RU @ count
        loss = np.tensordot(weight_RU, total.reshape(len(units), groups, -1), 1)
        return count_RC / count_RC.sum(axis=1, keepdims=True), loss / count_RC[:, :, None]

    mean_RP = means(np.zeros(len(loss_NP), int), 1)[1][:, 0]
    top = choose_top(points, mean_RP[0])
    if rank:
        top = Top.UNKNOWN if top is Top.FIRST else Top.FIRST

    def tops(loss_RCP):
        if top is Top.FIRST:
            return highest_first(points, loss_RCP)
        return np.full(loss_RCP.shape[:-1], np.nan)

    fitted = Fitted.of(Curves(points, mean_RP, tops(mean_RP[:, None])[:, 0], top))
    groups = deciles(half_times(loss_NMK[:, data.models.index(REFERENCE)], data.x_K))
    share, loss = means(groups.group_N, len(groups.names))
    curves = GroupCurves(groups.names, share, loss, tops(loss))
    prediction = corrected({"time": predict_groups(fitted, curves)})
    shift = measure_shift(fitted, data.models, prediction)
    errors = shift.errors
    worst = max(shift.runs, key=lambda run: run.left_out_error)
    return [
        task,
        str(shift.top),
        spread(shift.kappa),
        spread(shift.floor),
        format_estimate(shift.gain.both),
        spread(shift.share),
        str(shift.earlier_test.verdict),
        f"{errors.shift_and_floor:.4f} / {errors.plain_shift:.4f} / {errors.additive:.4f}",
        f"{worst.name} {worst.left_out_error:.3f}",
        format_estimate(errors.last_r2),
        f"{format_estimate(shift.groups['time'].skill.both)}: {shift.groups['time'].test.verdict}",
    ]


def spread(found):
    """Return a number with its intervals over both, over items, and over models."""
    if not found.both.has_interval:
        return format_estimate(found.both, ".2f")
    parts = (f"[{each.low:.2f}, {each.high:.2f}]" for each in (found.documents, found.runs))
    return f"{format_estimate(found.both, '.2f')} ({'; '.join(parts)})"


def half_times(loss_NK, x_K):
    """Return the clock at half of each item's isotonic fall; NaN below the least fall."""
    mean_1K = loss_NK.mean(axis=0, keepdims=True)
    ones_K = np.ones(len(x_K))
    own_NK = loss_NK - (mean_1K - isotonic(mean_1K, ones_K))
    down_NK = isotonic(own_NK, ones_K)
    half_N1 = (down_NK[:, :1] + down_NK[:, -1:]) / 2
    at_N = np.maximum((down_NK <= half_N1).argmax(axis=1), 1)
    row_N = np.arange(len(down_NK))
    above_N, below_N = down_NK[row_N, at_N - 1], down_NK[row_N, at_N]
    fall_N = np.maximum(above_N - below_N, 1e-9)
    time_N = x_K[at_N - 1] + (above_N - half_N1[:, 0]) / fall_N * (x_K[at_N] - x_K[at_N - 1])
    return np.where(down_NK[:, 0] - down_NK[:, -1] >= LEAST_FALL, time_N, np.nan)


def order_rows(data, lines):
    for task in data.tasks:
        for pair in PAIRS:
            key = (f"order, {task}", *pair)
            yield lines.once(key, lambda task=task, pair=pair: order_row(data, task, pair))


def order_row(data, task, pair):
    """Return the row of two models: does the first one's order predict the second one's?

    One model twice: its even checkpoints against its odd ones.
    """
    loss_NMK = data.of(task)
    first_NK, second_NK = (loss_NMK[:, data.models.index(model)] for model in pair)
    halves = [slice(0, None, 2), slice(1, None, 2)] if pair[0] == pair[1] else [slice(None)] * 2
    units = Units.from_documents(np.zeros(len(loss_NMK)), np.arange(len(loss_NMK)), 0, 256)
    name = f"{pair[0]} -> {pair[1]}"
    try:
        order = learning_order(
            half_times(first_NK[:, halves[0]], data.x_K[halves[0]]),
            half_times(second_NK[:, halves[1]], data.x_K[halves[1]]),
            {"mean loss in the other run": first_NK.mean(axis=1)},
            units.unit_N,
            units.weights(RESAMPLES, 0),
        )
    except UndefinedError as error:
        return [task, name, "", str(error), ""]
    return [
        *(task, name, str(order.tokens)),
        format_estimate(order.spearman[OTHER_RUN]),
        format_estimate(order.test.estimate) + f": {order.test.verdict}",
    ]

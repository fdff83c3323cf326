"""The measured slope, its noise and the ceiling of its R^2, on planted worlds and on real losses.

Common shifts are studied too: the share of classes that they change, left in and taken out.

    PYTHONPATH=tests/support python benchmarks/slope_noise.py [--runs 20] [--data DIR] [--out FILE]

Every finished repetition is a line in FOLDER; an interrupted study resumes there. A repetition
takes a tenth of a second, one with fits takes ten seconds. DIR is a folder with gemstone_items.npz.
"""

import argparse
from pathlib import Path

import numpy as np
from correlated import correlated_noise
from planted_worlds import AUTOCORRELATION, DOCUMENT_TOKENS, WORLDS, axis, noise, text_of
from resumable import Lines, share
from table import heading, print_sections

from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import TokenClass, fit_sigmoids
from megatron_tokscale.fit.common_shifts import shift_table, shifts_of, without_shifts
from megatron_tokscale.spectrum import SlopeEstimator, compare, slope_noise
from megatron_tokscale.spectrum.evidence.reconstruction import LEAST_CEILING, why_not_measured

FROM_STEP = 40  # the unigram phase of the planted worlds is over
TOKENS, FIT_TOKENS = 12_000, 4_000
OWN_NOISE = 0.4 * np.exp(0.4**2)  # root mean square of a planted token's noise, in nats
COMMON = (0.0, 0.05, 0.2)
RESAMPLES = 100
STEP = 1e-4  # of x, for the slope of the planted mean by differences
AXES = {
    "8 per octave": axis(),
    "35 evenly spaced": np.concatenate([[-np.inf], np.log(np.linspace(18.3, 640, 35))]),
}
PLANTED_COLUMNS = [
    *("world", "probes", "common, nats", "found", "covered", "lag-one"),
    *("slope covered", "error", "measured", "ceiling", "R^2 of the perfect model"),
]
CLASS_COLUMNS = [
    *("world", "common, nats", "found", "share of departures", "variance that remains"),
    *("changed, left in", "changed, taken out"),
]
REAL_COLUMNS = [
    *("task", "axis", "shared noise, nats", "items' own", "share of departures", "lag-one"),
    *("freedom", "ceiling", "measured"),
]
REAL_CLASS_COLUMNS = [
    *("task", "flat, left in", "flat, taken out", "falling, left in", "falling, taken out"),
    "changed",
]
ABOUT = """# The noise of the measured slope

`PYTHONPATH=tests/support python benchmarks/slope_noise.py {command}`, seeds 0, 1, 2, ...

{about}

The planted worlds: `tests/support/planted_worlds.py`; {tokens:,} tokens, from step {from_step} on.
Noise: common to all tokens, as given, and the tokens' own {own:.2f} nats with an autocorrelation of
{phi}. Found and covered: the shared noise and its 95% interval. Slope covered: share of 256 points
at which the 95% interval of the slope holds the true one, over the measured runs. Error: root mean
square error of the slope over the standard deviation of the true one. Measured: runs whose ceiling
is at least {least} and whose mean loss differs from a straight line at the 5% level; ceiling and
R^2 of the perfect model, the planted mean loss, are those of these runs.

Common shifts: the estimated noise, the share of the losses' departures from the line between their
neighbours that the shifts carried, and the variance of the common noise that is left after them.

"""


def planted_mean(name, text, x, seed):
    """Return planted losses by document, their mean, and its slope -dL/dx, at finite x."""
    every = np.concatenate([x, x - STEP, x + STEP])
    loss_NK = WORLDS[name].draw(text, every, np.random.default_rng([seed, 1]))
    by_document_UK = loss_NK.reshape(-1, DOCUMENT_TOKENS, len(every)).mean(axis=1)
    mean, below, above = by_document_UK.mean(axis=0).reshape(3, -1)
    return by_document_UK[:, : len(x)], mean, (below - above) / (2 * STEP)


def repetition(name, axis_name, common, seed):
    """Return what the estimator finds on one planted mean loss curve, and the truth."""
    rng = np.random.default_rng([seed, 0])
    x_K = AXES[axis_name]
    x_K = x_K[x_K >= np.log(FROM_STEP)]
    x_G = np.linspace(x_K[0], x_K[-1], 256)
    text = text_of(TOKENS, rng)
    by_document_UK, mean_K, _ = planted_mean(name, text, x_K, seed)
    slope_G = planted_mean(name, text, x_G, seed)[2]
    shape = by_document_UK.shape
    own_UK = correlated_noise(rng, shape, AUTOCORRELATION) * OWN_NOISE / DOCUMENT_TOKENS**0.5
    shared_K = common * rng.standard_normal(len(x_K))
    documents = np.arange(shape[0])
    units = Units.from_documents(np.zeros_like(documents), documents, seed)
    weight_RU = units.weights(RESAMPLES, seed)
    weight_RU /= weight_RU.sum(axis=1, keepdims=True)
    loss_RK = weight_RU @ (by_document_UK + own_UK) + shared_K
    found = compare(x_K, {"full": np.broadcast_to(mean_K, loss_RK.shape)}, loss_RK, x_G)
    miss_G = found.measured_G - slope_G
    return {
        "shared": [found.noise.shared.value, found.noise.shared.low, found.noise.shared.high],
        "covered": float(np.mean(np.abs(miss_G) < 1.96 * found.estimator.error(x_G))),
        "error": float(np.sqrt(np.mean(miss_G**2)) / slope_G.std()),
        "ceiling": found.noise.ceiling.value,
        "r2": found.by_name["full"].r2,
        "correlation": found.noise.lag_one_correlation,
        "measured": why_not_measured(found.noise) is None,
    }


def planted_rows(runs, lines):
    for name in WORLDS:
        for axis_name in AXES:
            for common in COMMON:
                found = [
                    lines.once(
                        ("slope", name, axis_name, common, seed),
                        repetition,
                        name,
                        axis_name,
                        common,
                        seed,
                    )
                    for seed in range(runs)
                ]
                yield [name, axis_name, f"{common}", *planted_row(found, common)]


def planted_row(found, common):
    """Return the cells of one row from the repetitions."""
    value, low, high = np.array([each["shared"] for each in found]).T
    measured = [each for each in found if each["measured"]]
    reached, ceiling = ([each[key] for each in measured] for key in ("r2", "ceiling"))
    error = np.std(reached) / len(reached) ** 0.5 if measured else 0
    return [
        f"{value.mean():.4f}",
        share(((low <= common) & (common <= high)).sum(), len(found)),
        f"{np.mean([each['correlation'] for each in found]):+.2f}",
        f"{100 * np.mean([each['covered'] for each in measured]):.1f}%" if measured else "-",
        f"{np.mean([each['error'] for each in found]):.3f}",
        f"{len(measured)} of {len(found)}",
        f"{np.mean(ceiling):.3f}" if measured else "-",
        f"{np.mean(reached):.3f} ± {error:.3f}" if measured else "-",
    ]


def class_changes(name, common, seed):
    """Return shares of classes that the common noise changes, left in and taken out."""
    rng = np.random.default_rng(seed)
    text, x_K = text_of(FIT_TOKENS, rng), axis()
    clean_NK = WORLDS[name].draw(text, x_K, rng)
    own_NK, both_NK = (
        (clean_NK + noise(text, len(x_K), np.random.default_rng([seed, 2]), each)).astype(
            np.float32
        )
        for each in (0.0, common)
    )
    shifts = shifts_of(x_K, [(both_NK, text.dataset_N)], ("one", "two"))
    out_NK = without_shifts(both_NK, shift_table(shifts), text.dataset_N)
    own, left, out = (fit_sigmoids(x_K, loss_NK) for loss_NK in (own_NK, both_NK, out_NK))
    truth_NK, after = both_NK - own_NK, x_K >= np.log(FROM_STEP)
    left_NK = (out_NK - own_NK)[:, after]
    return {
        "left in": float(np.mean(left.class_N != own.class_N)),
        "taken out": float(np.mean(out.class_N != own.class_N)),
        "shared": float(np.mean([each.shared for each in shifts])),
        "share": float(np.mean([each.share for each in shifts])),
        "remains": float((left_NK**2).mean() / max((truth_NK[:, after] ** 2).mean(), 1e-12)),
    }


def class_rows(runs, lines):
    for name in ("A1", "B1", "B2", "B3", "C"):
        for common in COMMON:
            found = [
                lines.once(
                    ("class", name, common, seed),
                    class_changes,
                    name,
                    common,
                    seed,
                )
                for seed in range(runs)
            ]
            mean = {key: np.mean([each[key] for each in found]) for key in found[0]}
            yield [
                name,
                f"{common}",
                f"{mean['shared']:.3f}",
                f"{100 * mean['share']:.1f}%",
                f"{100 * mean['remains']:.0f}%" if common else "-",
                f"{100 * mean['left in']:.1f}%",
                f"{100 * mean['taken out']:.1f}%",
            ]


def real_noise(loss_NK, x_K):
    """Return the noise of a task's mean loss over an axis, by resampling its items."""
    items = np.arange(len(loss_NK))
    units = Units.from_documents(np.zeros(len(items), np.int16), items, seed=0)
    weight_RU = units.weights(RESAMPLES, 0)
    sum_UK = np.stack([np.bincount(units.unit_N, column) for column in loss_NK.T], axis=1)
    loss_RK = weight_RU @ sum_UK / (weight_RU @ np.bincount(units.unit_N))[:, None]
    estimator = SlopeEstimator.from_curve(x_K, loss_RK[0])
    found = slope_noise(estimator, loss_RK, np.linspace(x_K.min(), x_K.max(), 256))
    share_of_shifts = None
    if (np.diff(x_K) > 0).all():
        blocks = [(loss_NK.astype(np.float32), np.zeros(len(items), np.int16))]
        share_of_shifts = shifts_of(x_K, blocks, ("items",))[0].share
    return {
        "share": share_of_shifts,
        "shared": [found.shared.value, found.shared.low, found.shared.high],
        "own": found.own,
        "correlation": found.lag_one_correlation,
        "freedom": found.freedom,
        "ceiling": found.ceiling.value,
        "measured": why_not_measured(found) is None,
    }


def real_rows(data, lines):
    items = np.load(data / "gemstone_items.npz")
    models, step_K = [str(name) for name in items["models"]], items["step_K"]
    width_M, depth_M = (items[key].astype(float) for key in ("width_M", "depth_M"))
    size_M = np.log(12 * width_M**2 * depth_M)
    for task, name in enumerate(str(each) for each in items["tasks"]):
        loss_NMK = items["loss_NMK"][items["task_N"] == task].astype(np.float64)
        along_t = [
            lines.once(
                ("along T", name, model), real_noise, loss_NMK[:, m], np.log(step_K.astype(float))
            )
            for m, model in enumerate(models)
        ]
        along_m = [
            lines.once(("along M", name, int(step)), real_noise, loss_NMK[:, :, k], size_M)
            for k, step in enumerate(step_K)
        ]
        at = models.index("2048x27")
        yield real_row(name, "T, 2048x27", along_t[at : at + 1])
        yield real_row(name, f"T, {len(models)} models", along_t)
        yield real_row(name, "M, last checkpoint", along_m[-1:])
        yield real_row(name, f"M, {len(step_K)} checkpoints", along_m)


def known(found, key):
    """Return the values of a key that are not None."""
    return [each[key] for each in found if each[key] is not None]


def real_row(task, curves, found):
    """Return a row: the median over the curves."""
    shared = np.median([each["shared"] for each in found], axis=0)
    measured = sum(each["measured"] for each in found)
    middle = {
        key: np.median([each[key] for each in found])
        for key in ("own", "correlation", "freedom", "ceiling")
    }
    return [
        task,
        curves,
        f"{shared[0]:.3f} [{shared[1]:.3f}, {shared[2]:.3f}]",
        f"{middle['own']:.4f}",
        f"{100 * np.median(shares):.1f}%" if (shares := known(found, "share")) else "-",
        f"{middle['correlation']:+.2f}",
        f"{middle['freedom']:.1f}",
        f"{middle['ceiling']:.2f}" if middle["ceiling"] > 0 else "below 0",
        f"{measured} of {len(found)}",
    ]


def real_classes(loss_NK, x_K):
    """Return shares of the items' classes with the common shifts left in and taken out."""
    loss_NK, dataset_N = loss_NK.astype(np.float32), np.zeros(len(loss_NK), np.int16)
    shifts = shifts_of(x_K, [(loss_NK, dataset_N)], ("items",))
    out_NK = without_shifts(loss_NK, shift_table(shifts), dataset_N)
    left, out = (fit_sigmoids(x_K, each) for each in (loss_NK, out_NK))
    flat, falling = (TokenClass.FLAT_UNLEARNED, TokenClass.FLAT_KNOWN), (TokenClass.FALLING,)
    return {
        "flat": [float(np.isin(each.class_N, flat).mean()) for each in (left, out)],
        "falling": [float(np.isin(each.class_N, falling).mean()) for each in (left, out)],
        "changed": float((left.class_N != out.class_N).mean()),
    }


def real_class_rows(data, lines, model="2048x27"):
    items = np.load(data / "gemstone_items.npz")
    m = [str(name) for name in items["models"]].index(model)
    x_K = np.log(items["step_K"].astype(float))
    for task, name in enumerate(str(each) for each in items["tasks"]):
        loss_NK = items["loss_NMK"][items["task_N"] == task, m]
        found = lines.once(("classes", name, model), real_classes, loss_NK, x_K)
        shares = (f"{100 * each:.1f}%" for key in ("flat", "falling") for each in found[key])
        yield [name, *shares, f"{100 * found['changed']:.1f}%"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--fits", type=int, default=1, help="repetitions with fits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("slope-noise-run"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = Lines(arguments.folder / "lines.jsonl")
    sections = [
        (
            f"Planted worlds, {arguments.runs} runs each",
            PLANTED_COLUMNS,
            planted_rows(arguments.runs, lines),
        ),
        (
            "Common shifts before the fit: classes that differ from those without common noise",
            CLASS_COLUMNS,
            class_rows(arguments.fits, lines),
        ),
    ]
    if arguments.data:
        title = "Losses of items of real models, medians over the curves"
        sections.append((title, REAL_COLUMNS, real_rows(arguments.data, lines)))
        title = "Classes of the items of the model 2048x27, common shifts left in and taken out"
        sections.append((title, REAL_CLASS_COLUMNS, real_class_rows(arguments.data, lines)))
    text = print_sections(sections)
    if arguments.out:
        import scipy

        about = ABOUT.format(
            command=f"--runs {arguments.runs} --fits {arguments.fits} --data DIR",
            about=heading(scipy=scipy.__version__, numpy=np.__version__),
            tokens=TOKENS,
            from_step=FROM_STEP,
            own=OWN_NOISE,
            phi=AUTOCORRELATION,
            least=LEAST_CEILING,
        )
        arguments.out.write_text(about + text)


if __name__ == "__main__":
    main()

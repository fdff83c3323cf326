"""Sum up the results of `real_runs` in markdown tables.

Shapes: K checkpoints.
"""

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.files import write_text
from megatron_tokscale.core.schemas import CURVE_LAWS_SCHEMA
from megatron_tokscale.laws import fit_deceleration
from megatron_tokscale.results import (
    SpectrumResult,
    Transfer,
    read_axis,
    read_fit,
    read_matrix,
    read_transfer,
)
from megatron_tokscale.results.estimate import Estimate, Undefined, format_estimate
from megatron_tokscale.results.evidence import SlopeNoise
from megatron_tokscale.results.laws.curves import CurveLawsResult
from megatron_tokscale.results.verdict import ClaimTest
from megatron_tokscale.spectrum import SlopeEstimator, slope_noise
from megatron_tokscale.spectrum.evidence.order import OTHER_RUN
from megatron_tokscale.spectrum.evidence.reconstruction import why_not_measured
from megatron_tokscale.store import Run

BREAKS = {
    **{"14M": 5877, "37M": 5907, "78M": 5929, "144M": 6074},
    **{"285M": 5264, "472M": 4644, "OLMo-1B": 3718, "OLMo-7B": 4628},
}
"""Steps of loss deceleration that Mircea et al. publish."""
GRID = 256  # points at which a slope is compared, as `spectrum` does

Rows = Iterator[list[str]]


def write_tables(data: Path, out: Path) -> str:
    """Write OUT/tables.txt from the results in OUT, and return its text."""
    about = f"megatron-tokscale {__version__}, Python {platform.python_version()}, "
    about += f"numpy {np.__version__}, {platform.machine()}"
    tasks = sorted(path for path in (out / "gemstone").glob("*") if path.is_dir())
    sizes = out / "gemstone-sizes"
    laws = [path for path in sorted((out / "laws").glob("*")) if path.is_dir()]
    breaks = data / "zsl" / "bnsl_fit.json"
    sections = [
        section("Noise of the mean loss along T", NOISE, noise_rows(tasks)),
        section("Spectra", SPECTRA, spectrum_rows(tasks)),
        section("Learning times of one model, tested on another", ORDER, order_rows(tasks)),
        section("The axis M", AXIS, axis_rows(tasks, out / "axis")),
        section(
            "Last losses along M, without a fit",
            MATRIX,
            matrix_rows(Run.open(sizes)) if sizes.is_dir() else (),
        ),
        section(
            "Chinchilla's law of the smaller models on the largest", CHINCHILLA, size_rows(laws)
        ),
        section("Multi-power law of shorter runs on the longest", SCHEDULES, schedule_rows(laws)),
        section("Loss deceleration", BREAK_COLUMNS, break_rows(breaks) if breaks.is_file() else ()),
    ]
    text = "\n\n".join([about, *filter(None, sections)]) + "\n"
    write_text(out / "tables.txt", text)
    return text


def section(title: str, columns: Sequence[str], rows: Iterator[list[str]] | tuple[()]) -> str:
    """Return a heading and a table; nothing without rows."""
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return f"## {title}\n\n" + "\n".join(f"| {line} |" for line in [*head, *lines])


def cell(number: Estimate | Undefined, test: ClaimTest | None = None, pattern: str = ".3f") -> str:
    """Return a number with its interval, and the verdict on it."""
    return format_estimate(number, pattern) + (f": {test.verdict}" if test else "")


def models_of(task: Path) -> list[Run]:
    """Return the whole runs of a task, by ascending size."""
    runs = [Run.open(path) for path in task.iterdir() if path.name.count("-") == 0]
    return sorted(runs, key=lambda run: run.info.size["non_embedding"])


NOISE = [
    *("task", "items", "models", "shared noise, nats: median (least to most)"),
    *("ceiling of R²: median", "slope measured in", "lag-one correlation: median"),
    "first factor of the items' departures: median share",
]


def noise_rows(tasks: Sequence[Path]) -> Rows:
    for task in tasks:
        runs = models_of(task)
        found = [noise_of(run) for run in runs]
        noise = [each.noise.value for each in found]
        ceiling = float(np.median([each.ceiling.value for each in found]))
        yield [
            *(task.name, f"{runs[0].n_tokens:,}", str(len(runs))),
            f"{np.median(noise):.3f} ({min(noise):.3f} to {max(noise):.3f})",
            f"{ceiling:.2f}" if ceiling > 0 else "below 0",
            f"{sum(why_not_measured(each) is None for each in found)} of {len(found)} models",
            f"{np.median([each.lag_one_correlation for each in found]):+.2f}",
            f"{np.median([factor_share(run) for run in runs]):.0%}",
        ]


def noise_of(run: Run) -> SlopeNoise:
    """Return the noise of a run's mean loss over all its checkpoints."""
    x_K, loss_K = run.x_K(), run.mean_losses()
    estimator = SlopeEstimator.from_curve(x_K, loss_K)
    return slope_noise(estimator, loss_K[None], np.linspace(x_K[0], x_K[-1], GRID))


def factor_share(run: Run) -> float:
    """Return the share of the items' departures, beyond their mean, that one factor explains.

    A departure is a loss minus the mean of the losses before and after it. If the items' noise were
    independent, the share would be 4 / (1.5 (K - 2)), the peak of the departures' spectrum over its
    mean: 8% of 35 checkpoints.
    """
    loss_NK = run.read_losses().astype(np.float64)
    departure_NJ = loss_NK[:, 1:-1] - (loss_NK[:, :-2] + loss_NK[:, 2:]) / 2
    departure_NJ -= departure_NJ.mean(axis=0)
    part_J = np.linalg.eigvalsh(departure_NJ.T @ departure_NJ)
    return float(part_J[-1] / part_J.sum())


SPECTRA = [
    *("task", "model", "learned", "censored", "gradual", "common shifts, share"),
    *("R² of -dL/dx: times only (ceiling)", "of its twins without and with steps"),
    "width over that of the group's curve",
]


def spectrum_rows(tasks: Sequence[Path]) -> Rows:
    for task in tasks:
        for run in models_of(task):
            if run.paths.reconstruction.is_file():
                yield [task.name, *spectrum_row(SpectrumResult.open(run))]


def spectrum_row(found: SpectrumResult) -> list[str]:
    evidence, counts, score = found.evidence, found.summary.overall, "spectrum"
    shifts, twins = found.fit.common_shifts, evidence.twins
    r2, noise = evidence.same_tokens[score].r2, evidence.slope_noise
    planted = "-" if isinstance(twins, Undefined) else f"{twins.without_steps[score].value:.2f}, "
    if not isinstance(twins, Undefined):
        planted += f"{twins.with_steps[score].value:.2f}"
    measured = f"({max(noise.ceiling.value, 0):.2f})"
    return [
        found.run.path.name,
        f"{counts.n_events / counts.n_tokens:.0%}",
        f"{counts.censored / counts.n_tokens:.0%}",
        f"{found.fit.classes['gradual'].share:.0%}",
        f"{shifts[0].share:.1%}" if shifts else "-",
        f"not measured {measured}" if isinstance(r2, Undefined) else f"{cell(r2)} {measured}",
        "-" if isinstance(r2, Undefined) else planted,
        cell(evidence.widths.test.estimate, evidence.widths.test),
    ]


ORDER = [
    *("task", "tested on", "learning times of", "items", "Spearman"),
    "beyond the mean loss (at least 0.1)",
    "covariance of falls far apart (at most 0)",
    "by distance in octaves",
]


def order_rows(tasks: Sequence[Path]) -> Rows:
    for task in tasks:
        for path in sorted(task.iterdir()):
            run = Run.open(path)
            if run.paths.transfer.is_file():
                for each in read_transfer(run, read_fit(run)):
                    yield [task.name, path.name, each.source, *order_row(each)]


def order_row(found: Transfer) -> list[str]:
    order, falls = found.order, found.falls
    ranks, far = ["-", "-", "-"], ["-", "-"]
    if not isinstance(order, Undefined):
        rho = order.spearman[OTHER_RUN]
        ranks = [f"{order.tokens:,}", cell(rho), cell(order.test.estimate, order.test)]
    if not isinstance(falls, Undefined):
        profile = ", ".join(f"{each.value:.2f}" for each in falls.profile)
        far = [cell(falls.test.estimate, falls.test), profile]
    return [*ranks, *far]


AXIS = [
    *("task", "top", "kappa", "floor", "gain, nats", "share of the same items earlier"),
    "errors: shift and floor / plain shift / E + A N^-a + B t^-b, nats",
    *("R² of last losses", "groups by learning time"),
]


def axis_rows(tasks: Sequence[Path], folder: Path) -> Rows:
    for task in tasks:
        if not (folder / task.name / "axis.json").is_file():
            continue
        shift = read_axis(models_of(task)[0], folder / task.name).summary.shift
        if isinstance(shift, Undefined):
            yield [task.name, shift.undefined, *("-" * (len(AXIS) - 2))]
            continue
        errors, groups = shift.errors, shift.groups.get("learning-time decile")
        three = "-"
        if not isinstance(errors, Undefined):
            three = f"{errors.shift_and_floor:.3f} / {errors.plain_shift:.3f}"
            three += f" / {errors.additive:.3f}"
        yield [
            *(task.name, str(shift.top), cell(shift.kappa.both), cell(shift.floor.both)),
            *(cell(shift.gain.both), cell(shift.share.both, shift.earlier_test, ".2f"), three),
            cell(shift.left_out_test.estimate, shift.left_out_test),
            cell(groups.skill.both, groups.test, ".2f") if groups else "-",
        ]


MATRIX = ["items", "number", "fall from the smallest model to the largest, nats", "learned by then"]


def matrix_rows(run: Run) -> Rows:
    summary = read_matrix(run).summary
    for each in summary.groups:
        yield [each.name, f"{each.tokens:,}", cell(each.fall), cell(each.learned)]
    last = summary.values[-1].learned
    yield ["all", f"{summary.n_tokens:,}", cell(summary.fall), cell(last)]


def laws_in(folder: Path) -> CurveLawsResult:
    """Return what `laws` wrote into a folder."""
    path = folder / "curve_laws.json"
    return read_typed_result(CurveLawsResult, path, CURVE_LAWS_SCHEMA, "remove its log")


CHINCHILLA = ["curves", "losses", "predicted minus measured last loss", "mean error"]


def size_rows(folders: Sequence[Path]) -> Rows:
    for folder in folders:
        for over in laws_in(folder).over_tables:
            if isinstance(found := over.chinchilla_forecast, Undefined):
                continue
            errors = zip(found.names, found.predicted_S, found.loss_S, strict=True)
            each = ", ".join(f"{name} {p / loss - 1:+.2%}" for name, p, loss in errors)
            yield [folder.name, over.losses, each, cell(found.error, found.test, "+.2%")]


SCHEDULES = ["losses", "predicted", "curves fitted", "R²", "nats", "mean error over loss", "worst"]


def schedule_rows(folders: Sequence[Path]) -> Rows:
    for folder in folders:
        for over in laws_in(folder).over_tables:
            for model in () if isinstance(over.multi_power, Undefined) else over.multi_power:
                for each in () if isinstance(model.forecasts, Undefined) else model.forecasts:
                    score = each.score
                    yield [
                        *(over.losses, each.held_out, str(len(each.fitted_on))),
                        *(f"{score.r2:.3f}", f"{score.mae:.4f}"),
                        *(
                            cell(score.mean_relative, each.test, ".2%"),
                            f"{score.worst_relative:.2%}",
                        ),
                    ]


BREAK_COLUMNS = ["run", "published break", "found", "apart", "late rate over early"]


def break_rows(file: Path) -> Rows:
    """Yield the break of each published curve, which is smoothed and thinned already."""
    curves = json.loads(file.read_text(encoding="utf-8"))
    for name, published in BREAKS.items():
        smoothed = curves[name]["smoothed_loss"]
        found = fit_deceleration(smoothed["x"], smoothed["y"])
        yield [
            *(name, f"{published:,}", cell(found.break_step, pattern=",.0f")),
            f"{found.break_step.value / published - 1:+.2%}",
            cell(found.rate_ratio, found.test),
        ]

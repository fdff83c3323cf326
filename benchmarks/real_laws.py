"""Laws on real runs of others: Chinchilla, the multi-power law and loss deceleration.

    python benchmarks/real_laws.py --data DIR [--out FILE]

DIR holds three folders of public data (their sources are in docs/guides/laws.md):
`olmo_ladder/SIZE-BUDGETxC.csv`, `multi_power_law/csv_SIZE/SCHEDULE.csv` and `zsl/bnsl_fit.json`.
About five minutes on one core. Nothing is drawn at random but the resamples of intervals, seed 0.

Shapes: K rows with a loss, I points of Chinchilla's law, S predicted runs.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from table import heading, print_sections

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.laws import (
    LossCurve,
    fit_chinchilla,
    fit_deceleration,
    fit_multi_power,
)
from megatron_tokscale.laws.chinchilla import forecast_chinchilla
from megatron_tokscale.laws.multi_power.forecast import NamedCurve
from megatron_tokscale.laws.multi_power.multi_power import predict_losses, score_forecast
from megatron_tokscale.laws.multi_power.schedule_fit import HELD, HeldDrop
from megatron_tokscale.laws.tables.columns import ColumnNames
from megatron_tokscale.laws.tables.curves import CurveTable
from megatron_tokscale.laws.tables.manifest import TableFacts
from megatron_tokscale.results.laws import ForecastScore, RunLoss

SIZES = {"190M": 190_354_176, "370M": 371_262_464, "760M": 758_220_288, "1B": 1_279_395_840}
BUDGETS = ("0.5xC", "1xC", "1xC-rerun", "2xC", "5xC", "10xC")
PREDICTED = "1B"
TRAINED = ("cosine_24000", "constant_24000", "wsdcon_9")
TESTED = (
    *("constant_72000", "cosine_72000", "wsd_20000_24000"),
    *("wsdld_20000_24000", "wsdcon_3", "wsdcon_18"),
)
PUBLISHED_SCORES = {
    25: (0.9988, 0.0038, 0.0041),
    100: (0.9983, 0.0044, 0.0058),
    400: (0.9978, 0.0048, 0.0100),
}
PUBLISHED_BREAKS = {
    **{"14M": 5877, "37M": 5907, "78M": 5929, "144M": 6074},
    **{"285M": 5264, "472M": 4644, "OLMo-1B": 3718, "OLMo-7B": 4628},
}
LATE = 0.05  # share of a run's tokens whose rows count as its last part


@dataclass(frozen=True)
class Ladder:
    """The tables of the OLMo ladder, by size and budget."""

    tables: dict[tuple[str, str], CurveTable]

    @classmethod
    def read(cls, folder: Path) -> "Ladder":
        """Read the tables that are there."""
        return cls(
            {
                (size, budget): CurveTable.read(
                    TableFacts(folder / f"{size}-{budget}.csv", f"{size}-{budget}", parameters),
                    ColumnNames(),
                )
                for size, parameters in SIZES.items()
                for budget in BUDGETS
            }
        )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the columns of losses."""
        return tuple(curve.name for curve in next(iter(self.tables.values())).curves)

    def losses(self, size: str, budget: str, dataset: str) -> tuple[Floats, Floats]:
        """Return the tokens at each row, and the losses."""
        table = self.tables[size, budget]
        (curve,) = (each for each in table.curves if each.name == dataset)
        return curve.step_K * (curve.tokens / curve.step_K[-1]), curve.loss_K

    def run_loss(self, size: str, budget: str, dataset: str, *, late: bool) -> RunLoss:
        """Return the last loss of a run, or its mean over the last part."""
        tokens_K, loss_K = self.losses(size, budget, dataset)
        chosen_K = tokens_K >= (1 - LATE if late else 1) * tokens_K[-1]
        loss, tokens = float(loss_K[chosen_K].mean()), round(tokens_K[-1])
        return RunLoss(f"{size}-{budget}", None, SIZES[size], None, tokens, loss)

    def curve(self, size: str, budget: str, dataset: str) -> NamedCurve:
        """Return a run's curve with its schedule, after the warm-up."""
        table = self.tables[size, budget]
        (curve,) = (each for each in table.curves if each.name == dataset)
        step_K = curve.step_K.astype(np.int64)
        return NamedCurve.after_warmup(table.facts.name, table.rates(), step_K, curve.loss_K)


def chinchilla_rows(ladder: Ladder) -> Iterator[list[str]]:
    """Yield per dataset the errors of each run of 1B, predicted from 190M to 760M."""
    for dataset in ladder.datasets:
        rows = [
            ladder.run_loss(size, budget, dataset, late=False)
            for size in SIZES
            for budget in BUDGETS
        ]
        found = forecast_chinchilla(rows)
        measured_S, predicted_S = np.array(found.loss_S), np.array(found.predicted_S)
        law, error = found.law, found.error
        yield [
            dataset,
            *(f"{each:+.2%}" for each in predicted_S / measured_S - 1),
            f"{np.abs(predicted_S - measured_S).mean():.3f}",
            f"{error.value:+.2%} [{error.low:+.2%}, {error.high:+.2%}]",
            found.test.verdict.value,
            f"{law.alpha.value:.2f}, {law.beta.value:.2f}",
        ]


def choice_rows(ladder: Ladder) -> Iterator[list[str]]:
    """Yield the errors under each choice of points."""

    def last(late: bool, skipped: Sequence[str] = ()) -> Callable[[str], Floats]:
        def error(dataset: str) -> Floats:
            fitted = [
                ladder.run_loss(size, budget, dataset, late=late)
                for size in SIZES
                for budget in BUDGETS
                if size != PREDICTED and budget not in skipped
            ]
            law = fit_chinchilla(
                [row.non_embedding for row in fitted],
                [row.tokens for row in fitted],
                [row.loss for row in fitted],
                n_resamples=2,
            )
            return errors_of(law.predict, ladder, dataset)

        return error

    def late_points(dataset: str) -> Floats:
        n_I, d_I, loss_I = [], [], []
        for (size, budget), table in ladder.tables.items():
            if size != PREDICTED:
                tokens_K, loss_K = ladder.losses(size, budget, dataset)
                late_K = tokens_K >= (1 - LATE) * tokens_K[-1]
                n_I += [table.facts.parameters] * int(late_K.sum())
                d_I += tokens_K[late_K].tolist()
                loss_I += loss_K[late_K].tolist()
        return errors_of(fit_chinchilla(n_I, d_I, loss_I, n_resamples=2).predict, ladder, dataset)

    choices = {
        "last losses": last(late=False),
        f"mean over the last {LATE:.0%} of the tokens": last(late=True),
        f"every row of the last {LATE:.0%} as a point": late_points,
        "last losses without 0.5xC": last(late=False, skipped=("0.5xC",)),
    }
    for name, error in choices.items():
        error_DS = np.array([error(dataset) for dataset in ladder.datasets])
        yield [
            name,
            f"{np.abs(error_DS).mean():.2%}",
            f"{np.abs(error_DS).max():.2%}",
            *(f"{each:+.2%}" for each in error_DS.mean(axis=0)),
        ]


def errors_of(predict: Callable[..., Floats], ladder: Ladder, dataset: str) -> Floats:
    """Return the relative errors of the runs of 1B, by their last losses."""
    rows = [ladder.run_loss(PREDICTED, budget, dataset, late=False) for budget in BUDGETS]
    loss_S = np.array([row.loss for row in rows])
    tokens_S = np.array([row.tokens for row in rows], dtype=float)
    return np.asarray(predict(np.full(len(rows), SIZES[PREDICTED]), tokens_S) / loss_S - 1)


def forecast(
    fitted: Sequence[NamedCurve], tested: Sequence[NamedCurve], held: HeldDrop | None
) -> list[ForecastScore]:
    """Return the scores of curves that the law of others predicts."""
    law = fit_multi_power([each.curve for each in fitted], held=held)
    return [
        score_forecast(
            predict_losses(law, each.curve.learning_rate_T, each.curve.step_I), each.curve.loss_I
        )
        for each in tested
    ]


def published_rows(folder: Path) -> Iterator[list[str]]:
    """Yield the scores on the authors' curves, their mean over the six that are not fitted.

    As the authors do, all rows of a file are fitted and scored; they begin after the warm-up.
    """
    for size, published in PUBLISHED_SCORES.items():
        curves = {}
        for name in (*TRAINED, *TESTED):
            table = CurveTable.read(
                TableFacts(folder / f"csv_{size}" / f"{name}.csv", name), ColumnNames()
            )
            (curve,) = table.curves
            step_K = curve.step_K.astype(np.int64)
            curves[name] = NamedCurve(name, LossCurve(table.rates(), step_K - 1, curve.loss_K))
        for label, held in (("default", HELD), ("all fitted", None)):
            scores = forecast(
                [curves[name] for name in TRAINED], [curves[name] for name in TESTED], held
            )
            r2, mae, worst = np.mean([(s.r2, s.mae, s.worst_relative) for s in scores], axis=0)
            yield [
                f"{size}M",
                label,
                f"{r2:.4f} ({published[0]:.4f})",
                f"{mae:.4f} ({published[1]:.4f})",
                f"{worst:.4f} ({published[2]:.4f})",
            ]


def budget_rows(ladder: Ladder) -> Iterator[list[str]]:
    """Yield the scores of longer budgets predicted from shorter ones, over all datasets."""
    splits = {
        ("0.5xC", "1xC", "1xC-rerun", "2xC", "5xC"): ("10xC",),
        ("0.5xC", "1xC", "1xC-rerun", "2xC"): ("5xC", "10xC"),
        ("5xC", "10xC"): ("0.5xC", "1xC", "2xC"),
    }
    for fitted, tested in splits.items():
        for size in SIZES:
            scores = [
                forecast(
                    [ladder.curve(size, budget, dataset) for budget in fitted],
                    [ladder.curve(size, budget, dataset) for budget in tested],
                    HELD,
                )
                for dataset in ladder.datasets
            ]
            for i, budget in enumerate(tested):
                of_budget = [each[i] for each in scores]
                mean = np.array([each.mean_relative.value for each in of_budget])
                yield [
                    ", ".join(fitted),
                    f"{size}-{budget}",
                    f"{np.mean([each.r2 for each in of_budget]):.3f}",
                    f"{np.mean([each.mae for each in of_budget]):.4f}",
                    f"{mean.mean():.2%} ({mean.min():.2%} to {mean.max():.2%})",
                    f"{np.max([each.worst_relative for each in of_budget]):.2%}",
                ]


def break_rows(file: Path) -> Iterator[list[str]]:
    """Yield the break of each published curve, which is smoothed and thinned already."""
    curves = json.loads(file.read_text())
    for name, published in PUBLISHED_BREAKS.items():
        smoothed = curves[name]["smoothed_loss"]
        found = fit_deceleration(smoothed["x"], smoothed["y"])
        at, ratio = found.break_step, found.rate_ratio
        yield [
            name,
            f"{published:,}",
            f"{at.value:,.0f} [{at.low:,.0f}, {at.high:,.0f}]",
            f"{at.value / published - 1:+.2%}",
            f"{found.late_rate.value:.3f}",
            f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            found.test.verdict.value,
        ]


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, and write them with command and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--out", type=Path, help="file for the tables")
    arguments = parser.parse_args(words)
    data = arguments.data
    ladder = Ladder.read(data / "olmo_ladder")
    sections = [
        (
            "Chinchilla on the OLMo ladder: last losses of 1B, predicted from 190M, 370M and 760M",
            ["dataset", *BUDGETS, "nats", "mean error [95%]", "within 1%", "alpha, beta"],
            chinchilla_rows(ladder),
        ),
        (
            "The same with other points, over the 11 datasets (by budget: mean error)",
            ["points", "mean error", "worst", *BUDGETS],
            choice_rows(ladder),
        ),
        (
            "Multi-power law on its authors' curves: three fitted, six predicted (published)",
            ["size", "drop", "R²", "mean absolute error (nats)", "worst error over loss"],
            published_rows(data / "multi_power_law"),
        ),
        (
            "Multi-power law on the OLMo ladder, over 11 datasets (range of the datasets)",
            ["fitted", "predicted", "R²", "nats", "mean error over loss", "worst"],
            budget_rows(ladder),
        ),
        (
            "Loss deceleration on the curves of Mircea et al.: published and found break",
            ["run", "published", "found [95%]", "apart", "late rate", "late over early", "verdict"],
            break_rows(data / "zsl" / "bnsl_fit.json"),
        ),
    ]
    text = print_sections(sections)
    if arguments.out:
        command = "python benchmarks/real_laws.py --data DIR --out benchmarks/results/real_laws.md"
        about = heading(scipy=scipy.__version__, numpy=np.__version__)
        arguments.out.write_text(f"# Laws on real runs\n\n`{command}`\n\n{about}\n\n{text}")


if __name__ == "__main__":
    main()

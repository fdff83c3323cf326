"""Laws of tables of loss curves: the rule of columns, sparse and repeated rows, planted laws."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.laws import describe_curves, fit_deceleration, laws_curves
from megatron_tokscale.laws.deceleration import decimal_rows, log_window_mean
from megatron_tokscale.laws.multi_power.multi_power import predict_losses
from megatron_tokscale.laws.tables.columns import ColumnNames, find_columns
from megatron_tokscale.laws.tables.curves import CurveTable
from megatron_tokscale.laws.tables.manifest import TableFacts, tables_of
from megatron_tokscale.laws.tables.read_table import read_table
from megatron_tokscale.results.laws import MultiPowerLaw
from megatron_tokscale.results.verdict import Verdict

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
SIZES = {"190M": 190_354_176, "370M": 371_262_464, "760M": 758_220_288, "1B": 1_279_395_840}


def write(path, columns):
    """Write a CSV file; NaN and None become empty cells."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            rows.writerow(["" if value is None or value != value else value for value in row])
    return path


def read(path, names=None, **facts):
    return CurveTable.read(TableFacts(path, path.stem, **facts), names or ColumnNames())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            [
                "_step",
                "_runtime",
                "_timestamp",
                "train/loss",
                "optim/learning_rate_group0",
                "epoch",
            ],
            ("_step", None, "optim/learning_rate_group0", ("train/loss",)),
        ),
        (["Wall time", "Step", "Value"], ("Step", None, None, ("Value",))),
        (
            ["Step", "run - eval/loss", "run - eval/loss__MIN", "run - eval/loss__MAX"],
            ("Step", None, None, ("run - eval/loss",)),
        ),
        (
            ["step", "tokens", "learning_rate_group0", "learning_rate_peak", "c4_en", "pile"],
            ("step", "tokens", "learning_rate_group0", ("c4_en", "pile")),
        ),
        (
            ["iteration", "lr", "lm loss", "loss-scale", "grad_norm", "mmlu"],
            ("iteration", None, "lr", ("lm loss",)),
        ),
        (
            ["global_step", "trainer/global_step_time", "train_loss_step", "tokens_per_second"],
            ("global_step", None, None, ("train_loss_step",)),
        ),
    ],
)
def test_columns_are_found_by_their_names(tmp_path, names, found):
    table = read_table(write(tmp_path / "a.csv", {name: [1, 2] for name in names}))
    columns = find_columns(table, ColumnNames())
    assert (columns.step, columns.tokens, columns.learning_rate, columns.losses) == found


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "a.csv", {"a": [1, 2], "b": [3, 2], "loss": [9, 9], "c": [1e-3, 1e-3]})
    columns = find_columns(read_table(path), ColumnNames("a", None, "c", ("b",)))
    assert (columns.step, columns.learning_rate, columns.losses) == ("a", "c", ("b",))
    with pytest.raises(TokscaleError, match=r"column 'd' of numbers is not in .*a, b, loss, c"):
        find_columns(read_table(path), ColumnNames(step="d"))


def test_sparse_unsorted_and_repeated_rows(tmp_path):
    """Losses are logged less often than rates; a resumed run logs steps 30 and 40 again."""
    nan = float("nan")
    path = write(
        tmp_path / "a.csv",
        {
            "step": [10, 20, 40, 30, 40, 30, 50, None],
            "lr": [1e-3, 2e-3, nan, 2e-3, 2e-3, nan, 1e-3, 1e-3],
            "train/loss": [5, nan, 3.5, 4, 4.5, nan, "inf", 1],
            "eval/loss": [nan, 6, nan, nan, 5, nan, nan, 1],
            "empty/loss": [None] * 8,
        },
    )
    table = read(path)
    assert (table.n_rows, table.n_without_step) == (8, 1)
    train, evaluated = table.curves
    assert train.step_K.tolist() == [10, 30, 40]
    assert train.loss_K.tolist() == [5, 4, 4]
    assert (train.n_missing, train.n_merged) == (3, 1)
    assert (evaluated.step_K.tolist(), evaluated.n_missing) == ([20, 40], 5)
    rate_T = table.rates()
    assert len(rate_T) == 40
    assert rate_T[[4, 9, 14, 39]] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3])


def test_parquet_is_read_as_csv_is(tmp_path):
    columns = {"step": [1, 2, 3], "note": ["a", "b", "c"], "loss": [3.0, None, 2.0]}
    of_csv = read(write(tmp_path / "a.csv", columns))
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    of_parquet = read(tmp_path / "a.parquet")
    for table in (of_csv, of_parquet):
        assert table.columns.losses == ("loss",)
        assert table.curves[0].step_K.tolist() == [1, 3]


@pytest.mark.parametrize("end", ["csv", "parquet"])
def test_integers_that_no_float_holds_are_rounded(tmp_path, end):
    flops = [2**53 + 1, 2**60 + 300, 3]
    columns = {"step": [1, 2, 3], "loss": [4.0, 3.0, 2.0], "total_flos": flops}
    path = write(tmp_path / "a.csv", columns)
    if end == "parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pa.table(columns), path)
    # IEEE 754 binary64: multiples of 2 above 2^53, ties to even; of 2^8 above 2^60.
    assert read_table(path).column("total_flos").tolist() == [2.0**53, 2.0**60 + 256, 3]
    assert read(path).curves[0].loss_K.tolist() == [4, 3, 2]


def test_a_header_that_is_not_utf_8_is_refused_in_one_line(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("step,loss,durée\n10,5.5,1\n20,4.5,1\n".encode("latin-1"))
    with pytest.raises(TokscaleError, match=r"cannot read the table .*latin\.csv") as caught:
        read_table(path)
    assert "expected CSV in UTF-8" in str(caught.value) and "\n" not in str(caught.value)


def test_steps_and_tokens_follow_from_each_other(tmp_path):
    of_tokens = read(
        write(tmp_path / "a.csv", {"tokens": [0, 4096, 8192], "loss": [3, 2, 1]}),
        tokens_per_step=1024.0,
    )
    assert of_tokens.curves[0].step_K.tolist() == [0, 4, 8]
    path = write(tmp_path / "b.csv", {"step": [0, 4], "loss": [3, 2]})
    assert read(path, tokens_per_step=1024.0).curves[0].tokens == 4096
    assert read(path).curves[0].tokens is None
    with pytest.raises(TokscaleError, match="has no column of steps"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"step": [1, 2], "lr": [1, 1]}, "no column of losses; .* step, lr; give --loss-column"),
        ({"step": [0.5, 2], "loss": [1, 1]}, "holds no steps"),
        ({"step": [-1, 2], "loss": [1, 1]}, "holds no steps"),
        ({"step": [1, 2], "loss": [None, None]}, "no finite loss"),
        ({"step": [None, None], "loss": [1, 1]}, "has no step in any row"),
        ({"loss": [1, 1]}, "has no column of steps"),
        ({"a/step": [1, 2], "b/step": [1, 2], "loss": [1, 1]}, "may both be meant"),
        ({"step": [], "loss": []}, "has no rows"),
    ],
)
def test_tables_that_are_no_loss_curves_are_refused(tmp_path, columns, message):
    with pytest.raises(TokscaleError, match=message):
        read(write(tmp_path / "a.csv", columns))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", None])
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokscaleError) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_manifest_gives_names_sizes_and_tokens_per_step(tmp_path):
    rows = [{"file": "runs/a.csv", "name": "A", "parameters": 5e6, "tokens_per_step": 1024}]
    (tmp_path / "m.json").write_text(json.dumps([*rows, {"file": "b.csv"}]))
    (tmp_path / "m.csv").write_text("file,name,parameters\nruns/a.csv,A,5_000_000\nb.csv,,\n")
    for name in ("m.json", "m.csv"):
        first, second = tables_of([], tmp_path / name)
        assert (first.file, first.name) == (tmp_path / "runs/a.csv", "A")
        assert (first.parameters, second.parameters) == (5_000_000, None)
        assert second.name == "b"
    only = tables_of([tmp_path / "b.csv"], tmp_path / "m.json")
    assert [each.name for each in only] == ["b"]
    with pytest.raises(TokscaleError, match="does not name"):
        tables_of([tmp_path / "c.csv"], tmp_path / "m.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,size\na.csv,3\n", "unknown column 'size'"),
        ("file,parameters\na.csv,big\n", "parameters in row 1 of .* is 'big'"),
        ("name\na\n", "names no file"),
        ("file,name\na.csv,x\nb.csv,x\n", "two tables are named 'x'"),
        ("file\n", "there are no tables"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(TokscaleError, match=message):
        tables_of([], tmp_path / "m.csv")


LAW = MultiPowerLaw(2.0, 0.6, 0.45, 200.0, 20.0, 2.0, 0.0, 0.0, 0, True)


def cosine(n_steps, peak=1e-3, warmup=50):
    step = np.arange(1, n_steps + 1)
    fall = 0.1 + 0.45 * (1 + np.cos(np.pi * (step - warmup) / (n_steps - warmup)))
    return peak * np.where(step < warmup, step / warmup, fall)


def ladder(folder):
    """Write runs of four sizes and three budgets, one budget twice; return the manifest."""
    rows = []
    for size in (1e6, 4e6, 16e6, 64e6):
        for name, n_steps in (("a", 400), ("b", 800), ("c", 1600), ("b2", 800)):
            rate_T = cosine(n_steps)
            step = np.unique([*range(50, n_steps + 1, 25), n_steps])
            last = 1.5 + 400 * size**-0.35 + 60 * (n_steps * 512.0) ** -0.4
            loss = predict_losses(LAW, rate_T, step - 1)
            file = write(
                folder / f"{size:.0f}-{name}.csv",
                {"step": step, "lr": rate_T[step - 1], "loss": loss, "eval_loss": loss * 0 + last},
            )
            rows.append({"file": file.name, "parameters": size, "tokens_per_step": 512})
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder / "manifest.json"


@pytest.mark.slow
def test_laws_over_tables_find_the_planted_laws(tmp_path):
    """Ties in size and in budget are allowed; the largest model and the longest runs are told."""
    found = laws_curves([], manifest=ladder(tmp_path), out=tmp_path / "out", n_resamples=5)
    loss, evaluated = found.over_tables
    law, forecast = evaluated.chinchilla, evaluated.chinchilla_forecast
    assert law.n_runs == 16
    assert (law.alpha.value, law.beta.value) == pytest.approx((0.35, 0.4), abs=0.01)
    assert forecast.predicted_S == pytest.approx(forecast.loss_S, rel=1e-3)
    assert [model.parameters for model in loss.multi_power] == [1e6, 4e6, 16e6, 64e6]
    for model in loss.multi_power:
        (each,) = model.forecasts
        assert each.held_out == f"{model.parameters}-c"
        assert len(each.fitted_on) == 3
        assert each.score.mean_relative.value < 0.01
    text = describe_curves(found)
    assert "64000000-c" in text and "over the runs, eval_loss" in text
    written = json.loads((tmp_path / "out/curve_laws.json").read_text())
    for name in ("schema_version", "version", "checksum"):
        del written[name]
    assert written == json.loads(json.dumps(to_json(found)))


def test_what_a_table_lacks_is_said(tmp_path):
    step = np.arange(100, 4000, 100)
    path = write(tmp_path / "a.csv", {"step": step, "loss": 2 + 5 * step**-0.5})
    (table,) = laws_curves([path], n_resamples=5).tables
    (curve,) = table.curves
    assert "no learning rates" in curve.one_third.undefined
    assert curve.power_law.exponent.value == pytest.approx(0.5, abs=1e-3)
    other = write(tmp_path / "b.csv", {"step": step, "loss": 2 + 5 * step**-0.5})
    (over,) = laws_curves([path, other], n_resamples=5).over_tables
    assert "is not known" in over.chinchilla.undefined
    assert "no size" in over.multi_power.undefined


def test_a_curve_is_averaged_and_thinned_as_mircea_et_al_do(tmp_path):
    step = np.arange(1, 20_001)
    loss = np.exp(1.3 - 0.2 * np.minimum(np.log(step / 1500), 0)) * (step / 1500) ** -0.02
    loss *= np.exp(0.02 * np.random.default_rng(0).standard_normal(len(step)))
    path = write(tmp_path / "a.csv", {"step": step, "loss": loss})
    found = laws_curves([path], n_resamples=20).tables[0].curves[0].deceleration
    rows = decimal_rows(step)
    by_hand = fit_deceleration(step[rows], log_window_mean(step, loss, 1.2)[rows], n_resamples=20)
    assert (found.break_step, found.n_points) == (by_hand.break_step, by_hand.n_points)
    assert found.test.verdict is Verdict.HOLDS


def test_a_schedule_without_rates_is_undefined(tmp_path):
    path = write(tmp_path / "a.csv", {"step": [1, 2], "loss": [2, 1]})
    with pytest.raises(UndefinedError, match="no learning rates"):
        read(path).rates()


@pytest.mark.skipif(not DATA.exists(), reason="the public tables are not here")
def test_public_tables_are_read_as_they_are():
    table = read(DATA / "olmo_ladder/190M-1xC.csv")
    assert (table.columns.learning_rate, len(table.curves)) == ("learning_rate_group0", 11)
    assert table.curves[0].tokens == pytest.approx(3.81262e9)
    rate_T = table.rates()
    assert rate_T[[99, 199]] == pytest.approx([0.000267969, 0.000535939], rel=1e-4)
    curve = read(DATA / "multi_power_law/csv_25/cosine_24000.csv")
    assert curve.curves[0].loss_K[0] == 4.1114
    step = np.arange(2161, 23_921)
    exact = 3e-5 + 1.35e-4 * (1 + np.cos(np.pi * (step - 2160) / (24_000 - 2160)))
    assert curve.rates()[2160:] == pytest.approx(exact, rel=1e-3)

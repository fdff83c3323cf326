"""`laws` on tables of loss curves: the result, and one line with exit code 2 for wrong input."""

import json

import numpy as np
import pytest
from runs import write_run

from megatron_tokscale.cli import main


@pytest.fixture
def table(tmp_path):
    step = np.arange(100, 3100, 100)
    loss = 2 + 5 * step**-0.5
    rows = [f"{s},{s * 512},1e-3,{x},{x + 1}" for s, x in zip(step, loss, strict=True)]
    path = tmp_path / "run.csv"
    path.write_text("\n".join(["_step,tokens,lr,train/loss,eval/loss", *rows]) + "\n")
    return path


def test_laws_of_a_table_are_printed_and_written(table, tmp_path, capsys):
    main(["laws", "--curves", str(table), "--out", str(tmp_path / "out"), "--resamples", "4"])
    shown = capsys.readouterr().out
    assert "step: _step; tokens: tokens; learning rate: lr" in shown
    assert "one-third law (softmax)" in shown and "loss deceleration" in shown
    written = json.loads((tmp_path / "out/curve_laws.json").read_text())
    (run,) = written["tables"]
    assert [curve["losses"] for curve in run["curves"]] == ["train/loss", "eval/loss"]
    assert run["curves"][0]["tokens"] == 3000 * 512
    assert run["curves"][0]["power_law"]["exponent"]["value"] == pytest.approx(0.5, abs=1e-3)


def test_columns_can_be_named_by_flags(table, tmp_path):
    flags = ["--loss-column", "eval/loss", "--step-column", "tokens", "--resamples", "4"]
    main(["laws", "--curves", str(table), "--out", str(tmp_path / "out"), *flags])
    (run,) = json.loads((tmp_path / "out/curve_laws.json").read_text())["tables"]
    assert [curve["losses"] for curve in run["curves"]] == ["eval/loss"]
    assert run["step_column"] == "tokens"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--curves", "{table}"], "--out is missing"),
        (["--out", "{out}"], "there are no tables of losses"),
        (["run", "--curves", "{table}", "--out", "{out}"], "RUN is given together with tables"),
        (
            ["--curves", "{table}", "--split", "9,1,0", "--out", "{out}"],
            "--split is given together",
        ),
        (["--curves", "{out}/none.csv", "--out", "{out}"], "cannot read the table"),
        (["--curves", "{table}", "--step-column", "x", "--out", "{out}"], "column 'x' of numbers"),
        (["--manifest", "{table}", "--out", "{out}"], "has the unknown column '_step'"),
        (["--curves", "{table}", "{table}", "--out", "{out}"], "two tables are named 'run'"),
        ([], "there is nothing to fit laws to"),
    ],
)
def test_wrong_input_ends_with_one_line(table, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["laws", *(word.format(table=table, out=out) for word in words)])
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("megatron-tokscale: ") and message in line
    assert not out.exists()


def test_a_folder_that_is_taken_is_refused_before_the_tables_are_read(tmp_path, capsys):
    write_run(tmp_path / "run", [0, 1, 2], np.ones((16, 3)))
    (tmp_path / "curve_laws.json").write_text("an earlier result")
    for out, message in ((tmp_path / "run", "holds the files of a run"), (tmp_path, "exists")):
        with pytest.raises(SystemExit) as end:
            main(["laws", "--curves", str(tmp_path / "none.csv"), "--out", str(out)])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert (tmp_path / "curve_laws.json").read_text() == "an earlier result"


def test_a_name_with_a_nul_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "m.json").write_text('[{"file": "a\\u0000.csv"}]')
    with pytest.raises(SystemExit) as end:
        main(["laws", "--manifest", str(tmp_path / "m.json"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "cannot read the table" in capsys.readouterr().err.splitlines()[-1]

"""The converter of public repositories' raw files, and the script that runs the verbs on them."""

import csv
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_tokscale.cli.entry import make_parser
from megatron_tokscale.core.errors import TokscaleError


@pytest.fixture
def convert(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "real_runs"))
    return importlib.import_module("convert")


def test_items_of_all_models_and_checkpoints_become_one_array(convert, tmp_path):
    value = 0.0
    for model in ("Gemstone-512x2", "Gemstone-256x4"):
        for checkpoint in ("step_00002385", "step_00004770", "main"):
            folder = tmp_path / "raw" / model / checkpoint
            folder.mkdir(parents=True)
            for task in convert.TASKS:
                value += 1
                parts = {"indomain": [value], "zeroshot": [value + 0.25, value + 0.5]}
                (folder / f"losses_{task}.json").write_text(json.dumps(parts))
    convert.gemstone(tmp_path / "raw", tmp_path)
    found = np.load(tmp_path / "gemstone_items" / "gemstone_items.npz")
    assert found["models"].tolist() == ["256x4", "512x2"]
    assert found["step_K"].tolist() == [2385, 4770, 83450]
    assert found["tokens_K"].tolist() == [10**10, 2 * 10**10, 35 * 10**10]
    assert found["task_N"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    # The files were numbered from 1 in the order of writing: the model 512x2 first.
    assert found["loss_NMK"][:, 1, 0].tolist() == [
        n + f for n in range(1, 5) for f in (0, 0.25, 0.5)
    ]
    assert found["loss_NMK"][0, 0].tolist() == [13, 17, 21]


def test_a_ladder_run_keeps_its_steps_rates_and_losses(convert, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "190M-1xC.csv").write_text(
        "_step,eval/c4_en-validation/CrossEntropyLoss,eval/downstream/piqa_acc,"
        "throughput/total_tokens,optim/learning_rate_group0,learning_rate_peak\n"
        "200,6.03,0.5,104857600,0.0005,0.00097\n"
    )
    (raw / "peteish7_eval_full.csv").write_text("_step\n1\n")
    convert.olmo(raw, tmp_path)
    with (tmp_path / "olmo_ladder" / "190M-1xC.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "step": "200",
        "c4_en": "6.03",
        "tokens": "104857600",
        "learning_rate_group0": "0.0005",
        "learning_rate_peak": "0.00097",
    }
    assert [path.name for path in (tmp_path / "olmo_ladder").iterdir()] == ["190M-1xC.csv"]


def test_a_folder_without_models_is_refused(convert, tmp_path):
    with pytest.raises(TokscaleError, match="has no folder Gemstone-WIDTHxDEPTH"):
        convert.gemstone(tmp_path, tmp_path)


# The script, on a world of one task and five models

KAPPA = 0.25  # how much later a model learns every item, per unit of ln size


@pytest.fixture
def real_runs(convert):
    return importlib.import_module("real_runs")


def write_items(folder, n_items=60):
    """A gemstone_items.npz of items that fall in a step each, later in smaller models."""
    rng = np.random.default_rng(0)
    models = {"256x4": 256, "512x16": 512, "3072x12": 1900, "1536x50": 2100, "2048x27": 2048}
    tokens_K = np.arange(1, 15) * 10**10
    at_N1 = rng.uniform(23.2, 25.8, (n_items, 1))
    low_N1, drop_N1 = rng.uniform(0.5, 4, (2, n_items, 1))
    losses = []
    for width in models.values():
        late_N1 = at_N1 + 2 * KAPPA * np.log(2048 / width)  # the size has the square of the width
        losses.append(low_N1 + drop_N1 / (1 + np.exp((np.log(tokens_K) - late_N1) / 0.3)))
    loss_NMK = np.stack(losses, axis=1) + rng.normal(0, 0.1, (n_items, len(models), 14))
    path = folder / "gemstone_items" / "gemstone_items.npz"
    path.parent.mkdir(parents=True)
    np.savez(
        path,
        loss_NMK=loss_NMK.astype(np.float16),
        task_N=np.zeros(n_items, np.int8),
        tasks=np.array(["piqa"]),
        models=np.array(list(models)),
        width_M=np.array(list(models.values()), np.int32),
        depth_M=np.full(len(models), 20, np.int32),
        step_K=tokens_K // 4_000_000,
        tokens_K=tokens_K,
    )
    return path


def write_curves(folder):
    """Two curves of each of the sets of loss curves, as far as the script's commands need them."""
    for name in ("olmo_ladder/190M-1xC.csv", "olmo_ladder/1B-1xC-rerun.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("step,c4_en,pile\n1,5,5\n")
    (folder / "multi_power_law" / "csv_25").mkdir(parents=True)
    (folder / "multi_power_law" / "csv_25" / "cosine_24000.csv").write_text("step,lr,loss\n1,1,5\n")


def test_every_command_of_the_script_is_parsed(real_runs, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(real_runs, "verb", commands.append)
    monkeypatch.setattr(real_runs, "write_tables", lambda *_: "")
    write_items(tmp_path / "data")
    write_curves(tmp_path / "data")
    given = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    real_runs.main(given)
    for words in commands:
        make_parser().parse_args(words)
    expected = ["import", *["fit"] * 6, *["spectrum"] * 6, "import", "spectrum", "laws", "laws"]
    assert [words[0] for words in commands] == expected
    with (tmp_path / "out" / "files" / "ladder.csv").open() as file:
        sizes = {row["name"]: int(row["parameters"]) for row in csv.DictReader(file)}
    assert sizes == {"190M-1xC": 190_354_176, "1B-1xC-rerun": 1_279_395_840}
    real_runs.main(given)
    assert len(commands) == len(expected)  # a step with a log is not run again


def test_a_matrix_of_each_model_and_the_halves_of_the_reference(real_runs, tmp_path):
    (items,) = real_runs.Items.read(write_items(tmp_path))
    with items.write(tmp_path / "files").open() as file:
        sizes = {row["name"]: int(row["size"]) for row in csv.DictReader(file)}
    assert sizes["2048x27"] == sizes["2048x27-even"] == 12 * 2048**2 * 20
    assert set(sizes) == {*items.models, "2048x27-even", "2048x27-odd"}
    odd = np.load(tmp_path / "files" / "2048x27-odd.npz")
    assert odd["axis_values"].tolist() == [k * 10**10 for k in range(2, 15, 2)]
    np.testing.assert_array_equal(odd["loss_matrix"], items.loss_NMK[:, 4, 1::2])


@pytest.mark.slow
def test_the_script_sums_up_what_the_verbs_find(real_runs, tmp_path, capsys):
    write_items(tmp_path / "data", 300)
    real_runs.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "tables.txt").read_text()
    tables = re.findall(r"^## (.*)$", text, re.M)
    assert tables == [
        "Noise of the mean loss along T",
        "Spectra",
        "Learning times of one model, tested on another",
        "The axis M",
        "Last losses along M, without a fit",
    ]
    orders = re.findall(r"\| piqa \| 2048x27 \| (\d+x\d+) \| .*?: (\w+) \|", text)
    assert sorted(orders) == [(name, "holds") for name in ("1536x50", "3072x12", "512x16")]
    axis = text.split("## The axis M")[1]
    low, high = re.search(r"\| piqa \| [^|]* \| \S+ \[(\S+), (\S+)\]", axis).groups()
    assert float(low) <= KAPPA <= float(high)


def test_a_folder_without_the_layout_is_refused(real_runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        real_runs.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "run convert.py" in capsys.readouterr().err

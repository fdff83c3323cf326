"""The converter of public repositories' raw files, on small files of the same form."""

import csv
import json

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError


@pytest.fixture
def convert(monkeypatch):
    import importlib
    from pathlib import Path

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

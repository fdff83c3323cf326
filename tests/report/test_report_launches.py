"""The settings of each launch on the page, and the comparison of two runs' settings."""

import dataclasses
import re

from runs import launch

from megatron_tokscale.report.sections.beside import _different_settings
from megatron_tokscale.report.sections.overview import _launches
from megatron_tokscale.store import Batch


def rows_of(*launches):
    plain = [re.sub("<[^>]*>", "", " | ".join(row)) for row in _launches(launches)]
    return dict(row.split(" | ", 1) for row in plain)


def test_the_first_launch_is_shown_in_full():
    rows = rows_of(launch(train_iters=40))
    assert rows["Batch"].startswith("global batch size 4, micro batch size 4")
    assert "train iters 40" in rows["Batch"]
    assert rows["Learning rate"].startswith("peak 0.001, minimum 0.0001")
    assert rows["Seed"] == "1234"


def test_a_later_launch_is_shown_by_its_changes():
    batch = Batch(global_batch_size=16, micro_batch_size=4)
    layout = {"world_size": 4, "tensor": 2, "pipeline": 1, "virtual_pipeline": None}
    rows = rows_of(
        launch(), launch(1000, batch=batch, layout=layout), launch(2000, batch=batch, layout=layout)
    )
    assert rows["From step 1,000"] == "parallel layout: world size 4; batch: global batch size 16"
    assert rows["From step 2,000"] == "resumed with the same settings"


def test_a_run_that_begins_later_says_so():
    assert rows_of(launch(8))["First known launch"] == "from step 8"


def test_settings_of_two_runs_are_compared_launch_by_launch(planted):
    def run(*launches):
        info = dataclasses.replace(planted.run.info, launches=launches)
        return dataclasses.replace(planted.run, info=info)

    same = "Model, batch, learning rate, seed and versions are the same in both runs."
    assert _different_settings(run(launch()), run(launch(), launch(8))) == same
    batch = Batch(global_batch_size=16, micro_batch_size=4)
    text = _different_settings(run(launch()), run(launch(seed=7), launch(8, seed=7, batch=batch)))
    assert "seed 1234 / 7" in text
    assert "from step 8.batch.global_batch_size not set / 16" in text

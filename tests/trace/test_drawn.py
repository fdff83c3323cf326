"""The planned end of a training, until which documents count as drawn; `test_trace.py` has the
documents themselves, against Megatron's own tokens."""

import document_plans
import numpy as np
import pytest
from runs import launch

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.data.record import (
    DataRecord,
    DatasetRecord,
    PlanRecord,
    UntracedRecord,
    record_path,
)
from megatron_tokscale.store import Batch, Identity, RunPaths
from megatron_tokscale.trace.drawn import drawn_documents, planned_samples
from megatron_tokscale.trace.trace import Trace


def batch(size, micro, **changes):
    return Batch(global_batch_size=size, micro_batch_size=micro, **changes)


class SevenSamples:
    def __len__(self):
        return 7


@pytest.mark.parametrize(
    ("launches", "expected"),
    [
        ([launch(batch=batch(8, 4, train_iters=100))], 800),
        ([launch(batch=batch(8, 4, train_iters=100, train_samples=555))], 555),
        ([launch(batch=batch(8, 4))], 7),
        ([], 7),
        (
            [
                launch(batch=batch(4, 4, train_iters=100)),
                launch(50, batch=batch(8, 4, train_iters=60)),
            ],
            50 * 4 + 10 * 8,
        ),
        # 2, then 4, then 8 samples a step: each size for 16 samples, by Megatron's rule.
        (
            [launch(batch=batch(8, 2, rampup_batch_size=[2, 2, 48], train_iters=30))],
            None,
        ),
    ],
)
def test_the_planned_end_is_that_of_the_last_launch(tmp_path, launches, expected):
    identity = Identity("feedfeedfeedfeed", "0" * 16, launches=tuple(launches))
    identity.save(RunPaths(tmp_path).identity)
    if expected is None:
        consumed = 0
        for _ in range(30):  # Megatron: start + increment * (consumed // (samples / increments))
            consumed += min(2 + 2 * int(consumed / (48 / 3)), 8) if consumed <= 48 else 8
        expected = consumed
    assert planned_samples(tmp_path, SevenSamples()) == expected


def test_a_run_without_settings_counts_to_the_end_of_its_samples(tmp_path):
    assert planned_samples(tmp_path, SevenSamples()) == 7


@pytest.mark.parametrize("until", [0, 1, 75, 150])
def test_documents_drawn_by_strata_of_documents_are_those_that_megatron_returns(tmp_path, until):
    prefixes, cache, run = document_plans.write_data(tmp_path), tmp_path / "cache", tmp_path / "run"
    plan = document_plans.plan_of(prefixes)
    dataset = document_plans.follow(plan, prefixes, cache, 150)
    files = tuple(None if file is None else str(file) for file in dataset.strata.files)
    rows = tuple(DatasetRecord.from_gpt_dataset(part) for part in dataset.datasets)
    order = PlanRecord(str(cache), plan.fingerprint, 150, files)
    (run / "tokscale").mkdir(parents=True)
    plan.save(run / "tokscale/plan.json")
    DataRecord(rows, order).save(record_path(run))
    read = {name: set() for name in prefixes}
    for k in range(until):
        name, documents = document_plans.documents_in(dataset[k])
        read[name] |= set(documents)
    portions = [
        Portion(IndexedTokens.open(prefix), range(*document_plans.PARTS[name]), 1.0)
        for name, prefix in prefixes.items()
    ]
    found = drawn_documents(Trace.open(run), portions, until)
    for name, drawn in zip(prefixes, found, strict=True):
        assert set(np.flatnonzero(drawn.is_drawn_Q).tolist()) == read[name]


def test_an_unknown_order_of_samples_is_refused():
    records = [DataRecord((), UntracedRecord("--dataloader-type cyclic"))]
    with pytest.raises(TokscaleError, match=r"that the run has drawn are not all known: .* cyclic"):
        drawn_documents(Trace.from_records(records), [], 10)

"""`plan build keep`: real Megatron datasets, whose tokens tell which documents a sample reads."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpt_datasets import gpt_config, gpt_dataset, pieces_of, read_tokens, write_unique_tokens

from megatron_tokscale.cli import main
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    Stage,
    Stratum,
    load_or_build_index,
    with_decisions,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.history import resume, save_run_plan
from megatron_tokscale.data.record import (
    DataRecord,
    DatasetRecord,
    PlanRecord,
    load_records,
    record_path,
)
from megatron_tokscale.data.strata import load_or_build_strata
from megatron_tokscale.store import Identity, RunPaths
from megatron_tokscale.trace.trace import Trace

LENGTHS = {"web": [30, 40, 10, 25, 60, 17, 33, 9, 30, 22, 41, 25], "code": [60, 50, 80, 22]}
FIRST = {"web": 0, "code": 1000}
SEQ_LENGTH = 8
N = 50
START = 12


class World:
    """A run that follows a plan of two datasets, one in two strata, on the disk."""

    def __init__(self, folder: Path):
        self.run, self.cache = folder / "run", folder / "cache"
        prefixes = [write_unique_tokens(folder / n, LENGTHS[n], FIRST[n]) for n in LENGTHS]
        config = gpt_config(self.cache, SEQ_LENGTH)
        self.parts = [gpt_dataset(prefix, config) for prefix in prefixes]
        self.sizes = [len(part) for part in self.parts]
        self.plan = Plan(
            datasets=tuple(DatasetIdentity(n, len(row), sum(row)) for n, row in LENGTHS.items()),
            strata=(Stratum("web/0", 0, 0.6), Stratum("web/1", 0, 0.4), Stratum("code", 1)),
            stages=(Stage(0, (3, 2)), Stage(30, (1, 1), (0.3, 0.7, 1))),
            seq_length=SEQ_LENGTH,
            seed=9,
            cuts=(Cut("a"), None),
        )
        RunPaths(self.run).folder.mkdir(parents=True)
        Identity("a" * 16, "b" * 16).save(RunPaths(self.run).identity)
        self.train(self.plan)

    def train(self, plan: Plan, start: int = 0) -> list[list[int]]:
        """Write the files of a job under a plan; return the tokens of each of its samples."""
        from megatron_tokscale.data.samples import SampleScores

        def scores_of(dataset):
            values = np.random.default_rng(dataset).random((5, self.sizes[dataset]))
            return SampleScores(*values)

        index = load_or_build_index(plan, N, self.cache, build=True)
        strata = load_or_build_strata(
            plan, self.sizes, ["w", "c"], scores_of, self.cache, build=True
        )
        plan.save(RunPaths(self.run).plan)
        files = tuple(None if file is None else str(file) for file in strata.files)
        order = PlanRecord(str(self.cache), plan.fingerprint, N, files)
        rows = tuple(DatasetRecord.from_gpt_dataset(part) for part in self.parts)
        DataRecord(rows, order, start).save(record_path(self.run))
        dataset = PlannedDataset(plan, self.parts, index, strata)
        return [read_tokens(dataset[k]) for k in range(N)]

    def keep(self, text: str, *flags: str) -> Plan:
        file, out = self.run.parent / "skip.txt", self.run.parent / "new.json"
        file.write_text(text)
        main(
            ["plan", "build", "keep", str(self.run), "--skip", str(file), "--out", str(out), *flags]
        )
        return Plan.load(out)


def documents(tokens):
    name = "code" if tokens[0] >= FIRST["code"] else "web"
    return [(name, piece.document) for piece in pieces_of(tokens, LENGTHS[name], FIRST[name])]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def refused(world, capsys, text, *flags):
    with pytest.raises(SystemExit) as ended:
        world.keep(text, *flags)
    assert ended.value.code == 2
    assert not (world.run.parent / "new.json").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_named_sample_gives_its_place_to_another_of_its_stratum(world, capsys):
    before, trace = world.train(world.plan), Trace.open(world.run)
    k = START + 3
    plan = world.keep(f"{k}\n")
    after = world.train(plan, START)
    assert [i for i in range(N) if before[i] != after[i]][:1] == [k]
    left_out = (trace.sample(k).dataset, trace.sample(k).number)
    strata = [trace.sample(i).stratum for i in range(N)]
    traced = Trace.open(world.run)
    for i in range(N):
        found = traced.sample(i)
        assert found.stratum == strata[i]
        assert i < k or (found.dataset, found.number) != left_out
    assert f"from sample {k} on: 1" in capsys.readouterr().out


def test_a_named_document_is_in_no_sample_from_the_start_on(world):
    before = world.train(world.plan)
    document = documents(next(row for row in before[START:] if row[0] < FIRST["code"]))[0]
    plan = world.keep(f"{document[0]}:{document[1]}\n", "--from-sample", str(START))
    after = world.train(plan, START)
    assert any(document in documents(row) for row in before[START:])
    assert not any(document in documents(row) for row in after[START:])
    for k in range(N):
        if k < START or document not in documents(before[k]):
            assert after[k] == before[k]
    samples = Trace.open(world.run).document(*document)
    assert samples.tolist() == [k for k in range(START) if document in documents(before[k])]


def test_skips_follow_skips(world):
    before = world.train(world.plan)
    one = world.keep(f"{START}\n")
    (world.run.parent / "new.json").unlink()
    first = world.train(one, START)
    two = world.keep(f"{START + 9}\n")
    second = world.train(two, START + 9)
    assert before[:START] == first[:START]
    assert first[: START + 9] == second[: START + 9]
    assert next(k for k in range(N) if first[k] != second[k]) == START + 9
    assert [skip.start for skip in two.skips] == [START, START + 9]


def test_decisions_up_to_the_start_stay_and_later_ones_are_left_to_the_job(world, tmp_path):
    early, late = Decision(1, START - 4, (1.0, 2.0)), Decision(9, START + 20, (2.0, 1.0))
    save_run_plan(world.plan, [early, late], world.run)
    followed = with_decisions(world.plan, [early, late])
    record = load_records(record_path(world.run))[0]
    order = replace(record.order, fingerprint=followed.fingerprint)
    replace(record, order=order).save(record_path(world.run))
    plan = world.keep(f"{START}\n")
    assert plan.decisions == (early,)
    assert resume(plan, world.run, START, 2, accept=False) == (plan, [])


def test_samples_are_left_out_of_another_plan_that_takes_over(world):
    other = replace(world.plan, stages=(Stage(0, (1, 3)),))
    path = world.run.parent / "other.json"
    other.save(path)
    plan = world.keep(f"{START}\n", "--plan", str(path))
    assert plan.stages == other.stages
    from megatron_tokscale.data.take_over import take_over

    taken = take_over(world.plan, plan, START)
    without = take_over(world.plan, other, START)
    before, after = world.train(without), world.train(taken)
    left_out = world.train(world.plan)[START]
    assert before[:START] == after[:START]
    for k in range(START, N):
        assert before[k] == after[k] or before[k] == left_out


def test_plan_show_tells_what_is_left_out(world, capsys):
    world.keep(f"{START}\n{START + 1}\n")
    capsys.readouterr()
    main(["plan", "show", str(world.run.parent / "new.json")])
    assert f"left out from sample {START} on: 2" in capsys.readouterr().out


def test_bad_names_are_refused_with_one_line(world, capsys):
    for text, flags, match in (
        (f"{N}\n", (), "not among the known samples"),
        ("prose:1\n", ("--from-sample", "3"), "reads no dataset prose"),
        ("web:99\n", ("--from-sample", "3"), "has no document 99"),
        ("web:1\n", (), "give --from-sample"),
        ("3\n", ("--from-sample", str(N)), f"the training ends with {N}"),
        (json.dumps({"samples": [3], "run_id": "c" * 16}), (), "are of run cccc"),
        ("", (), "names no sample"),
    ):
        assert match in refused(world, capsys, text, *flags)
    missing = str(world.run.parent / "missing")
    with pytest.raises(SystemExit):
        main(["plan", "build", "keep", str(world.run), "--skip", missing, "--out", missing + "2"])
    assert "cannot read" in capsys.readouterr().err


def test_a_stratum_of_which_all_is_left_out_is_refused(world, capsys):
    first, *others = (f"code:{document}\n" for document in range(len(LENGTHS["code"])))
    file, size = world.run.parent / "skip.txt", world.sizes[1]
    line = (
        f"megatron-tokscale: stratum 'code' has none of its {size} samples left without those of "
        f"{file}{{}}; expected one or more; name fewer of its samples and documents\n"
    )
    text = "".join([first, *others])
    assert refused(world, capsys, text, "--from-sample", "3") == line.format("")
    # The same in two steps, as when a run is resumed twice.
    world.train(world.keep(first, "--from-sample", "3"), 3)
    (world.run.parent / "new.json").unlink()
    capsys.readouterr()
    error = refused(world, capsys, "".join(others), "--from-sample", str(START))
    assert error == line.format(" and of earlier skips")


def test_what_is_left_out_already_is_refused(world, capsys):
    world.train(world.keep("web:4\n", "--from-sample", str(START)), START)
    (world.run.parent / "new.json").unlink()
    error = refused(world, capsys, "web:4\n", "--from-sample", str(START + 9))
    assert "leaves these samples out already" in error


def test_a_run_without_a_plan_is_refused(world, capsys):
    RunPaths(world.run).plan.unlink()
    assert "follows no plan" in refused(world, capsys, "3\n")


def test_an_existing_file_is_not_replaced(world, capsys):
    world.keep("3\n")
    with pytest.raises(SystemExit):
        world.keep("3\n")
    assert "exists" in capsys.readouterr().err

"""The check on a GPU keeps what it has done, and says what did not hold."""

import json

import pytest
from gpu_check import __main__ as command
from gpu_check import parts
from gpu_check.checks import Part, check


class Recorded:
    """Parts that note each of their runs; the one named in `stops` is interrupted."""

    def __init__(self):
        self.runs, self.stops, self.holds = [], None, True

    def part(self, name, seconds=1):
        def run(site):
            self.runs.append(name)
            yield check(f"promise of {name}", holds=self.holds, detail="a | b")
            if name == self.stops:
                raise KeyboardInterrupt

        return Part(name, seconds, run)


@pytest.fixture
def recorded(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(parts, "PARTS", tuple(recorded.part(name) for name in ("one", "two")))
    return recorded


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*words):
        folder = ["--folder", str(tmp_path / "check"), *words]
        monkeypatch.setattr("sys.argv", ["gpu_check", *folder])
        return command.main()

    return run


def test_a_check_that_was_stopped_continues_with_the_part_that_it_was_in(recorded, run):
    recorded.stops = "two"
    with pytest.raises(KeyboardInterrupt):
        run("--on-cpu")
    recorded.stops = None
    assert run("--on-cpu") == 0
    assert recorded.runs == ["one", "two", "two"]


def test_other_versions_run_all_parts_again(recorded, run, tmp_path):
    run("--on-cpu")
    path = tmp_path / "check" / "one.json"
    record = json.loads(path.read_text())
    record["identity"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    run("--on-cpu")
    assert recorded.runs == ["one", "two", "one"]


def test_a_promise_that_did_not_hold_is_in_the_table_and_in_the_exit_code(recorded, run, tmp_path):
    recorded.holds = False
    out = tmp_path / "new/table"
    assert run("--on-cpu", "--out", str(out)) == 1
    assert "| two | promise of two | FAILED | a / b |" in out.read_text()


def test_parts_can_be_named(recorded, run, capsys):
    assert run("--on-cpu", "--only", "two") == 0
    assert recorded.runs == ["two"]
    assert run("--on-cpu", "--only", "three") == 2
    assert capsys.readouterr().err == "--only three is unknown; expected parts among one, two\n"


def test_a_machine_without_a_gpu_gets_one_line(recorded, run, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run() == 2
    assert capsys.readouterr().err.startswith("no GPU is visible; expected one or more; ")
    assert recorded.runs == []


def test_no_part_starts_that_would_end_too_late(recorded, run, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(parts, "PARTS", (recorded.part("long", 600), recorded.part("short", 1)))
    out = tmp_path / "table"
    assert run("--minutes", "8", "--out", str(out)) == 0
    assert recorded.runs == ["short"]
    assert "| long | part 'long' | not run |" in out.read_text()
    assert run("--minutes", "11") == 0
    assert recorded.runs == ["short", "long"]


def test_a_cpu_proves_nothing_about_the_memory_of_a_gpu(run, tmp_path):
    out = tmp_path / "table"
    assert run("--on-cpu", "--only", "gathering", "--out", str(out)) == 0
    losses, memory = (line for line in out.read_text().splitlines() if "| gathering |" in line)
    assert "| proven |" in losses
    assert "| not run | no GPU here |" in memory


@pytest.mark.megatron
def test_a_job_that_inspects_its_probes_finds_the_mean_of_megatrons_evaluation(run, tmp_path):
    out = tmp_path / "table"
    assert run("--on-cpu", "--only", "cost", "--out", str(out)) == 0
    mean, *rest = (line for line in out.read_text().splitlines() if "| cost |" in line)
    assert "evaluate()" in mean and "| proven |" in mean
    assert len(rest) == 3 and all("| not run | no GPU here |" in line for line in rest)

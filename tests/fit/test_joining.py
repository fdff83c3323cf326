"""A fit waits for the other processes of its launcher, and for no others."""

import time

import numpy as np
import pytest
from forked import Forked
from jobs import free_port
from planted import sigmoids
from runs import probe_steps, write_run

from megatron_tokscale.cli import main

POD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}


@pytest.fixture
def run(tmp_path):
    planted = sigmoids(64, 12)
    return write_run(tmp_path / "run", probe_steps(12), planted.loss_NK)


@pytest.fixture
def environment(monkeypatch):
    """A function that sets the launcher's variables and no others."""
    for name in (*POD, "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def set_(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.mark.parametrize(
    "variables",
    [
        POD,
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "one", "WORLD_SIZE": "many", "LOCAL_RANK": ""},
        {**POD, "RANK": "1", "LOCAL_RANK": "3"},
        {"WORLD_SIZE": "2"},
    ],
)
def test_a_shell_of_a_pod_fits_alone(run, environment, capsys, variables):
    environment(variables)
    main(["fit", str(run.path)])
    assert "64 tokens" in capsys.readouterr().out
    assert run.paths.fits.exists()


@pytest.mark.parametrize("local_rank", ["3", "", "x"])
def test_a_shell_of_a_pod_prints_errors_of_the_fit(run, environment, capsys, local_rank):
    environment({**POD, "LOCAL_RANK": local_rank})
    with pytest.raises(SystemExit) as end:
        main(["fit", str(run.path / "elsewhere")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("megatron-tokscale: no run in ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "two"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "-2"),
        ("RANK", ""),
        ("RANK", "2"),
        ("RANK", "1.0"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", ""),
        ("MASTER_PORT", "99999"),
        ("MASTER_PORT", "http"),
    ],
)
@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_with_an_odd_variable_gets_one_line(
    run, environment, capsys, name, value, launched
):
    environment({**POD, "LOCAL_RANK": "0"})
    environment({name: value} | ({"TORCHELASTIC_RUN_ID": "job"} if launched else {}))
    with pytest.raises(SystemExit) as end:
        main(["fit", str(run.path), *([] if launched else ["--distributed"])])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"megatron-tokscale: {name} is {value!r}; expected ")
    assert error.count("\n") == 1
    assert not run.paths.analysis.exists()


def test_missing_variables_get_one_line(run, environment, capsys):
    environment({})
    with pytest.raises(SystemExit):
        main(["fit", str(run.path), "--distributed"])
    assert "WORLD_SIZE is ''; expected a number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.slow
def test_the_first_process_says_which_others_it_waits_for(run, forkserver, tmp_path, first):
    """Another launcher than torchrun starts the processes one after the other."""
    port = free_port()

    def start(rank):
        variables = {**POD, "RANK": str(rank), "MASTER_PORT": str(port)}
        words = ["fit", str(run.path), "--distributed"]
        return Forked(forkserver, tmp_path, main, words, variables)

    early = start(first)
    if first == 0:
        expected = "megatron-tokscale: waiting for 1 more process of this fit (WORLD_SIZE is 2)\n"
    else:
        expected = f"megatron-tokscale: waiting for process 0 of this fit at 127.0.0.1:{port}\n"
    said = []
    while not said:
        assert early.process.is_alive()
        time.sleep(0.05)
        lines = early.errors.read_text().splitlines(keepends=True)
        # All but torch's own warning that nobody answers, and a line that is being written.
        said = [line for line in lines if not line.startswith("[W") and line.endswith("\n")]
    assert said == [expected]
    ends = [process.end() for process in (early, start(1 - first))]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert sum("64 tokens" in output for _, output, _ in ends) == 1
    assert np.isfinite(run.read_losses()).all()
    assert run.paths.fits.exists()


def test_a_port_that_is_taken_gets_one_line(run, environment, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment({**POD, "MASTER_PORT": str(taken.getsockname()[1])})
        with pytest.raises(SystemExit) as end:
            main(["fit", str(run.path), "--distributed"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "megatron-tokscale: the 2 processes of this fit have not met at 127.0.0.1:" in error

"""Damage to inputs that are not in the table of `test_fuzz_verbs`.

These are the parts of a stopped fit, the journal, the files of the doctor's job, and a score's run.
"""

import re

import numpy as np
import pytest
from damages import DAMAGES, FLIPS, STRUCTURE, end_of, restore, tree
from jobs import MODEL, TRAINING
from recorded_progress import RecordedProgress
from runs import write_run
from verb_world import STEPS, Command, planted_losses

from megatron_tokscale.cli import main
from megatron_tokscale.fit import fit_run
from megatron_tokscale.probe import ProbeSet

GARBAGE = ("empty", "picture", "deep", "list", "words", "directory", "unreadable")


class StoppedError(Exception):
    """Stop of a fit between two of its blocks."""


def stop_after_two_blocks(done, total):
    if done >= 160:
        raise StoppedError


@pytest.fixture
def stopped(tmp_path):
    """A run whose fit was stopped after two of three blocks."""
    run = write_run(tmp_path / "run", STEPS, planted_losses(240))
    with pytest.raises(StoppedError):
        fit_run(run, block_tokens=80, progress=RecordedProgress(stop_after_two_blocks))
    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["part", "note"])
def test_a_resumed_fit_refuses_or_redoes_a_damaged_part(stopped, name, damage):
    path = min(stopped.paths.fit_parts.glob(f"{name}*"))
    whole = write_run(stopped.path.parent / "whole", STEPS, planted_losses(240))
    DAMAGES[damage](path)
    try:
        fit_run(stopped, block_tokens=80)
    except Exception as error:
        assert type(error).__name__ == "TokscaleError", repr(error)
        assert path.name in str(error)
        assert "\n" not in str(error)
        assert not stopped.paths.fits.exists()
    else:
        fit_run(whole, block_tokens=80)
        fits = [run.paths.fits.read_bytes() for run in (stopped, whole)]
        assert fits[0] == fits[1]


@pytest.mark.parametrize("damage", GARBAGE)
def test_no_verb_reads_the_journal(world, capsys, damage):
    restore(world)
    path = world.folder / "run/tokscale/journal.jsonl"
    path.write_text("{}\n")
    STRUCTURE[damage](path)
    try:
        for name in ("fit", "plan show", "trace"):
            assert end_of(world.commands[name], capsys)[0] == 0
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        restore(world)


@pytest.mark.parametrize("path", ["probe.safetensors", "plan.json"])
@pytest.mark.slow
def test_the_doctor_names_a_damaged_file(world, capsys, path):
    restore(world)
    flags = {**MODEL, **TRAINING, "--split": "1,0,0", "--train-iters": "10"}
    words = [word for pair in flags.items() for word in pair if word]
    words += ["--data-path", "0.5", "web", "0.5", "code", "--data-cache-path", "cache"]
    words += ["--tokscale-cpu", "--tokscale-probe-set", "probe.safetensors"]
    words += ["--tokscale-plan", "plan.json", "--tokscale-dir", "fresh"]
    words += ["--tokscale-scores-dir", "scores"]
    argv = ["doctor", "--", *words]

    def refused():
        capsys.readouterr()
        code = 0
        try:
            main(argv)
        except SystemExit as end:
            code = end.code
        lines = capsys.readouterr().out.splitlines()
        return code, [line for line in lines if line.startswith("  REFUSED")]

    code, lines = refused()
    assert not code, lines
    for damage in (*GARBAGE[:-1], "dangling", *FLIPS):
        DAMAGES[damage](world.folder / path)
        before = tree(world.folder)
        code, lines = refused()
        assert code == 2, damage
        assert any(path in line for line in lines), (damage, lines)
        assert tree(world.folder) == before
        restore(world)


SCORED = {
    "all NaN": (
        slice(None),
        "the run watched no training document of these data",
    ),
    "one probe": ((slice(None), 7), ""),
    "one token": (5, ""),
}


@pytest.mark.parametrize("kind", SCORED)
def test_score_accepts_or_refuses_losses_that_are_not_finite(world, capsys, kind):
    restore(world)
    where, refusal = SCORED[kind]
    probe_set = ProbeSet.load(world.folder / "probe.safetensors")
    loss_NK = planted_losses(probe_set.n_tokens)
    loss_NK[where] = np.nan
    write_run(world.folder / "spoiled", STEPS, loss_NK, probe_set)
    assert end_of(Command(("fit", "spoiled"), ()), capsys)[0] == 0
    before = tree(world.folder)
    argv = tuple(word if word != "run" else "spoiled" for word in world.commands["score"].argv)
    code, error = end_of(Command(argv, ()), capsys)
    if refusal:
        assert code == 2, error
        assert re.search(refusal, error.splitlines()[-1])
        assert tree(world.folder) == before
    else:
        assert code == 0, error
        made = {path.name for path in (world.folder / "new").iterdir()}
        assert made == {f"{name}.tokscale.safetensors" for name in ("web", "code")}
    restore(world)

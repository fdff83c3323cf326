"""The verb watch: its table, its page, its loop, and its refusals.

Shapes: N tokens, K probe steps.
"""

import numpy as np
import pytest
from runs import probe_steps, write_run

from megatron_tokscale.cli import main
from megatron_tokscale.cli import watch as verb
from megatron_tokscale.store import RunPaths
from megatron_tokscale.store.watching import RunWatcher

STEPS = [int(step) for step in probe_steps(32, last=1024)]


def losses(n_tokens=64):
    """Of eight tokens four are learned at step 100, one falls by 5 nats at step 800, three stay."""
    loss_NK = np.full((n_tokens, len(STEPS)), 8.0, np.float32)
    late = np.asarray(STEPS) >= 800
    for token in range(n_tokens):
        loss_NK[token] -= (
            7 * (token % 8 < 4) * (np.asarray(STEPS) >= 100) + 5 * (token % 8 == 4) * late
        )
    return loss_NK


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", STEPS, losses())


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["watch", *map(str, words)])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_the_table_has_the_shares_and_falls_of_the_datasets(run, capsys):
    main(["watch", str(run.path), "--once"])
    shown = capsys.readouterr().out
    ago = max(step for step in STEPS if step <= 512)
    assert f"step 1,024 of 1,024, {len(STEPS)} probes" in shown
    assert f"since step {ago}, an octave ago, the mean loss fell by 0.625 nats, 15.2% of" in shown
    header, overall, prose, code = (
        line.split()
        for line in shown.splitlines()
        if line.startswith(("dataset", "all", "prose", "code"))
    )
    assert header[:4] == ["dataset", "tokens", "loss", "fell"]
    assert header[-7:] == ["known", "learned", "under", "way", "to", "come", "forgotten"]
    expected = ["3.875", "0.625", "15.2%", "0.0%", "50.0%", "12.5%", "37.5%", "0.0%"]
    assert overall == ["all", "64", *expected]
    assert prose == ["prose", "32", *expected]
    assert code == ["code", "32", *expected]
    assert shown.count(" 8.00 to  3.00  ") == 8, "one token of each document fell"
    assert "[4]" in shown and "[60]" in shown, "the ids of the tokens"


def test_tokens_without_finite_losses_are_counted_in_the_terminal_and_on_the_page(tmp_path, capsys):
    def said(*lost):
        """Return the line and the page of a run with such losses, at (token, probe)."""
        loss_NK, path = losses(), tmp_path / f"{len(lost)}"
        for place, value in zip(lost, (np.nan, np.inf, np.nan), strict=False):
            loss_NK[place] = value
        run, page = write_run(path, STEPS, loss_NK), path / "page.html"
        main(["watch", str(run.path), "--once", "--page", str(page)])
        lines = [line for line in capsys.readouterr().out.splitlines() if "NaN" in line]
        assert all(line.strip() in page.read_text() for line in lines)
        assert lines or "NaN" not in page.read_text()
        return lines

    assert said() == []
    rest = (
        "losses that are NaN or infinite: the numbers that need these losses leave the tokens out"
    )
    assert said((3, -1)) == [f"  1 of 64 tokens has {rest}"]
    # At the last probe, at the first, and at one between that only the state needs.
    assert said((3, -1), (9, 0), (20, -3)) == [f"  3 of 64 tokens have {rest}"]


def test_a_run_without_a_probe_says_so(run, capsys):
    for file in run.paths.losses.iterdir():
        file.unlink()
    main(["watch", str(run.path), "--once"])
    assert "no probe yet" in capsys.readouterr().out


def test_each_new_probe_is_shown_until_the_watching_is_interrupted(
    run, tmp_path, capsys, monkeypatch
):
    page, last = tmp_path / "page.html", run.paths.losses_at(STEPS[-1])
    whole, identity = last.read_bytes(), run.paths.identity
    last.unlink()
    acts = [
        lambda: last.write_bytes(whole),  # a new probe
        lambda: None,
        lambda: identity.rename(tmp_path / "away"),  # a run that is replaced, or a file server
        lambda: None,
        lambda: (tmp_path / "away").rename(identity),
    ]
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if not acts:
            raise KeyboardInterrupt
        acts.pop(0)()

    monkeypatch.setattr(verb.time, "sleep", sleep)
    with pytest.raises(SystemExit) as end:
        main(["watch", str(run.path), "--page", str(page), "--interval", "7"])
    assert end.value.code == 130
    shown = capsys.readouterr()
    assert shown.out.count("an octave ago") == 2
    assert slept == [7.0] * 6
    assert shown.err.count("no run in") == 1, "an error that stays is said once"
    assert "looking again every 7 s" in shown.err
    html = page.read_text()
    assert '<meta http-equiv="refresh" content="7">' in html
    assert "Step 1,024 of 1,024" in html


def test_a_page_of_another_kind_is_not_replaced(run, tmp_path, capsys):
    other = tmp_path / "notes.html"
    other.write_text("<title>When tokens were learned: run</title>")
    assert "expected a new file or an earlier page" in refused(
        capsys, run.path, "--once", "--page", other
    )
    assert other.read_text() == "<title>When tokens were learned: run</title>"
    page = tmp_path / "page.html"
    for _ in range(2):
        main(["watch", str(run.path), "--once", "--page", str(page)])
    assert 'http-equiv="refresh"' not in page.read_text()


def test_what_cannot_be_watched_gets_one_line(run, tmp_path, capsys):
    assert "name the directory of a run" in refused(capsys, tmp_path)
    words = (run.path, "--once", "--interval", "0")
    assert "'0' is not a number from 1 to 86,400" in refused(capsys, *words)
    assert "cannot be written" in refused(capsys, run.path, "--page", run.paths.identity / "x.html")
    assert "cannot read tokenizer" in refused(
        capsys, run.path, "--once", "--tokenizer", run.paths.identity
    )
    assert RunPaths(run.path).losses_at(STEPS[-1]).is_file()
    assert RunWatcher(run.path).look() is not None

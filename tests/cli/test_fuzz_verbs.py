"""Every verb on damaged files, one for each file that it reads, and on odd numbers for options.

A damaged file ends a verb with exit code 2 and one line that names the file; nothing is written.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from damages import DAMAGES, FLIPS, World, end_of, restore, tree
from runs import write_run
from verb_world import STEPS, Command, commands, planted_losses

from megatron_tokscale.cli.entry import main, make_parser

SLOW = ("spectrum", "laws", "report")
"""Verbs that take a second or more: each file gets one flip, as faster verbs read it too."""

# Damage that a verb may not notice: (file, damage). Megatron's files and texts that the user writes
# have no checksum, so a flip that leaves them well-formed cannot be found.
MAY_PASS = (
    (r"\.idx", r"bit.*|byte.*"),
    (r"words\.txt", r"cut.*|bit.*"),
    (r"losses\.npy|losses\.csv", r"bit.*|byte.*|zeros|cut.*"),
    (r"manifest\.yaml", r"bit.*|byte.*|cut.*|object|list"),
    (r"parts\.json|tokenizer\.json", r"bit.*"),
    (r"\.bin", r"bit.*|byte.*|zeros|deep"),  # any bytes are token ids
    (r"curves\.csv", r"cut.*|bit.*|byte.*"),
    (r"curves\.(parquet|json)", r"bit.*|byte.*"),
    (r"cache/.*\.npy|plancache/(?!tokscale-)[^/]*\.npy", r"bit.*|byte.*"),
    (r"description\.txt", r"bit.*"),  # a path in it, which differs from machine to machine
)

# Damage whose line may name another file: the one that does not fit any more.
MAY_NAME_ANOTHER = (
    (r"words\.txt", r".*"),  # a prefix that is in it, and has no files
    (r"\.idx", r"bit.*|byte.*"),  # the .bin that it does not fit
    (r".*\.json|.*\.txt", r"bit.*"),
    (r"losses\.csv", r"bit.*|byte.*|cut.*"),
    (r"scores/.*", r"bit.*"),  # the reference run, of another name than the other scores'
    (r"\.bin", r"bit.*|byte.*|zeros"),  # a token that the run has not watched, of this name
    (r"analysis/spectrum\.npz", r"directory|dangling"),  # the run, which has no spectrum
    (r"planned/tokscale/(plan|replans)\.json", r"dangling"),  # each of the two needs the other
    (r"description\.txt", r".*"),  # nothing in the cache is then of this name
)


def listed(table, path: str, damage: str) -> bool:
    return any(re.search(f"({file})$", path) and re.fullmatch(what, damage) for file, what in table)


def fault(world: World, command: Command, path: str, damage: str, before, outcome) -> str | None:
    """Return what is wrong with the end of a verb on a damaged file, or None."""
    code, error = outcome
    if code == 0:
        return None if listed(MAY_PASS, path, damage) else "taken as it is"
    lines = error.splitlines()
    if code != 2 or not lines or not lines[-1].startswith("megatron-tokscale: "):
        return f"{code}: {error[-300:]}"
    if tree(world.folder) != before:
        return "files have changed"
    if Path(path).name not in lines[-1] and not listed(MAY_NAME_ANOTHER, path, damage):
        return f"not named: {lines[-1][:200]}"
    return None


NAMES = tuple(commands(("cache/a-dataset_index.npy",), ()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_verb_refuses_a_damaged_file(world, capsys, name):
    command = world.commands[name]
    assert end_of(command, capsys)[0] == 0, "on whole files"
    restore(world)
    faults = []
    slow = name.startswith(SLOW)
    for path in dict.fromkeys(command.reads):
        for damage, apply in DAMAGES.items():
            if slow and damage in FLIPS and damage != "byte at 0.30":
                continue
            apply(world.folder / path)
            before = tree(world.folder)
            found = fault(world, command, path, damage, before, end_of(command, capsys))
            if found:
                faults.append((path, damage, found))
            restore(world)
    assert not faults, "\n".join(" | ".join(row) for row in faults)


ODD_NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e308", "10" * 15, "1.5e", "")

# The odd numbers that are good ones: (option, value).
GOOD = {
    ("--seed", "0"),
    ("--training-seed", "0"),
    ("--sample", "0"),
    ("--until-sample", "0"),
    ("--from-sample", "0"),
    ("--eod", "0"),
    ("--min-tokens", "0"),
    ("--strength", "0"),
    ("--max-epochs", "10" * 15),
    ("--share-limit", "10" * 15),
    ("--share-limit", "1e308"),
    ("--parameters", "10" * 15),
    ("--held-out", "0"),
    ("--held-out", "10" * 15),
}
# Options of which the command may have only one, and those that another needs.
INSTEAD = {"--sequences": "--tokens", "--budget": "--tokens"}


def numeric_options(parser, path=()):
    """Yield every option that takes a number, with its verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield from numeric_options(verb, (*path, name))
        elif action.option_strings and is_numeric(action):
            yield " ".join(path), action.option_strings[0]


def is_numeric(action) -> bool:
    return callable(action.type) and action.type not in (Path, str)


OPTIONS = sorted(set(numeric_options(make_parser())))


def test_all_numeric_options_are_found():
    assert {("fit", "--time"), ("report", "--out")}.isdisjoint(OPTIONS)
    assert {("plan build frontier", "--floor"), ("probe cost", "--num-layers")} <= set(OPTIONS)
    assert len(OPTIONS) > 60


def with_option(argv: tuple[str, ...], option: str, value: str) -> list[str]:
    """Return the command with this value of the option instead of any other."""
    words = list(argv)
    for name in {option, INSTEAD.get(option, option)} & set(words):
        del words[words.index(name) : words.index(name) + 2]
    return [*words, f"{option}={value}"]


@pytest.mark.parametrize(("verb", "option"), OPTIONS)
def test_an_odd_number_gets_one_line(world, capsys, verb, option):
    name = verb if verb in world.commands else next(n for n in NAMES if n.startswith(verb))
    restore(world)
    before = tree(world.folder)
    for value in ODD_NUMBERS:
        command = Command(tuple(with_option(world.commands[name].argv, option, value)), ())
        code, error = end_of(command, capsys)
        if (option, value) in GOOD:
            assert code in (0, 2), (value, error)
            restore(world)
            before = tree(world.folder)
            continue
        assert code == 2, (value, error)
        assert error.startswith("megatron-tokscale: "), (value, error)
        assert error.count("\n") == 1, (value, error)
        assert option in error, (value, error)
        assert tree(world.folder) == before


@dataclass(frozen=True)
class Spoiled:
    """Expected results of verbs on losses that are constant or not finite.

    Attributes:
        name: class that holds most of the tokens.
        least: smallest expected share of the tokens in it.
        n_losses: number of losses at the fitted probes that are not finite.
        n_tokens: number of tokens that have such a loss.
        left_out: steps of the probes that have no finite loss.
        refusal: line of `spectrum` if such losses have no spectrum.
    """

    name: str
    least: float
    n_losses: int = 0
    n_tokens: int = 0
    left_out: tuple[int, ...] = ()
    refusal: str = ""

    def losses(self, kind: str) -> np.ndarray:
        loss_NK = planted_losses(240)
        if kind in CONSTANT:
            loss_NK[:] = CONSTANT[kind]
        else:
            loss_NK[HOLES[kind]] = np.nan
        return loss_NK


CONSTANT = {"all NaN": np.nan, "all infinite": np.inf, "still": 3.0, "zero": 0.0}
EVERY = slice(None)
HOLES = {
    "one probe": (EVERY, 7),
    "last probe": (EVERY, -1),
    "two probes": (EVERY, [0, 9]),
    "one token": 5,
    "a few tokens of a probe": (slice(12), 3),
    "all tokens but one of a probe": (slice(1, None), 4),
}
NO_LOSSES = "has five finite losses at its 17 probes, so there is nothing to analyse"
NO_CHANGE = "the mean loss of .* is the same at all probes; a spectrum needs one that changes"
ALL = 240 * len(STEPS)
SPOILED = {
    "all NaN": Spoiled("unfitted", 1.0, ALL, 240, refusal=NO_LOSSES),
    "all infinite": Spoiled("unfitted", 1.0, ALL, 240, refusal=NO_LOSSES),
    "still": Spoiled("flat-unlearned", 1.0, refusal=NO_CHANGE),
    "zero": Spoiled("flat-known", 1.0, refusal=NO_CHANGE),
    "one probe": Spoiled("falling", 0.9, left_out=(int(STEPS[7]),)),
    "last probe": Spoiled("falling", 0.9, left_out=(int(STEPS[-1]),)),
    "two probes": Spoiled("falling", 0.9, left_out=(int(STEPS[0]), int(STEPS[9]))),
    "one token": Spoiled("falling", 0.9, len(STEPS), 1),
    "a few tokens of a probe": Spoiled("falling", 0.9, 12, 12),
    "all tokens but one of a probe": Spoiled("falling", 0.9, 239, 239),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.slow
def test_losses_that_are_not_finite_or_constant_are_fitted_and_counted(tmp_path, capsys, kind):
    expected = SPOILED[kind]
    loss_NK = expected.losses(kind)
    run = write_run(tmp_path / "run", STEPS, loss_NK)
    main(["fit", str(run.path)])
    printed = capsys.readouterr()
    summary = json.loads(run.paths.fit.read_text())
    assert summary["classes"][expected.name]["share"] >= expected.least
    assert summary["left_out"] == list(expected.left_out)
    assert summary["n_probes"] == len(STEPS) - len(expected.left_out)
    assert summary["non_finite"]["losses"] == expected.n_losses
    assert summary["non_finite"]["tokens"] == expected.n_tokens
    counted = f"{expected.n_losses:,} losses of {expected.n_tokens:,} tokens are NaN or infinite"
    assert (counted in printed.out) == (expected.n_losses > 0)
    steps = ", ".join(map(str, expected.left_out))
    told = f" of {run.path} at step"
    assert (told in printed.err) == bool(expected.left_out)
    assert not expected.left_out or f" {steps} ha" in printed.err
    for verb in ("spectrum", "laws", "report"):
        before = tree(run.path)
        options = () if verb == "report" else ("--resamples", "2")
        code, error = end_of(Command((verb, str(run.path), *options), ()), capsys)
        if expected.refusal:
            assert code == 2, error
            assert tree(run.path) == before
            missing = r"spectrum\.npz is not there; run `megatron-tokscale spectrum .*` first"
            what = expected.refusal if verb == "spectrum" else missing
            assert re.fullmatch(f"megatron-tokscale: .*{what}.*", error.splitlines()[-1])
        else:
            assert code == 0, error
    if not expected.refusal:
        kept_K = np.setdiff1d(np.arange(len(STEPS)), np.searchsorted(STEPS, expected.left_out))
        kept_NK = loss_NK[:, kept_K]
        whole_N = np.isfinite(kept_NK).all(axis=1)
        assert whole_N.sum() == 240 - expected.n_tokens
        arrays = np.load(run.paths.spectrum_arrays)
        np.testing.assert_array_equal(arrays["step_K"], STEPS[kept_K])
        mean_K = kept_NK[whole_N].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(arrays["mean_loss_K"], mean_K, rtol=1e-6)
        laws = json.loads(run.paths.laws.read_text())
        assert laws["fit"]["steps"] == [*STEPS[kept_K]]
        assert run.paths.report.stat().st_size > 10_000

"""The command line itself: its help, its defaults, and the cost of importing it."""

import argparse
import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest

from megatron_tokscale.cli.entry import main, make_parser
from megatron_tokscale.cli.parsing import HelpWithDefaults
from megatron_tokscale.core.seed import DEFAULT_SEED

# Flags of which one or none is given, so that none has a default of its own.
ONE_OF_SEVERAL = {
    *("--data-path", "--data-args-path", "--per-split-data-args-path"),
    *(f"--{part}-data-path" for part in ("train", "valid", "test")),
    "--probe-set",
}


def all_verbs(parser, path=()):
    """Every parser that has no verbs below it, by the words of its verb."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield " ".join(path), parser
    for action in below:
        for name, verb in action.choices.items():
            yield from all_verbs(verb, (*path, name))


VERBS = dict(all_verbs(make_parser()))


def options(verb):
    return [action for action in VERBS[verb]._actions if action.option_strings]


def default_of(verb, option):
    return VERBS[verb].get_default(option.removeprefix("--").replace("-", "_"))


POLICIES = ("fall", "target", "frontier", "dataset", "manual")


def test_every_verb_is_there():
    assert set(VERBS) == {
        *(f"probe {verb}" for verb in ("build", "show", "cost")),
        *("watch", "fit", "spectrum", "laws", "compare", "forecast", "score"),
        *(f"plan build {policy}" for policy in (*POLICIES, "keep")),
        *("plan prepare", "plan show", "trace", "report", "import", "export", "demo", "doctor"),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_has_a_help_text(verb):
    assert not [action.dest for action in VERBS[verb]._actions if not action.help]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_tells_its_default_or_that_it_is_required(verb):
    show = HelpWithDefaults("x")._get_help_string
    silent = [
        action.option_strings[0]
        for action in options(verb)
        if action.nargs != 0  # a switch
        and action.option_strings[0] not in ONE_OF_SEVERAL
        and not any(word in show(action) for word in ("default:", "(required)", "instead of"))
    ]
    assert not silent


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_printed_and_shows_no_default_that_is_none(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "default: None" not in shown
    assert "default: False" not in shown
    assert "default: []" not in shown
    assert not re.search(r"(?<!\d)%", shown)


def test_a_required_option_and_a_default_are_shown(capsys):
    with pytest.raises(SystemExit):
        main(["probe", "cost", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--global-batch-size N sequences of a training step (required)" in shown
    assert "(--train-iters or --train-samples is required)" in shown
    assert "--moe-router-topk N experts that a token is routed to (default: 2)" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_all_verbs_have_one_seed(verb):
    assert VERBS[verb].get_default("seed") in (None, DEFAULT_SEED)


def test_defaults_are_those_of_the_functions_called():
    from megatron_tokscale.laws import laws_run
    from megatron_tokscale.probe import DEFAULT_SCHEDULE
    from megatron_tokscale.probe.cost import GptShape, TrainingLength
    from megatron_tokscale.reweight import (
        ByFall,
        ByTarget,
        CutSettings,
        Frontier,
        GainSettings,
        Guards,
        Manual,
        plan_run,
    )
    from megatron_tokscale.reweight.scoring import score_run
    from megatron_tokscale.spectrum import axis_run, spectrum_run, transfer_run

    schedule = next(
        action for action in options("probe cost") if action.dest == "tokscale_probe_schedule"
    )
    assert f"(default: {DEFAULT_SCHEDULE})" in schedule.help
    for kind in (GptShape, TrainingLength):
        for field in fields(kind):
            if field.default is not MISSING:
                assert default_of("probe cost", field.name) == field.default, field.name
    for policy in POLICIES:
        for field in fields(Guards):
            assert default_of(f"plan build {policy}", field.name) == field.default
    flags = {"unit": "strata", "sd_points": "seed_sd"}
    for field in (*fields(CutSettings), *fields(GainSettings)):
        name = flags.get(field.name, field.name)
        assert default_of("plan build frontier", name) == field.default, name
    assert default_of("plan build manual", "interpolation") == Manual({}).interpolation
    names = {"stages": "n_stages", "resamples": "n_resamples"}
    for verb, function, own in (
        ("plan build fall", ByFall, ("strength", "share_limit", "stages")),
        ("plan build target", ByTarget, ("top", "share_limit", "stages")),
        ("plan build frontier", Frontier, ("window", "strength", "stages", "move_shares")),
        ("plan build dataset", plan_run, ("window", "strength", "stages")),
        ("score", score_run, ("min_tokens", "predict", "force")),
        ("spectrum", spectrum_run, ("resamples",)),
        ("spectrum", transfer_run, ("resamples",)),
        ("spectrum", axis_run, ("resamples", "size")),
        ("laws", laws_run, ("resamples",)),
    ):
        parameters = inspect.signature(function).parameters
        for name in own:
            expected = parameters[names.get(name, name)].default
            assert default_of(verb, name) == expected, (verb, function.__name__, name)


HEAVY = ("numpy", "scipy", "torch", "numba", "pyarrow", "safetensors", "tqdm", "megatron")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["plan", "build", "dataset", "-h"]])
def test_help_loads_no_heavy_package(words):
    script = (
        "import sys\n"
        "from megatron_tokscale.cli import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as end:\n"
        f"    sys.exit(' '.join(set(sys.modules) & set({HEAVY!r})) or end.code)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout

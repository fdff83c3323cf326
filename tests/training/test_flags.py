"""The flags are those of the README, and leave nothing but plain values in Megatron's arguments."""

from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.training.config import TokscaleConfig, add_arguments, config_from_args

README = Path(__file__).parents[2] / "README.md"
FLAGS = ["--" + field.name.replace("_", "-") for field in fields(TokscaleConfig)]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_in_the_readme(flag):
    assert f"| `{flag}" in README.read_text()


def test_flags_are_parsed_into_plain_values():
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--tokscale-probe-set", "p", "--tokscale-verify-isolation"])
    assert {type(value) for value in vars(args).values()} <= {str, bool, float, type(None)}
    assert config_from_args(args) == TokscaleConfig(
        tokscale_probe_set="p", tokscale_verify_isolation=True
    )
    assert "watch" in parser.format_help()


ALONE = {
    "--tokscale-schedule linear:5": "--tokscale-probe-set",
    "--tokscale-replan every=9": "--tokscale-probe-set",
    "--tokscale-replan every=9 --tokscale-probe-set p": "--tokscale-plan",
    "--tokscale-scores folder": "--tokscale-plan",
    "--tokscale-accept-plan": "--tokscale-plan",
}


@pytest.mark.parametrize("words", ALONE)
def test_a_flag_that_needs_another_says_which(words):
    parser = ArgumentParser()
    add_arguments(parser)
    flag = words.split()[0]
    with pytest.raises(TokscaleError, match=f"{flag} does nothing without {ALONE[words]}; give"):
        config_from_args(parser.parse_args(words.split()))

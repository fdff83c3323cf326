"""The flags are those of the reference, and leave only plain values in Megatron's arguments."""

from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training.config import TokscaleConfig, add_arguments, config_from_args
from megatron_tokscale.training.settings import JobSettings

REFERENCE = Path(__file__).parents[2] / "docs/reference/flags.md"
FLAGS = ["--" + field.name.replace("_", "-") for field in fields(TokscaleConfig)]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_in_the_reference(flag):
    assert f"| `{flag}" in REFERENCE.read_text()


def test_flags_are_parsed_into_plain_values():
    """Megatron pickles them into checkpoints."""
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--tokscale-probe-set", "p", "q", "--tokscale-verify-isolation"])
    assert vars(args).pop("tokscale_probe_set") == ["p", "q"]
    assert {type(value) for value in vars(args).values()} <= {str, bool, float, type(None)}
    args.tokscale_probe_set = ["p", "q"]
    assert config_from_args(args) == TokscaleConfig(
        tokscale_probe_set=["p", "q"], tokscale_verify_isolation=True
    )
    assert "watch" in parser.format_help()


def test_a_callbacks_user_may_give_one_probe_set_as_a_string():
    assert TokscaleConfig(tokscale_probe_set="p").tokscale_probe_set == ["p"]


def test_metadata_names_flags():
    names = {field.name.removeprefix("tokscale_") for field in fields(TokscaleConfig)}
    for field in fields(TokscaleConfig):
        assert field.metadata.keys() <= {"needs", "needs_one_of", "not_in_a_replay"}
        assert {*field.metadata.get("needs", ()), *field.metadata.get("needs_one_of", ())} <= names


ALONE = {
    "--tokscale-probe-schedule linear:5": "--tokscale-probe-set",
    "--tokscale-sample-losses": "--tokscale-probe-set",
    "--tokscale-replay-step 9": "--tokscale-replay",
    "--tokscale-replan-interval 9": "--tokscale-probe-set",
    "--tokscale-replan-interval 9 --tokscale-probe-set p": "--tokscale-plan",
    "--tokscale-scores-dir folder": "--tokscale-plan",
    "--tokscale-override-plan": "--tokscale-plan",
}


@pytest.mark.parametrize("words", ALONE)
def test_a_flag_that_needs_another_says_which(words):
    parser = ArgumentParser()
    add_arguments(parser)
    flag = words.split()[0]
    with pytest.raises(TokscaleError, match=f"{flag} does nothing without {ALONE[words]}; give"):
        config_from_args(parser.parse_args(words.split()))


IN_VAIN = {
    "--tokscale-fall-threshold nan": "--tokscale-fall-threshold is nan; expected nats, 0 or more",
    "--tokscale-fall-threshold -0.2": "--tokscale-fall-threshold is -0.2; expected nats",
    "--tokscale-fall-threshold inf": "--tokscale-fall-threshold is inf; expected nats",
    "--tokscale-replay r --tokscale-plan p": "trains nothing; drop --tokscale-plan",
    "--tokscale-replay r --tokscale-verify-isolation": "drop --tokscale-verify-isolation",
    "--tokscale-replay r --tokscale-probe-at-exit": "drop --tokscale-probe-at-exit",
    "--tokscale-replay r --tokscale-sample-losses": "drop --tokscale-sample-losses",
    "--tokscale-replay r --tokscale-replay-step 0": "--tokscale-replay-step is 0; expected the",
    "--tokscale-plan=": "--tokscale-plan is empty; expected a value",
    "--tokscale-dir=": "--tokscale-dir is empty; expected a value",
    "--tokscale-probe-schedule=": "--tokscale-probe-schedule is empty; expected a value",
}


def parse(words):
    parser = ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--save")
    parser.add_argument("--data-cache-path")
    return parser.parse_args(words)


def schedule(words):
    return JobSettings.from_args(parse(words)).probe.schedule


@pytest.mark.parametrize("words", IN_VAIN)
def test_a_flag_that_does_nothing_is_refused(words):
    words, reason = [*words.split(), "--tokscale-probe-set", "p"], IN_VAIN[words]
    with pytest.raises(TokscaleError, match=reason):
        config_from_args(parse(words))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tokscale-dir", "run"], "--tokscale-dir does nothing without --tokscale-probe-set or"),
        (["--tokscale-probe-set", ""], "--tokscale-probe-set is empty"),
        (["--tokscale-probe-set", "p", ""], "--tokscale-probe-set is empty"),
    ],
)
def test_a_flag_in_a_job_without_probe_and_plan_is_refused(words, reason):
    with pytest.raises(TokscaleError, match=reason):
        config_from_args(parse(words))


@pytest.mark.parametrize(
    "files", [["a/p.safetensors", "p"], ["x", "q", "q"], ["q.safetensors", "r", "q.safetensors"]]
)
def test_probe_sets_have_names_of_their_own(files):
    words = ["--tokscale-probe-set", *files, "--save", "run"]
    same = f"{files[0]} and p" if files[1] == "p" else r"q(\.safetensors)? and q"
    with pytest.raises(TokscaleError, match=f"{same}.*; expected files of different names.*drop"):
        JobSettings.from_args(parse(words)).check()


def test_a_further_probe_set_has_a_run_directory_of_its_own():
    words = ["--tokscale-probe-set", "a/one.safetensors", "b/two.v2.safetensors", "--save", "run"]
    settings = JobSettings.from_args(parse(words))
    settings.check()
    one, two = settings.probe.probe_sets
    assert (str(one.path), str(one.directory(settings.run))) == ("a/one.safetensors", "run")
    assert str(two.path) == "b/two.v2.safetensors"
    assert str(two.directory(settings.run)) == "run/probe-sets/two.v2"


@pytest.mark.parametrize("where", ["msc://bucket/run", "s3://bucket/run"])
def test_losses_are_not_written_to_a_local_folder_named_after_a_bucket(where):
    words = ["--tokscale-probe-set", "p", "--save", where]
    with pytest.raises(TokscaleError, match=r"in object storage.*give --tokscale-dir on one that"):
        JobSettings.from_args(parse(words)).check()
    JobSettings.from_args(parse([*words, "--tokscale-dir", "run"])).check()


def test_a_replay_takes_no_schedule_of_tokens():
    words = ["--tokscale-probe-set", "p", "--tokscale-replay", "saved", "--tokscale-probe-schedule"]
    with pytest.raises(TokscaleError, match="counts tokens, and --tokscale-replay chooses"):
        schedule([*words, "tokens:linear:2e9+last"])
    assert schedule([*words, "list:3+last"]).spec == "list:3+last"


def test_a_schedule_of_checkpoints_needs_checkpoints():
    words = ["--tokscale-probe-set", "p", "--tokscale-probe-schedule", "checkpoints"]
    with pytest.raises(TokscaleError, match="gives no probe, as the job saves none"):
        schedule(words)
    for more in (["--save", "s"], ["--tokscale-replay", "r"]):
        assert schedule([*words, *more]).checkpoints

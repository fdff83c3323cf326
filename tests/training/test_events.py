"""The events of a job are those of the table, and parts hear of them in order."""

import re
import sys
from argparse import Namespace

import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training import events
from megatron_tokscale.training.calls import Call
from megatron_tokscale.training.events import BuiltDatasets, JobPart, closing
from megatron_tokscale.training.plugin import HOOKS, Plugin, planned

TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in events.__doc__.splitlines()
    if line.startswith("| ") and not line.startswith("| event")
]


def test_the_table_has_every_event_of_a_part():
    named = {re.sub(r"[`()]", "", row[0]) for row in TABLE}
    methods = {name for name in vars(JobPart) if not name.startswith("_")}
    assert named - {"parts are made"} == methods


def test_the_table_and_the_hooks_name_the_same_functions():
    by_event = {re.sub(r"[`()]", "", row[0]): set(re.findall(r"`(\w+)`", row[2])) for row in TABLE}
    hooked: dict[str, set[str]] = {}
    for hook in HOOKS:
        for event in hook.event.split(", "):
            hooked.setdefault(event, set()).add(hook.name)
    assert hooked.pop("flags") == {"add_megatron_arguments"}
    assert hooked == by_event


class Noting(JobPart):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def on_step(self, state):
        self.log.append((self.name, "on_step", state.step, state.consumed_samples))

    def on_data(self, state, built):
        return built.with_train(f"{built.train}{self.name}")

    def close(self):
        self.log.append((self.name, "close"))


@pytest.fixture
def plugin(monkeypatch):
    from megatron.training import global_vars

    args = Namespace(iteration=4, consumed_train_samples=32)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    found = Plugin()
    log = []
    found._parts = [Noting("a", log), Noting("b", log)]
    return found, log


def test_arguments_are_known_by_position_and_by_name(plugin):
    found, log = plugin
    hook = next(hook for hook in HOOKS if hook.event == "on_step")

    def after_step(*args, **kwargs):
        return "result"

    step = hook._wrapped(found, after_step)
    assert step("model", "optimizer", "scheduler", 5, "profiler") == "result"
    assert step("model", "optimizer", opt_param_scheduler="scheduler", iteration=6) == "result"
    assert log == [(name, "on_step", step, 32) for step in (5, 6) for name in "ab"]


def test_each_part_may_replace_the_training_dataset(plugin):
    found, _ = plugin

    def provide(n_samples, vp_stage=None):
        return "train", "valid", "test"

    provide.is_distributed = True
    replaced = planned(provide, found._parts, lambda: found._state({}))
    assert replaced([8, 1, 1], vp_stage=1) == ("trainab", "valid", "test")
    assert replaced.is_distributed


def test_a_provider_that_returns_nothing_is_let_through():
    assert BuiltDatasets(None, (8, 1, 1), is_distributed=True).train is None


def test_a_call_takes_another_value_for_an_argument():
    def join(*args, **kwargs):
        return (*args, *kwargs.items())

    call = Call(join, ("first", "second"), (1, 2, 3), {"last": 4})
    assert call.arguments == {"first": 1, "second": 2, "last": 4}
    assert call.with_argument("second", 9).result() == (1, 9, 3, ("last", 4))
    assert call.with_argument("last", 9).result() == (1, 2, 3, ("last", 9))


def test_parts_are_closed_from_the_last_to_the_first_and_each_error_is_told(capsys):
    log = []

    class Failing(Noting):
        def close(self):
            super().close()
            raise TokscaleError(f"{self.name} is lost")

    parts = [Failing("a", log), Noting("b", log), Failing("c", log)]
    with pytest.raises(TokscaleError, match="c is lost"), closing(parts):
        pass
    assert [name for name, _ in log] == ["c", "b", "a"]
    with pytest.raises(ZeroDivisionError), closing(parts):
        raise ZeroDivisionError
    assert [line.split()[-3] for line in capsys.readouterr().err.splitlines()] == ["c", "a"]
    log.clear()
    with closing(parts, on_success=False):
        pass
    assert log == []
    with pytest.raises(SystemExit), closing([Noting("a", log)], on_success=False):
        sys.exit(0)
    assert log == [("a", "close")]

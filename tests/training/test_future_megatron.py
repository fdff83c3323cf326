"""The plugin in a Megatron after 0.19, by the names and signatures that its changes announce."""

from argparse import Namespace
from dataclasses import replace

import pytest
from future_megatron import FutureMegatron, Recorder, TrainState, container

from megatron_tokscale import pretrain
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.doctor.installed import hooks
from megatron_tokscale.training import parts, upstream
from megatron_tokscale.training.plugin import HOOKS, Plugin
from megatron_tokscale.training.support import check_plan


def forward_step(data_iterator, model):
    raise AssertionError("nothing is trained")


def provider(n_samples, vp_stage=None):
    return "train", "valid", "test"


@pytest.fixture(params=[True, False], ids=["context", "arguments"])
def job(request, monkeypatch):
    recorder = Recorder()
    found = FutureMegatron(Namespace(), takes_context=request.param)
    found.install(monkeypatch)
    monkeypatch.setattr(parts, "parts_of_job", lambda args, given: [recorder])
    Plugin().install()
    return found, recorder


def run(callbacks=None, config=None):
    from megatron.training import training

    training.pretrain(config, provider, "type", forward_step, callbacks=callbacks)


def test_every_event_has_the_state_of_the_training(job):
    _, recorder = job
    run()
    training = (["chunk"], "optimizer", "scheduler", forward_step)
    expected = [("on_setup", 0, 0, *training), ("on_data", 0, "train")]
    expected += [("on_train_start", 0, 0, *training)]
    for step in (1, 2):
        state = (step, 8 * step, *training)
        expected += [("on_log", float(step)), ("on_step", *state)]
        expected += [("before_checkpoint", *state), ("after_checkpoint", *state)]
    expected += [("on_exit", 2, 16, *training), ("on_train_end", 2, 16, *training)]
    assert recorder.heard == expected


def test_callbacks_and_their_manager_pass_through(job):
    found, _ = job
    given = object()
    run(callbacks=[given])
    calls = dict(found.calls)
    assert calls["callbacks"] == [given]
    assert calls["train"][-1] == [given]
    if found.takes_context:
        context, p2p, groups, _ = calls["train"]
        assert (context.forward_step_func, p2p, groups) == (forward_step, "p2p", "groups")
        assert (context.train_data_iterator, context.valid_data_iterator) == ("train", "valid")


def test_a_loader_setting_in_the_dataset_config_is_refused_like_a_flag(job, monkeypatch):
    found, _ = job

    def made(args, given):
        check_plan(args)
        return []

    monkeypatch.setattr(parts, "parts_of_job", made)
    found.args.seq_length = 32
    with pytest.raises(SystemExit) as ending:
        run(config=container(dataloader_type="cyclic", num_workers=3))
    assert isinstance(ending.value.__cause__, TokscaleError)
    assert "needs --dataloader-type single, not cyclic" in str(ending.value.__cause__)
    assert found.args.num_workers == 3
    run(config=container(dataloader_type="single", num_workers=0))


def test_counters_are_read_and_reset_where_megatron_keeps_them(monkeypatch):
    from megatron.training import global_vars

    old = Namespace(iteration=4, consumed_train_samples=32, consumed_valid_samples=8)
    assert (upstream.steps_taken(old), upstream.samples_consumed(old)) == (4, 32)
    upstream.forget_samples(old)
    assert (old.consumed_train_samples, old.consumed_valid_samples) == (0, 0)
    state = TrainState(step=5, consumed_train_samples=40, consumed_valid_samples=8)
    monkeypatch.setattr(global_vars, "get_train_state", lambda: state, raising=False)
    assert (upstream.steps_taken(old), upstream.samples_consumed(old)) == (5, 40)
    upstream.forget_samples(Namespace())
    assert (state.consumed_train_samples, state.consumed_valid_samples) == (0, 0)


def test_the_doctor_says_what_is_found_in_a_newer_way(job, monkeypatch):
    from megatron.training import global_vars

    found, _ = job
    new = {line.text: line.state for line in hooks(is_needed=True)}
    way = "in its context" if found.takes_context else "by name"
    trains = (text for text in new if text.startswith("megatron.training.training.train: "))
    assert next(trains).endswith(f"(arguments {way})")
    assert new["in the train state"] == "counters"
    assert new["of pretrain, as megatron_tokscale.callback"] == "callbacks"
    assert "made by the script" not in new
    monkeypatch.setattr(global_vars, "initialize_runtime_services", print, raising=False)
    assert "made by the script" in {line.text for line in hooks(is_needed=True)}


@pytest.mark.parametrize("is_new", [True, False])
def test_the_own_script_makes_the_runtime_services_before_it_trains(monkeypatch, is_new):
    import megatron.training
    from megatron.training import argument_utils, arguments, global_vars

    args, order = Namespace(), []

    def keep(name, value=None):
        def call(*given, **named):
            order.append(name)
            return value

        return call

    monkeypatch.setattr(arguments, "parse_and_validate_args", keep("flags", args))
    monkeypatch.setattr(argument_utils, "pretrain_cfg_container_from_args", keep("config"))

    def start(cfg_container, **flow):
        order.append("pretrain")

    monkeypatch.setattr(megatron.training, "pretrain", start)
    if is_new:
        made = keep("services")
        monkeypatch.setattr(global_vars, "initialize_runtime_services", made, raising=False)
    pretrain.train()
    services = ["services"] if is_new else []
    assert order == ["flags", "config", *services, "pretrain"]


def test_arguments_of_a_function_without_names_are_known_by_the_table():
    """Another tool may have wrapped Megatron's function, and have lost its signature."""
    heard = []

    def around(plugin, call):
        heard.append(call.arguments)

    hook = replace(next(hook for hook in HOOKS if hook.name == "train"), wrap=around)
    hook._wrapped(Plugin(), lambda *args, **kwargs: None)("step", "model")
    hook._wrapped(Plugin(), lambda context, opt_param_scheduler: None)("all", "scheduler")
    assert heard == [
        {"forward_step_func": "step", "model": "model"},
        {"context": "all", "opt_param_scheduler": "scheduler"},
    ]

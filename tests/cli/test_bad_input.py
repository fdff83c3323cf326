"""Bad input of every verb: one line that says what to do, exit code 2, nothing written."""

import pytest
from jobs import VOCAB_SIZE
from verb_world import build_plan, data_flags

from megatron_tokscale.cli import main
from megatron_tokscale.store.losses import losses_name


def few_probes(run, corpus):
    for step in range(4, 2000):
        (run / "tokscale/losses" / losses_name(step)).unlink(missing_ok=True)
    return ["fit", str(run)]


def truncated_losses(run, corpus):
    path = run / "tokscale/losses" / losses_name(16)
    path.write_bytes(path.read_bytes()[:-1])
    return ["fit", str(run)]


def damaged_losses(run, corpus):
    path = run / "tokscale/losses" / losses_name(16)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    return ["fit", str(run)]


def no_run(run, corpus):
    return ["fit", str(run / "elsewhere")]


def no_fit(run, corpus):
    return ["spectrum", str(run)]


def no_analysis(run, corpus):
    return ["report", str(run)]


def out_exists(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(corpus.probe_set)]
    return ["probe", "build", *data_flags(corpus), *flags]


def two_ways_to_the_data(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    data = [*data_flags(corpus), "--valid-data-path", corpus.prefixes[0]]
    return ["probe", "build", *data, *flags]


def split_of_per_split_data(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    data = ["--valid-data-path", corpus.prefixes[0], "--split", "9,1", "--seq-length", "8"]
    return ["probe", "build", *data, *flags]


def training_without_a_budget(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    return ["probe", "build", *data_flags(corpus), *flags, "--train-iters", "10"]


def budget_without_a_training(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(run / "probe.safetensors")]
    return ["probe", "build", *data_flags(corpus), *flags, "--budget", "0.01"]


def cost_of_another_length(run, corpus):
    model = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
    sizes = ["--vocab-size", str(VOCAB_SIZE), "--seq-length", "77"]
    job = ["--global-batch-size", "8", "--train-iters", "1000"]
    return ["probe", "cost", "--probe-set", str(corpus.probe_set), *model, *sizes, *job]


def plan_without_scores(run, corpus):
    return build_plan("frontier", corpus, run / "plan.json")


def plan_without_run(run, corpus):
    return build_plan("dataset", corpus, run / "plan.json")


def plan_without_policy(run, corpus):
    return ["plan", "build"]


def plan_of_an_unknown_policy(run, corpus):
    return build_plan("clairvoyant", corpus, run / "plan.json")


def run_of_a_policy_without_one(run, corpus):
    return build_plan("frontier", corpus, run / "plan.json", "--run", str(run))


def control_that_the_policy_lacks(run, corpus):
    flags = ["--run", str(run), "--control", "easy-first"]
    return build_plan("dataset", corpus, run / "plan.json", *flags)


def control_of_a_plan_by_hand(run, corpus):
    flags = ["--weights", "0:1,1", "--control", "frequency"]
    return build_plan("manual", corpus, run / "plan.json", *flags)


def control_of_a_missing_run(run, corpus):
    flags = ["--run", str(run / "elsewhere"), "--control", "uniform"]
    return build_plan("dataset", corpus, run / "plan.json", *flags)


def plan_by_hand_without_weights(run, corpus):
    return build_plan("manual", corpus, run / "plan.json")


def weights_of_another_policy(run, corpus):
    return build_plan("frontier", corpus, run / "plan.json", "--weights", "0:1,1")


def plan_of_zero_weights(run, corpus):
    flags = ["--weights", "0:1,1", "100:0,0"]
    return build_plan("manual", corpus, run / "plan.json", *flags)


def plan_of_too_many_epochs(run, corpus):
    flags = ["--weights", "0:1,1", "--max-epochs", "0.5"]
    return build_plan("manual", corpus, run / "plan.json", *flags)


def plan_that_exists(run, corpus):
    flags = ["--control", "uniform"]
    return build_plan("frontier", corpus, run / "tokscale/run.json", *flags)


def plan_in_the_place_of_a_folder(run, corpus):
    return build_plan("frontier", corpus, run, "--control", "uniform")


def plan_under_a_file(run, corpus):
    out = run / "tokscale/run.json/plan.json"
    return build_plan("frontier", corpus, out, "--control", "uniform")


def probe_set_under_a_file(run, corpus):
    out = run / "tokscale/run.json/probe.safetensors"
    flags = ["--vocab-size", str(VOCAB_SIZE), "--out", str(out)]
    return ["probe", "build", *data_flags(corpus), *flags]


def two_weights_of_one_sample(run, corpus):
    flags = ["--weights", "0:1,1", "100:1,2", "100:2,1"]
    return build_plan("manual", corpus, run / "plan.json", *flags)


def weights_without_a_finite_sum(run, corpus):
    return build_plan("manual", corpus, run / "plan.json", "--weights", "0:1e308,1e308")


def more_probes_than_a_list_holds(run, corpus):
    model = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
    training = ["--global-batch-size", "8", "--train-iters", str(2**63 - 1)]
    sizes = ["--tokens", "1000", "--seq-length", "8", "--vocab-size", "16"]
    schedule = ["--tokscale-probe-schedule", "linear:1"]
    return ["probe", "cost", *model, *training, *sizes, *schedule]


def unreadable_weights(run, corpus):
    return build_plan("manual", corpus, run / "plan.json", "--weights", "0:a,b")


def flag_that_the_verb_lacks(run, corpus):
    return [*build_plan("frontier", corpus, run / "plan.json"), "--bogus", "3"]


def folder_for_a_probe_set(run, corpus):
    return ["probe", "show", str(run)]


def run_without_a_plan(run, corpus):
    return ["plan", "show", str(run)]


def trace_of_a_run_without_a_record(run, corpus):
    return ["trace", str(run), "--sample", "0"]


def unseen_by_a_run_without_a_record(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--part", "train", "--unseen-by", str(run)]
    return ["probe", "build", *data_flags(corpus), *flags, "--out", str(run / "new.safetensors")]


def unseen_by_for_held_out_documents(run, corpus):
    flags = ["--vocab-size", str(VOCAB_SIZE), "--unseen-by", str(run)]
    return ["probe", "build", *data_flags(corpus), *flags, "--out", str(run / "new.safetensors")]


def scores_of_held_out_documents(run, corpus):
    return ["score", str(run), "--data-path", *corpus.data_path, "--out", str(run / "scores")]


BAD_INPUT = {
    unseen_by_a_run_without_a_record: "data.json is not there, so it is not known which documents",
    unseen_by_for_held_out_documents: "is given with --part valid; expected --part train",
    scores_of_held_out_documents: "watched documents of the valid part; expected training",
    few_probes: "at least 5",
    truncated_losses: "truncated",
    damaged_losses: "checksum",
    no_run: "no run in",
    no_fit: "megatron-tokscale fit",
    no_analysis: "megatron-tokscale fit",
    out_exists: "choose another name",
    two_ways_to_the_data: "in one way",
    split_of_per_split_data: "--split",
    training_without_a_budget: "--train-iters is given without --budget",
    budget_without_a_training: "--global-batch-size",
    cost_of_another_length: "not of --seq-length 77",
    plan_without_scores: "tokscale score`, or name its folder",
    plan_without_run: "the following arguments are required: --run; see `megatron-tokscale plan bu",
    plan_without_policy: "the following arguments are required: POLICY; see",
    plan_of_an_unknown_policy: "(choose from 'fall', 'target', 'frontier', 'dataset', 'manual', ",
    run_of_a_policy_without_one: "unrecognized arguments: --run ",
    control_that_the_policy_lacks: "invalid choice: 'easy-first' (choose from 'uniform', ",
    control_of_a_plan_by_hand: "invalid choice: 'frequency' (choose from 'uniform', 'permuted')",
    control_of_a_missing_run: "no run in",
    plan_by_hand_without_weights: "the following arguments are required: --weights",
    weights_of_another_policy: "unrecognized arguments: --weights 0:1,1",
    plan_of_zero_weights: "not all 0",
    plan_of_too_many_epochs: "would be repeated for",
    plan_that_exists: "choose another name",
    plan_in_the_place_of_a_folder: "expected a new file; choose another name",
    two_weights_of_one_sample: "two entries for sample 100; expected one",
    weights_without_a_finite_sum: "expected finite ones",
    more_probes_than_a_list_holds: "expected 10,000,000 at most; space them wider",
    plan_under_a_file: "expected a path in a folder that you may write to",
    probe_set_under_a_file: "expected a path in a folder that you may write to",
    unreadable_weights: "cannot read '0:a,b'",
    flag_that_the_verb_lacks: "--bogus 3; see `megatron-tokscale plan build frontier --help`",
    folder_for_a_probe_set: "it is a directory; name a file",
    run_without_a_plan: "follows no plan",
    trace_of_a_run_without_a_record: "a replay trains nothing",
}


@pytest.mark.parametrize("spoil", BAD_INPUT, ids=lambda spoil: spoil.__name__)
def test_bad_input_gets_one_line_and_writes_nothing(run, corpus, capsys, spoil):
    command = spoil(run, corpus)
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(command)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("megatron-tokscale: ")
    assert error.count("\n") == 1
    assert BAD_INPUT[spoil] in error
    assert sorted(run.rglob("*")) == before

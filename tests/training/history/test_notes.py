"""The past of a run beside a checkpoint that holds no arguments, and the launch's own notes."""

import json
from argparse import Namespace

import pytest
import torch

from megatron_tokscale.training.history.launches import launch_of_args
from megatron_tokscale.training.history.past import NOTE, beginning, read_note, write_note
from megatron_tokscale.training.history.saved import NOTE_FILE, read_checkpoint


def args_of(**changes):
    sizes = {"seq_length": 32, "global_batch_size": 8, "micro_batch_size": 2}
    return Namespace(**sizes, data_parallel_size=2, lr=1e-3, **changes)


def test_the_past_beside_a_checkpoint_is_read_like_the_past_among_its_arguments(tmp_path):
    args = Namespace()
    write_note(args, beginning(8))
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    assert read_checkpoint(tmp_path, 3) is None
    note = getattr(args, NOTE) | {"step": 3}
    (folder / NOTE_FILE).write_text(json.dumps(note))
    saved = read_checkpoint(tmp_path, 3)
    assert (saved.step, saved.samples, saved.scheduler) == (3, 8, None)
    assert read_note(saved.args, 3, 8).tokens == 0
    (folder / NOTE_FILE).write_text(json.dumps(note)[:20])
    assert read_checkpoint(tmp_path, 3) is None


@pytest.mark.parametrize(("given", "noted"), [(None, None), (torch.float32, "float32")])
def test_the_precision_of_the_logits_is_noted_where_it_is_set(given, noted):
    launch = launch_of_args(args_of(logit_dtype=given), {}, beginning(0))
    assert launch.logit_dtype == noted
    assert launch_of_args(args_of(), {}, beginning(0)).logit_dtype is None

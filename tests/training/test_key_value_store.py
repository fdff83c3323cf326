"""Messages of the ranks through torch.distributed's key-value store, without a job."""

from threading import Thread

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tokscale.core.errors import AgreedError, TokscaleError
from megatron_tokscale.training import ranks


def test_a_job_of_one_rank_in_a_fake_process_group_begins(monkeypatch):
    """The store of Megatron's --fake-process-group has none of a store's functions."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks, "_store", FakeStore)
    with pytest.raises(RuntimeError, match="pure virtual"):
        FakeStore().delete_key("tokscale/ended")
    ranks.begin_job()


@pytest.fixture
def store(monkeypatch):
    found = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: found)
    monkeypatch.setattr(ranks, "_new_key", lambda: "key")
    monkeypatch.setattr(ranks, "refuse_together", lambda refusal: None)
    return found


def outcome_of_waiting():
    """Return the errors, by type, with which a rank ends that waits for another one's work."""
    found = []

    def wait():
        try:
            ranks.while_others_wait(lambda: None, where=False)
        except TokscaleError as error:
            found.append(type(error))

    thread = Thread(target=wait, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert not thread.is_alive(), "the rank waits for ever"
    return found


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_unexpected_error_of_the_rank_that_works_ends_those_that_wait(store, error):
    """Not as an error of all ranks: the one that failed takes part in no more collectives."""

    def fail():
        raise error

    with pytest.raises(error):
        ranks.while_others_wait(fail, where=True)
    assert outcome_of_waiting() == [TokscaleError]
    assert not issubclass(TokscaleError, AgreedError)


def test_ranks_that_wait_go_on_when_the_work_is_done(store):
    assert ranks.while_others_wait(lambda: "value", where=True) == "value"
    assert outcome_of_waiting() == []

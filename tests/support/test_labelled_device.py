"""The labelled device refuses what CUDA refuses, counts what CUDA waits for, and computes truly."""

from collections import Counter

import pytest
import torch
from labelled_device import LabelledTensor, labelled_cuda, tf32_allowed


def cuda(*values):
    return torch.tensor(values).to("cuda")


def cpu(*values):
    return torch.tensor(values)


MIXED = {
    "joined": lambda: torch.cat([cuda(1.0), cpu(2.0)]),
    "added": lambda: cuda(1.0, 2.0) + cpu(1.0, 2.0),
    "multiplied as matrices": lambda: cuda(1.0, 2.0)[None] @ cpu(1.0, 2.0)[:, None],
    "stacked, of no dimension": lambda: torch.stack([cuda(1.0)[0], torch.tensor(1.0)]),
    "written into a CPU tensor": lambda: torch.zeros(()).add_(cuda(1.0)[0]),
    "an index of a CPU tensor": lambda: cpu(1.0, 2.0)[cuda(0)],
    "values of another device": lambda: cuda(1.0, 2.0).index_put_((cuda(0, 1),), cpu(1.0, 2.0)),
    "gathered": lambda: cuda(1.0, 2.0).gather(0, cpu(0)),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_are_refused(mixed):
    with labelled_cuda(), pytest.raises(RuntimeError, match="same device"):
        mixed()


ALLOWED = {
    "a factor of no dimension": (lambda: cuda(1.0, 2.0) * torch.tensor(3.0), [3, 6]),
    "a choice of no dimension": (
        lambda: torch.where(cuda(True, False), cuda(1.0, 2.0), torch.tensor(0.0)),
        [1, 0],
    ),
    "a CPU index": (lambda: cuda(1.0, 2.0)[cpu(1)], [2]),
    "a value of no dimension": (lambda: _written(cuda(1.0, 2.0)), [1, 5]),
}


def _written(tensor):
    tensor[cuda(1)] = torch.tensor(5.0)
    return tensor


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_tensors_that_cuda_takes_together_are_taken(allowed):
    call, expected = allowed
    with labelled_cuda():
        result = call()
        assert isinstance(result, LabelledTensor)
        assert result.device == torch.device("cuda:0")
        assert result.tolist() == expected


def into(tensor):
    torch.empty(3).copy_(tensor)


def from_pinned(tensor):
    return torch.ones(3).pin_memory().to("cuda", non_blocking=True)


def into_pinned(tensor):
    torch.empty(3).pin_memory().copy_(tensor, non_blocking=True)


def on_the_device(tensor):
    other = tensor.to("cuda").double().view(1, 3).T.contiguous().sum()
    torch.arange(5, device="cuda")[1:] + other
    tensor[1:] = 7.0
    tensor.masked_fill_(tensor > 2, 0.0)


WAITS = {
    "item": (lambda t: t.sum().item(), {"item": 1}),
    "float": (lambda t: float(t[0]), {"item": 1}),
    "a branch": (lambda t: bool((t > 0).all()), {"item": 1}),
    "nonzero": (lambda t: (t > 1).nonzero(), {"nonzero": 1}),
    "a mask as an index": (lambda t: t[t > 1], {"nonzero": 1}),
    "equal": (lambda t: torch.equal(t, t + 1), {"equal": 1}),
    "to the host": (lambda t: t.cpu(), {"device to host": 1}),
    "to the host, all values": (lambda t: t.tolist(), {"device to host": 1}),
    "into a tensor of the host": (into, {"device to host": 1}),
    "from the host": (lambda t: torch.ones(3).to("cuda"), {"host to device": 1}),
    "from pageable memory": (
        lambda t: torch.ones(3).to("cuda", non_blocking=True),
        {"host to device": 1},
    ),
    "from Python": (lambda t: torch.tensor([1.0], device="cuda"), {"host to device": 1}),
    "a CPU index": (lambda t: t[torch.tensor([1])], {"host to device": 1}),
    "synchronize": (lambda t: torch.cuda.synchronize(), {"synchronize": 1}),
    "from pinned memory": (from_pinned, {}),
    "into pinned memory": (into_pinned, {}),
    "on the device": (on_the_device, {}),
}


@pytest.mark.parametrize("case", WAITS.values(), ids=WAITS)
def test_what_the_host_waits_for_is_counted(case):
    call, expected = case
    with labelled_cuda() as gpu, torch.no_grad():
        tensor = torch.ones(3, device="cuda").cumsum(0)
        assert not gpu.synchronisations
        call(tensor)
        assert gpu.synchronisations == Counter(expected)


def test_values_are_those_of_the_cpu_also_through_views_and_in_place():
    def computed(device):
        tensor = torch.arange(12.0, device=device).view(3, 4)
        tensor[1].mul_(-1)
        tensor.T[2] += tensor[0, 0] + 0.5
        torch.sub(tensor[0], 1, out=tensor[2])
        return torch.cat([tensor.softmax(1), tensor @ tensor.T @ tensor]).tolist()

    with labelled_cuda():
        found = computed("cuda")
    assert found == computed("cpu")


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_collective_takes_contiguous_tensors_only():
    with labelled_cuda():
        row = torch.arange(3.0, device="cuda")
        torch.distributed.broadcast(row, 0)
        with pytest.raises(ValueError, match="contiguous"):
            torch.distributed.broadcast(row.expand(2, 3), 0)


def test_numpy_and_tensors_left_over_are_refused():
    with labelled_cuda():
        tensor = torch.ones(3, device="cuda")
        with pytest.raises((TypeError, RuntimeError), match="numpy"):
            tensor.numpy()
    with pytest.raises(RuntimeError, match="outside"):
        tensor + 1


def test_products_round_to_tf32_where_torch_lets_them():
    fine = 1 + 2**-20
    with labelled_cuda():
        row = torch.tensor([[fine]], device="cuda")
        column = torch.tensor([[1.0]], device="cuda")
        assert (row @ column).item() == fine
        with tf32_allowed():
            assert (row @ column).item() == 1
            assert (row * column).item() == fine


def test_the_memory_of_tensors_is_known():
    with labelled_cuda() as gpu:
        table = torch.ones(10, 1, device="cuda").expand(10, 1000)
        assert gpu.largest == gpu.peak == 40
        table.contiguous()  # gone at once
        copy = table.contiguous()
        assert gpu.largest == 40_000
        assert gpu.peak == 40_040
        row = copy[0]
        del copy, table
        torch.ones(10, device="cuda")
        assert gpu.peak == 40_040, "a view keeps its memory"
        del row
        torch.ones(10_001, device="cuda")
        assert gpu.peak == 40_040


def test_all_is_restored_also_after_an_error():
    names = ("_lazy_init", "is_available", "current_device", "device_count", "synchronize")
    before = [getattr(torch.cuda, name) for name in names]
    mode, lifts = torch.inference_mode, torch._C._only_lift_cpu_tensors()
    with pytest.raises(ZeroDivisionError), labelled_cuda():
        assert torch.cuda.is_available()
        assert 1 / 0
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.inference_mode is mode
    assert torch._C._only_lift_cpu_tensors() == lifts
    assert type(torch.ones(3) + 1) is torch.Tensor

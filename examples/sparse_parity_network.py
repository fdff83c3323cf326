"""Multitask sparse parity: the problem, the network, and its training.

Shapes: T subtasks, M bits of a subtask, B batch, N test samples, document by document, K probe
steps.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.files import whole_or_absent

PROBES_PER_OCTAVE = 8


@dataclass(frozen=True)
class Settings:
    """Problem, network and training, in the paper's words where it has them.

    Attributes:
        tasks: subtasks.
        bits: task bits of a sample.
        subset: bits that a subtask reads.
        alpha: subtask i is drawn with probability ~ i^-(alpha + 1).
        width: hidden units.
        batch: samples of a step.
        steps: steps of the training.
        learning_rate: constant, of Adam.
        documents: test samples of each subtask.
        seed: decides the subtasks, the test samples and, with the network's number, its training.
    """

    tasks: int = 24
    bits: int = 32
    subset: int = 3
    alpha: float = 0.4
    width: int = 512
    batch: int = 500
    steps: int = 20_000
    learning_rate: float = 1e-3
    documents: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if math.comb(self.bits, self.subset) < self.tasks:
            raise SystemExit(
                f"--bits {self.bits} has fewer than {self.tasks} subsets of {self.subset}; raise "
                "--bits or lower --tasks"
            )


class SparseParity:
    """The subtasks: the bits that each reads, and how often each is drawn."""

    def __init__(self, settings: Settings) -> None:
        rng = np.random.default_rng(settings.seed)
        subsets: dict[tuple[int, ...], None] = {}
        while len(subsets) < settings.tasks:
            chosen = rng.choice(settings.bits, settings.subset, replace=False)
            subsets[tuple(sorted(chosen.tolist()))] = None
        self.bits = settings.bits
        self.subset_TM = torch.tensor(list(subsets))
        weight_T = np.arange(1, settings.tasks + 1) ** -(settings.alpha + 1)
        self.frequency_T: Floats = weight_T / weight_T.sum()

    def samples(
        self, task_B: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw random task bits for the given subtasks, and return them with their labels."""
        n_bits = len(task_B) * self.bits
        random = np.frombuffer(rng.bytes(-(-n_bits // 8)), dtype=np.uint8)
        bits = torch.from_numpy(np.unpackbits(random, count=n_bits)).view(len(task_B), self.bits)
        label_B = bits.gather(1, self.subset_TM[task_B]).sum(1) % 2
        return bits.float(), label_B.long()

    def test_set(self, settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return subtask, bits and label of the N test samples; a document has one per subtask."""
        task_N = torch.arange(settings.tasks).repeat(settings.documents)
        return task_N, *self.samples(task_N, np.random.default_rng([settings.seed, 1]))


class Network(nn.Module):
    """One hidden ReLU layer over one-hot control bits and task bits.

    The control bits' part of the first layer is a lookup instead of a product: the same function
    and the same initialisation as one nn.Linear over both.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.control = nn.Embedding(settings.tasks, settings.width)
        self.bits = nn.Linear(settings.bits, settings.width)
        self.out = nn.Linear(settings.width, 2)
        bound = (settings.tasks + settings.bits) ** -0.5
        for parameter in (self.control.weight, *self.bits.parameters()):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, task_B: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.control(task_B) + self.bits(bits)))


def probe_steps(last: int) -> Integers:
    """Return step 0, eight steps per doubling, and the last step."""
    octaves = np.arange(0, math.log2(last), 1 / PROBES_PER_OCTAVE)
    return np.unique(np.concatenate([[0], np.round(2**octaves), [last]]).astype(np.int64))


def train(settings: Settings, network: int) -> Iterator[Floats32]:
    """Train one network on fresh samples; yield the N test losses in nats at every probe step."""
    problem = SparseParity(settings)
    *test_inputs, test_labels = problem.test_set(settings)
    rng = np.random.default_rng([settings.seed, 2, network])
    frequency = torch.from_numpy(problem.frequency_T)
    torch.manual_seed(int(rng.integers(2**62)))
    model = Network(settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    probes = set(probe_steps(settings.steps).tolist())
    for step in range(settings.steps + 1):
        if step in probes:
            with torch.inference_mode():
                logits = model(*test_inputs)
                yield functional.cross_entropy(logits, test_labels, reduction="none").numpy()
        task_B = torch.multinomial(frequency, settings.batch, replacement=True)
        bits, label_B = problem.samples(task_B, rng)
        optimizer.zero_grad()
        functional.cross_entropy(model(task_B, bits), label_B).backward()
        optimizer.step()


def trained(folder: Path, settings: Settings, network: int) -> Floats32:
    """Return the losses loss_NK of one network, trained unless `folder` holds its losses."""
    described = json.dumps({**asdict(settings), "network": network})
    path = folder / f"losses-{hashlib.sha256(described.encode()).hexdigest()[:12]}.npz"
    if not path.exists():
        started = time.process_time()
        loss_NK = np.stack(list(train(settings, network)), axis=1)
        with whole_or_absent(path) as temporary, temporary.open("wb") as file:
            np.savez(file, loss_NK=loss_NK, settings=described)
        print(f"network {network} trained in {time.process_time() - started:.0f} s of one core")
    return np.load(path)["loss_NK"]

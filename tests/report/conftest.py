"""Runs on disk with planted trajectories on real text, and a tokenizer for it.

Shapes: B sequences, S sequence length, N tokens, K probe steps.
"""

import inspect
import json
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from report_losses import planted_losses
from runs import write_run

from megatron_tokscale.fit import fit_run
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.spectrum.evidence.run_transfer import transfer_run
from megatron_tokscale.store import Run

HOSTILE = "<script>alert(1)</script>"
OTHER = "other <b>&$x_1$"
SEQ_LENGTH = 32
STEPS = np.unique(np.concatenate([[0], np.round(np.geomspace(1, 2000, 32))])).astype(int)


def texts() -> dict[str, list[str]]:
    """Return documents of two datasets: docstrings, and the source beneath them."""
    prose = [inspect.getdoc(module) or "" for module in (json, textwrap, inspect)]
    code = [inspect.getsource(module) for module in (json, textwrap)]
    return {"prose": [f"Naïve “quotes” {HOSTILE}, café.", *prose], "code": code}


def train_tokenizer(path: Path, documents: list[str]) -> Path:
    """Train a byte-level BPE in which the hostile text is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_tokens([AddedToken(HOSTILE, normalized=False)])
    tokenizer.save(str(path))
    return path


def make_probe_set(tokenizer_file: Path, n_sequences: int = 24) -> ProbeSet:
    """Take the first sequences of both datasets, four to a document; one has the hostile token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids, document, position, dataset = [], [], [], []
    for d, documents in enumerate(texts().values()):
        rows = []
        for i, text in enumerate(documents):
            words = tokenizer.encode(text).ids
            for start in range(0, len(words) - SEQ_LENGTH, SEQ_LENGTH):
                part = 100 * i + start // (2 * SEQ_LENGTH)
                rows.append((words[start : start + SEQ_LENGTH + 1], part, start + 1, d))
        if d == 0:
            words = tokenizer.encode(documents[0] + documents[1]).ids
            rows.insert(0, (words[: SEQ_LENGTH + 1], 0, 1, d))
        for row in rows[: n_sequences // 2]:
            for values, value in zip((ids, document, position, dataset), row, strict=True):
                values.append(value)
    ids_BS = np.array(ids, dtype=np.int32)
    across = np.arange(SEQ_LENGTH, dtype=np.int32)
    return ProbeSet(
        tokens_BS=np.ascontiguousarray(ids_BS[:, :-1]),
        labels_BS=np.ascontiguousarray(ids_BS[:, 1:]),
        mask_BS=np.ones((len(ids), SEQ_LENGTH), dtype=bool),
        document_BS=np.repeat(np.array(document, np.int32)[:, None], SEQ_LENGTH, axis=1),
        position_BS=np.array(position, np.int32)[:, None] + across,
        dataset_BS=np.repeat(np.array(dataset, np.int16)[:, None], SEQ_LENGTH, axis=1),
        datasets=tuple(texts()),
        vocab_size=tokenizer.get_vocab_size(),
    )


@dataclass(frozen=True)
class Planted:
    """A run with its analysis, a transfer from another run, and the tokenizer of its text."""

    run: Run
    tokenizer: Path


def make_planted(folder: Path, n_sequences: int = 24, steps=STEPS) -> Planted:
    documents = [text for group in texts().values() for text in group]
    tokenizer = train_tokenizer(folder / "tokenizer.json", documents)
    probe_set = make_probe_set(tokenizer, n_sequences)
    loss_NK = planted_losses(probe_set.n_tokens, steps)
    loss_NK[17] = np.nan
    run = write_run(folder / "run", steps, loss_NK, probe_set)
    fit_run(run)
    spectrum_run(run)
    other_NK = planted_losses(probe_set.n_tokens, steps, delay=0.2)
    other = write_run(folder / OTHER, steps, other_NK, probe_set)
    fit_run(other)
    transfer_run(other, run)
    return Planted(run, tokenizer)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return make_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Return a run that ends while many of its tokens fall."""
    return make_planted(tmp_path_factory.mktemp("half"), steps=STEPS[STEPS <= 160])


@pytest.fixture
def copied(planted, tmp_path):
    """Return the planted run in a folder of the test's own."""
    shutil.copytree(planted.run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture
def second_run(planted, tmp_path):
    """Return a function (delay, last step) -> a run of the same tokens, later by `delay` in x."""

    def make(delay: float, last: int = int(STEPS[-1])) -> Run:
        probe_set = planted.run.probe_set
        steps = STEPS[last >= STEPS]
        loss_NK = planted_losses(probe_set.n_tokens, steps, delay)
        return write_run(tmp_path / "second", steps, loss_NK, probe_set)

    return make

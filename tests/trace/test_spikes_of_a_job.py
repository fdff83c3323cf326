"""A poisoned document in the data of a real Megatron job is the first that `--spikes` names.

The data are a Markov chain, which the tiny model learns; one document of it is drawn at random from
the vocabulary, as long as before, so that the order of the samples stays.
"""

from pathlib import Path

import numpy as np
import pytest
from gpt_datasets import gpt_config, gpt_dataset, sample_index
from jobs import EOD, SEQ_LENGTH, TRAINING, make_corpus, markov_documents, run_job, write_documents

from megatron_tokscale.cli import main
from megatron_tokscale.trace.named import Named
from megatron_tokscale.trace.spikes import find_spikes

pytestmark = pytest.mark.megatron

N_STEPS, BATCH = 160, 8
POISONED_STEP = 120  # by then the model has learned the chain
N_DOCUMENTS, SEED = 300, 7


def poisoned(folder: Path) -> tuple[str, int]:
    """Write the dataset; return its prefix, and the document that is poisoned."""
    documents = markov_documents(SEED, N_DOCUMENTS)
    clean = write_documents(folder / "clean", documents)
    n_train = N_DOCUMENTS * int(TRAINING["--split"].split(",")[0]) // 1000
    config = gpt_config(folder / "cache-of-test", SEQ_LENGTH, seed=1234)
    dataset = gpt_dataset(clean, config, N_STEPS * BATCH, documents=range(n_train))
    pieces = sample_index(dataset).pieces((POISONED_STEP - 1) * BATCH + 3)
    longest = max(pieces, key=lambda piece: piece.stop - piece.start).document
    tokens = np.random.default_rng(1).integers(0, EOD, len(documents[longest]) - 1)
    documents[longest] = [*tokens.tolist(), EOD]
    return write_documents(folder / "poisoned", documents), longest


def test_a_poisoned_document_is_the_first_that_is_named(tmp_path, capsys):
    corpus = make_corpus(tmp_path)
    prefix, document = poisoned(tmp_path)
    run = tmp_path / "run"
    run_job(
        corpus,
        1,
        *("--data-path", prefix, "--train-iters", str(N_STEPS), "--lr-decay-iters", str(N_STEPS)),
        *("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "list:1"),
        *("--tokscale-sample-losses", "--save", str(run), "--log-interval", "20"),
        *("--save-interval", str(N_STEPS)),
    )
    first = find_spikes(run, 1).spikes[0]
    assert document in {piece.document for piece in first.samples[0].pieces}
    out = tmp_path / "spikes.json"
    main(["trace", str(run), "--spikes", "1", "--out", str(out), "--step", str(first.step)])
    shown = capsys.readouterr().out
    assert first.samples[0].sample in Named.load(out).samples
    assert f"document {document}, tokens" in shown
    samples = range((first.step - 1) * BATCH, first.step * BATCH)
    assert f"step {first.step}: samples {samples[0]} to {samples[-1]} ({BATCH})" in shown

"""Datasets with planted scores, and reference runs with planted spectra, all without files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from analyses import plant_spectrum

from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.data.plan_parts import DatasetIdentity
from megatron_tokscale.data.scores import DocumentScores, ScoreDetails
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.reweight import CutDataset, CutSettings, Job, cut_dataset
from megatron_tokscale.store import RunPaths, WatchedTokens

SEQ_LENGTH = 64
RANGE = (8.0, 16.0)  # ln(consumed tokens) at the reference run's first and last probe


def portion_of(lengths, name: str = "web", sequences: range | None = None) -> Portion:
    """A part of a dataset that has an index and no tokens."""
    lengths = np.array(lengths, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 2])
    tokens = IndexedTokens(f"/nowhere/{name}", lengths, offsets, np.uint16)
    return Portion(tokens, sequences or range(lengths.size), 1.0)


def scores_of(
    portion: Portion,
    time=None,
    spread=0.5,
    drop=1.0,
    unlearned=0.0,
    surprisal=None,
    fall=None,
    target=None,
    watched=0,
    **details,
):
    """Scores of all documents; numbers stand for that number everywhere; no time: no fits."""
    tokens, rows = portion.tokens, {}
    n = tokens.n_sequences
    fitted = {"learning_time": time, "spread": spread, "drop": drop, "unlearned": unlearned}
    for key, value in {
        **(fitted if time is not None else {}),
        "surprisal": np.linspace(5, 7, n) if surprisal is None else surprisal,
        "fall": fall,
        "target": target,
    }.items():
        if value is not None:
            rows[f"{key}_Q"] = np.broadcast_to(np.asarray(value, np.float32), n).copy()
    return DocumentScores(
        **rows,
        watched_Q=np.broadcast_to(np.asarray(watched, np.int32), n).copy(),
        dataset=DatasetIdentity(tokens.name, n, tokens.n_tokens),
        digest="0123456789abcdef",
        details=ScoreDetails(**{"run_id": "reference", "log_tokens_range": RANGE} | details),
    )


def cut(name: str, time, lengths=None, settings: CutSettings | None = None, **scores) -> CutDataset:
    """A dataset of one document per learning time, cut into strata."""
    portion = portion_of(np.full(len(time), 300) if lengths is None else lengths, name)
    return cut_dataset(
        name, portion, scores_of(portion, time, **scores), settings or CutSettings(4), SEQ_LENGTH, 1
    )


def cut_documents(name: str, lengths, by="fall", quantiles=None, held_out=0, seed=1, **scores):
    """A dataset of these documents, cut into strata of documents."""
    portion = portion_of(lengths, name)
    settings = CutSettings(quantiles, unit="documents", by=by, held_out=held_out)
    return cut_dataset(name, portion, scores_of(portion, **scores), settings, SEQ_LENGTH, seed)


def identity(dataset: CutDataset) -> DatasetIdentity:
    """What a job knows of such a dataset."""
    return DatasetIdentity(
        dataset.names[0].partition("/")[0], 100_000, dataset.n_samples * SEQ_LENGTH + 1
    )


def job_over(datasets, base_weights, train_samples, seed=3, **changes) -> Job:
    """The job that trains on these datasets."""
    parts = {
        "datasets": [identity(dataset) for dataset in datasets],
        "base_weights": base_weights,
        "train_samples": train_samples,
        "seq_length": SEQ_LENGTH,
        "seed": seed,
        "epoch_samples": [dataset.n_samples for dataset in datasets],
    }
    return Job(**parts | changes)


def run_of(folder: Path, names, centres, width=0.3, steps=None, end=1000, tokens_per_sample=64):
    """A run of `end` steps of 8 samples; what `names` have to learn lies around step `centres`."""
    default = [0, 1, 3, 10, 30, 100, 300, 1000]
    step_K = np.array([step for step in steps or default if step <= end])
    records = tuple(SimpleNamespace(step=s, consumed_samples=8 * s) for s in step_K.tolist())
    x_G = np.linspace(0, np.log(end), 500)
    z = (x_G - np.log(np.array(centres, float))[:, None]) / width
    analysis = folder / "analysis"
    analysis.mkdir(parents=True)
    datasets = dict.fromkeys(names, 5)
    with np.errstate(divide="ignore"):
        x_K = {"step": np.log(step_K), "tokens": np.log(8.0 * tokens_per_sample * step_K)}
    no_ids, no_mask = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.bool_)
    no_dataset = np.zeros((0, 1), np.int16)
    probe_set = ProbeSet(
        no_ids, no_ids, no_mask, no_ids, no_ids, no_dataset, tuple(names), vocab_size=1
    )
    run = SimpleNamespace(
        path=folder,
        paths=RunPaths(folder),
        analysis=analysis,
        imported=None,
        info=SimpleNamespace(run_id="reference"),
        probe_set=probe_set,
        tokens=WatchedTokens(probe_set),
        records=records,
        step_K=step_K,
        x_K=x_K.__getitem__,
        checksums=dict,
        verify=lambda: None,
    )
    plant_spectrum(run, datasets, x_G=x_G, drop_weighted_DG=np.exp(-(z**2) / 2))
    return run

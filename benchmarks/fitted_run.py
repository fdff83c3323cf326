"""A fitted run on disk of any number of tokens: planted losses, and the planted parameters as fits.

Shapes: N tokens, K probe steps.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fit_memory import LAST_STEP, SEQ_LENGTH, probe_steps, record
from scipy.special import expit

from megatron_tokscale.core.arrays import AnyArray, Floats32
from megatron_tokscale.fit import FitStatus, SigmoidFits, TokenClass, fit_run
from megatron_tokscale.fit.part_table import part_table
from megatron_tokscale.fit.parts import Parts
from megatron_tokscale.fit.run_fit import part_key
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Identity, Run, RunPaths
from megatron_tokscale.store.losses import write_losses

TOKENS_PER_DOCUMENT = 100
VOCABULARY = 50_000
BLOCK = 156_250  # tokens of a block, as `fit_run` divides ten million
SPAN = np.log(LAST_STEP)
SHARES = {  # of the classes in the demo's run
    TokenClass.FALLING: 0.38,
    TokenClass.RISING: 0.01,
    TokenClass.TWO_STEP: 0.22,
    TokenClass.GRADUAL: 0.23,
    TokenClass.FLAT_UNLEARNED: 0.08,
    TokenClass.FLAT_KNOWN: 0.08,
}

Columns = dict[str, AnyArray]


def make_run(path: Path, n_tokens: int, n_probes: int, seed: int) -> None:
    """Write the run, probe by probe; `n_tokens` is a multiple of `SEQ_LENGTH`."""
    rng = np.random.default_rng(seed)
    paths, probe_set = RunPaths(path), make_probe_set(rng, n_tokens)
    probe_set.save(paths.probe_set)
    Identity("benchmark", probe_set.fingerprint).save(paths.identity)
    steps, columns = probe_steps(n_probes), plant(rng, n_tokens)
    level_N = np.zeros(n_tokens, np.float32)
    for step in steps:
        loss_N = model(columns, np.log(step) if step else -np.inf)
        loss_N += columns["noise"] * rng.standard_normal(n_tokens, dtype=np.float32)
        level_N += loss_N / len(steps)
        if step == 0:
            first_N = loss_N
        write_losses(paths.losses_at(step), loss_N, record(step, probe_set))
    columns |= {"level": level_N, "fall": first_N - loss_N}
    columns["sse"] = columns.pop("noise") ** 2 * (n_probes - 4)
    columns["n_probes"] = np.full(n_tokens, n_probes, np.int32)
    write_fits(Run.open(path), rng, columns)


def make_probe_set(rng: np.random.Generator, n_tokens: int) -> ProbeSet:
    """Return two datasets of documents of any length, all watched, ids about as rare as words."""
    shape = (n_tokens // SEQ_LENGTH, SEQ_LENGTH)
    is_first_N = rng.random(n_tokens) < 1 / TOKENS_PER_DOCUMENT
    is_first_N[:: n_tokens // 2] = True
    document_N = np.cumsum(is_first_N) - 1
    position_N = np.arange(n_tokens) - np.flatnonzero(is_first_N)[document_N]
    ids_N = VOCABULARY ** rng.random(n_tokens + 1)
    return ProbeSet(
        tokens_BS=ids_N[:-1].reshape(shape).astype(np.int32),
        labels_BS=ids_N[1:].reshape(shape).astype(np.int32),
        mask_BS=np.ones(shape, bool),
        document_BS=document_N.reshape(shape).astype(np.int32),
        position_BS=position_N.reshape(shape).astype(np.int32),
        dataset_BS=(np.arange(n_tokens) >= n_tokens // 2).reshape(shape).astype(np.int16),
        datasets=("prose", "code"),
        vocab_size=VOCABULARY,
    )


def plant(rng: np.random.Generator, n_tokens: int) -> Columns:
    """Return parameters by column of a fit, NaN where a token's class has none, and the noise."""

    def uniform(low: float, high: float) -> Floats32:
        return np.float32(low) + np.float32(high - low) * rng.random(n_tokens, dtype=np.float32)

    def width() -> Floats32:
        return np.exp(uniform(np.log(0.05), np.log(1.1)))

    def sign(share_of_rises: float) -> Floats32:
        return np.where(rng.random(n_tokens) < share_of_rises, np.float32(-1), np.float32(1))

    class_N = rng.choice(list(SHARES), n_tokens, p=list(SHARES.values())).astype(np.int8)
    rising = np.where(class_N == TokenClass.RISING, np.float32(-1), np.float32(1))
    middle = uniform(0.3 * SPAN, 0.7 * SPAN)
    columns = {
        "class": class_N,
        "noise": uniform(0.2, 0.8),
        "floor": uniform(2, 4),
        "drop": rising * uniform(1.5, 8.5),
        "midpoint": uniform(0.05 * SPAN, 0.95 * SPAN),
        "width": width(),
    }
    two_step = {
        "steps_floor": columns["floor"],
        "step1_drop": uniform(1, 8),
        "step1_midpoint": middle - uniform(0.5, 2),
        "step1_width": width(),
        "step1_midpoint_se": uniform(0.01, 0.3),
        "step2_drop": sign(0.5) * uniform(0.5, 4),
        "step2_midpoint": middle + uniform(0.5, 2),
        "step2_width": width(),
        "step2_midpoint_se": uniform(0.01, 0.3),
    }
    gradual = {
        "onset": uniform(0, 0.6 * SPAN),
        "slope": -uniform(0.1, 1),
        "onset_loss": uniform(6, 10),
    }
    for each, group in ((TokenClass.TWO_STEP, two_step), (TokenClass.GRADUAL, gradual)):
        for name, value_N in group.items():
            columns[name] = np.where(class_N == each, value_N, np.float32("nan"))
    return columns


def model(columns: Mapping[str, AnyArray], x: float) -> Floats32:
    """Return the loss of every token at x without noise; a flat token has its floor."""
    class_N, loss_N = columns["class"], columns["floor"].copy()
    for prefix, classes in (
        ("", (TokenClass.FALLING, TokenClass.RISING)),
        ("step1_", (TokenClass.TWO_STEP,)),
        ("step2_", (TokenClass.TWO_STEP,)),
    ):
        rows = np.isin(class_N, classes)
        drop, midpoint, width = (
            columns[f"{prefix}{name}"][rows] for name in ("drop", "midpoint", "width")
        )
        loss_N[rows] += drop * expit((midpoint - np.float32(x)) / width)
    rows = class_N == TokenClass.GRADUAL
    onset, slope, onset_loss = (columns[name][rows] for name in ("onset", "slope", "onset_loss"))
    loss_N[rows] = onset_loss + slope * np.maximum(np.float32(x) - onset, 0)
    return loss_N


def write_fits(run: Run, rng: np.random.Generator, columns: Mapping[str, AnyArray]) -> None:
    """Write the planted columns as finished blocks, from which `fit_run` assembles its files.

    The other columns, which do not change the cost of an analysis, are random.
    """
    key = part_key(run, "step", BLOCK, "cpu")
    parts, x_K = Parts(run.paths.fit_parts, key), run.x_K()
    status_N = np.where(rng.random(run.n_tokens) < 0.05, FitStatus.AT_BOUND, 0)
    codes = {"status": status_N.astype(np.int8), "runner_up": np.zeros(run.n_tokens, np.int8)}
    planted = {**columns, **codes}
    names = [name.removesuffix("_N") for name in SigmoidFits.columns()]
    for block, start in enumerate(range(0, run.n_tokens, BLOCK)):
        tokens = slice(start, min(start + BLOCK, run.n_tokens))
        n_tokens = tokens.stop - tokens.start
        values = (
            planted[name][tokens] if name in planted else rng.random(n_tokens, dtype=np.float32)
            for name in names
        )
        loss_NK = run.read_losses(tokens.start, tokens.stop)
        fits = SigmoidFits(x_K, *values)
        parts.write(block, part_table(fits, loss_NK, run.tokens.rows(tokens)))
    fit_run(run, block_tokens=BLOCK)

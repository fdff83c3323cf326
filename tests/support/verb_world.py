"""The world in which the verbs run: small data, runs with their analysis, scores, plans, a cache.

Every verb has a command here that succeeds in it, and the list of the files that it reads.

Shapes: N tokens, K probe steps.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from gpt_datasets import gpt_config, gpt_dataset, sample_index
from jobs import EOD, VOCAB_SIZE, Corpus, markov_documents, write_documents
from jobs import SEQ_LENGTH as JOB_SEQ_LENGTH
from planned_jobs import make_scores
from runs import log_time, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.core.files import read_json, sealed, write_json
from megatron_tokscale.data import Decision, Plan, load_or_build_index
from megatron_tokscale.data.history import followed_plan, save_run_plan
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    PlanRecord,
    record_path,
)
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.scores import DocumentScores, ScoreDetails, scores_path
from megatron_tokscale.data.strata import load_or_build_strata
from megatron_tokscale.probe import ProbeSet

SEQ_LENGTH = 32
STEPS = np.unique([0, *np.geomspace(1, 1000, 16).round().astype(int)])
SPLIT = "1,0,0"
NAMES = ("web", "code")
AXIS = tuple(f"size{k}" for k in range(5))
LOSSES = tuple(f"run/tokscale/losses/step_{step:08d}.safetensors" for step in STEPS[[0, 7, -1]])
RUN = ("run/tokscale/run.json", "run/tokscale/probe.safetensors", *LOSSES)
TUNED = f"other/tokscale/losses/step_{STEPS[-1]:08d}.safetensors"
FITS = "run/analysis/fits.parquet"
SPECTRUM = (
    "run/analysis/spectrum.json",
    "run/analysis/spectrum.npz",
    "run/analysis/reconstruction.json",
)
DATA = tuple(f"{name}.{kind}" for name in NAMES for kind in ("idx", "bin"))
EXPORTED = ("exported/losses.npz", "exported/manifest.yaml")
INDEX = tuple(f"{name}.idx" for name in NAMES)
SCORES = tuple(f"scores/{name}.tokscale.safetensors" for name in NAMES)


@dataclass(frozen=True)
class Command:
    """A verb and the files that it reads, relative to the world's folder."""

    argv: tuple[str, ...]
    reads: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SIZES = f"--seq-length {SEQ_LENGTH} --vocab-size {VOCAB_SIZE}"
_DATA = f"--data-path web code --split {SPLIT}"
_PROBE = f"{_SIZES} --eod {EOD} --tokens 200 --part train --out new.safetensors"
_PLAN = f"--seq-length {SEQ_LENGTH} --train-samples 300 --max-epochs 1000 --out new.json"
_MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --global-batch-size 8"


def commands(cache: tuple[str, ...], planned_cache: tuple[str, ...]) -> dict[str, Command]:
    """Return every way to call every verb, by name.

    Args:
        cache: files of Megatron's data cache that a trace reads.
        planned_cache: the same of a job that follows a plan.
    """
    table = {
        "probe build": (f"probe build {_DATA} {_PROBE}", INDEX),
        "probe build --drop-duplicates": (
            f"probe build {_DATA} {_PROBE} --drop-duplicates".replace(SPLIT, "60,40,0").replace(
                "--part train", "--part valid"
            ),
            DATA,
        ),
        "probe build --data-args-path": (
            f"probe build --data-args-path words.txt --split {SPLIT} {_PROBE}",
            ("words.txt", *INDEX),
        ),
        "probe build --per-split-data-args-path": (
            f"probe build --per-split-data-args-path parts.json {_PROBE}",
            ("parts.json", *INDEX),
        ),
        "probe build --unseen-by": (
            f"probe build {_DATA} {_PROBE} --unseen-by run",
            ("run/tokscale/data.json", *INDEX, *cache),
        ),
        "probe show": ("probe show probe.safetensors", ("probe.safetensors",)),
        "probe cost": (
            f"probe cost --probe-set probe.safetensors {_SIZES} {_MODEL} --train-iters 100",
            ("probe.safetensors",),
        ),
        "fit": ("fit run", RUN),
        "spectrum": ("spectrum run --resamples 2", (*RUN, FITS)),
        "spectrum --source": (
            "spectrum run --resamples 2 --source other",
            tuple(path.replace("run/", "other/", 1) for path in (LOSSES[1], FITS)),
        ),
        "spectrum --axis M": (
            f"spectrum {' '.join(AXIS)} --axis M --resamples 2 --out new --source run",
            (
                *(f"size2/tokscale/{name}" for name in ("run.json", "probe.safetensors")),
                "size2/tokscale/losses/step_00000100.safetensors",
                FITS,
            ),
        ),
        "compare": (
            "compare run other --out new --resamples 2",
            (*RUN, FITS, LOSSES[1].replace("run/", "other/", 1), FITS.replace("run/", "other/", 1)),
        ),
        "import": ("import exported --out new", EXPORTED),
        "import of a matrix": (
            f"import losses.npy --out new --axis T --values {','.join(map(str, STEPS))}",
            ("losses.npy",),
        ),
        "import of a manifest": (
            f"import losses.csv --out new --axis T --values {','.join(map(str, STEPS))}",
            ("losses.csv", "losses.npy"),
        ),
        "fit of an imported run": (
            "fit imported",
            ("imported/tokscale/run.json", "imported/tokscale/tokens.safetensors"),
        ),
        "export": ("export run --out new.npz", RUN),
        "laws": ("laws run --resamples 2", (LOSSES[1], *SPECTRUM)),
        "laws of several": (
            "laws run other --resamples 2",
            tuple(path.replace("run/", "other/", 1) for path in (*RUN[:2], LOSSES[1])),
        ),
        "forecast": (
            "forecast run --resamples 2 --tokens 200",
            (LOSSES[1], "run/analysis/fit.json", FITS),
        ),
        "laws --data-path": (f"laws run {_DATA} --resamples 2", DATA),
        "laws --curves": (
            "laws --curves curves.csv curves.parquet --manifest curves.json --out new "
            "--resamples 2",
            ("curves.csv", "curves.parquet", "curves.json"),
        ),
        "score": (
            f"score run {_DATA} --out new --no-predict --min-tokens 4",
            (LOSSES[1], FITS, *DATA),
        ),
        "score of two checkpoints": (
            f"score falls {_DATA} --out new --no-predict --min-tokens 4",
            (
                *(f"falls/tokscale/{name}" for name in ("run.json", "probe.safetensors")),
                *(f"falls/tokscale/losses/step_{step:08d}.safetensors" for step in (250, 1000)),
                *DATA,
            ),
        ),
        "score --tuned": (
            f"score falls {_DATA} --tuned other --out new --no-predict --min-tokens 4",
            ("other/tokscale/run.json", RUN[1].replace("run/", "other/", 1), TUNED),
        ),
        "plan build frontier": (
            f"plan build frontier {_DATA} {_PLAN} --scores scores",
            (*INDEX, *SCORES),
        ),
        "plan build fall": (
            f"plan build fall {_DATA} {_PLAN} --scores scores --held-out 2",
            (*INDEX, *SCORES),
        ),
        "plan build target": (
            f"plan build target {_DATA} {_PLAN} --scores scores",
            (*INDEX, *SCORES),
        ),
        "plan build frontier --time-map": (
            f"plan build frontier {_DATA} {_PLAN} --scores scores --time-map run",
            (RUN[0], LOSSES[1], *SPECTRUM[:2]),
        ),
        "plan build dataset": (
            f"plan build dataset {_DATA} {_PLAN} --run run",
            (RUN[0], LOSSES[1], *SPECTRUM[:2]),
        ),
        "plan build manual": (f"plan build manual {_DATA} {_PLAN} --weights 0:1,1", INDEX),
        "plan build keep": (
            "plan build keep planned --skip skip.txt --from-sample 2 --out new.json",
            tuple(f"planned/tokscale/{name}.json" for name in ("data", "plan", "replans")),
        ),
        "plan show": ("plan show plan.json", ("plan.json",)),
        "plan show RUN": (
            "plan show planned",
            ("planned/tokscale/plan.json", "planned/tokscale/replans.json"),
        ),
        "trace": (
            "trace run --sample 0 1 2 3 --document web:1 --tokenizer tokenizer.json",
            ("run/tokscale/data.json", "tokenizer.json", "web.idx", "web.bin", *cache),
        ),
        "trace of a plan": (
            "trace planned --sample 3 --document web:1",
            (
                "planned/tokscale/data.json",
                "planned/tokscale/plan.json",
                "planned/tokscale/replans.json",
                "web.idx",
                *planned_cache,
            ),
        ),
        "trace --data-cache-path": (
            "trace --data-cache-path cache --sample 3 --document web:1",
            (
                "web.idx",
                *cache,
                *(
                    name.replace("-dataset_index.npy", "-description.txt")
                    for name in cache
                    if name.endswith("-dataset_index.npy")
                ),
            ),
        ),
        # Losses that are damaged are left out: they may be half-copied.
        "watch": ("watch run --once --tokenizer tokenizer.json", (*RUN[:2], "tokenizer.json")),
        "report": (
            "report run --out new.html --beside planned --axis-dir axis --tokenizer tokenizer.json",
            (
                LOSSES[1],
                "run/analysis/fit.json",
                FITS,
                *SPECTRUM,
                "run/analysis/laws.json",
                "run/analysis/transfer.json",
                "axis/axis.json",
                "axis/axis.npz",
                "tokenizer.json",
                *(f"planned/tokscale/{name}.json" for name in ("run", "plan", "replans")),
            ),
        ),
    }
    return {name: Command(_words(argv), reads) for name, (argv, reads) in table.items()}


def data_flags(corpus: Corpus) -> list[str]:
    """Return the flags of the corpus's data, whose last tenth is held out."""
    flags = ["--split", "900,100,0", "--seq-length", str(JOB_SEQ_LENGTH)]
    return ["--data-path", *corpus.data_path, *flags]


def build_plan(policy: str, corpus: Corpus, out: Path, *flags: str) -> list[str]:
    """Return a command that plans 2000 samples of the corpus."""
    job = ["--train-samples", "2000", "--max-epochs", "1000", "--out", str(out)]
    return ["plan", "build", policy, *data_flags(corpus), *job, *flags]


def planted_losses(n_tokens: int, steps=STEPS, seed: int = 0):
    """Return losses of falling sigmoids with a little noise."""
    rng = np.random.default_rng(seed)
    midpoint_N, drop_N = rng.uniform(1, 6, n_tokens), rng.uniform(1, 4, n_tokens)
    curve_NK = expit((midpoint_N[:, None] - log_time(steps)) / 0.3)
    noise_NK = rng.normal(0, 0.05, curve_NK.shape)
    return (0.5 + drop_N[:, None] * curve_NK + noise_NK).astype(np.float32)


def make_world(folder: Path) -> dict[str, Command]:
    """Write the world into `folder`, the working directory, and return its commands."""
    for seed, name in enumerate(NAMES):
        write_documents(folder / name, markov_documents(seed, 60))
    (folder / "words.txt").write_text("1 web 2 code\n")
    write_json(folder / "parts.json", {"train": ["web", "code"], "valid": None, "test": None})
    probe = f"{_SIZES} --eod {EOD} --tokens 300 --part train --out probe.safetensors"
    call(f"probe build {_DATA} {probe}")
    _write_tokenizer(folder / "tokenizer.json")
    probe_set = ProbeSet.load(folder / "probe.safetensors")
    n_tokens = probe_set.n_tokens
    for seed, name in enumerate(("run", "other", "planned")):
        write_run(folder / name, STEPS, planted_losses(n_tokens, seed=seed), probe_set)
        call(f"fit {name}")
    write_run(folder / "falls", [250, 1000], planted_losses(n_tokens, [250, 1000]), probe_set)
    call("export run --out exported")
    call("import exported --out imported")
    np.save(folder / "losses.npy", planted_losses(n_tokens))
    (folder / "losses.csv").write_text("file\nlosses.npy\n")
    call("spectrum run --resamples 2 --source other")
    call("laws run --resamples 2")
    (folder / "scores").mkdir()
    for seed, name in enumerate(NAMES):
        scores = make_scores(str(folder / name), seed)
        fall_Q, target_Q = np.random.default_rng(seed).random((2, scores.n_documents))
        scores = replace(
            scores,
            fall_Q=fall_Q.astype(np.float32),
            target_Q=target_Q.astype(np.float32),
            details=ScoreDetails(run_id="reference", log_tokens_range=(9.0, 12.0)),
        )
        scores.save(folder / "scores" / scores_path(name).name)
    plan = _PLAN.replace("new", "plan")
    call(f"plan build frontier {_DATA} {plan} --scores scores --quantiles 2")
    (folder / "skip.txt").write_text("3\nweb:1\n")
    _write_axis(folder, probe_set)
    _write_curves(folder)
    cache = _record_blend(folder)
    planned_cache = _record_plan(folder)
    return commands(cache, planned_cache)


def _write_curves(folder: Path) -> None:
    """Write two tables of a loss curve, and their manifest."""
    step_K = np.arange(100, 2100, 100)
    loss_K = 2 + 5 * step_K**-0.5
    rows = [f"{step},1e-3,{loss}" for step, loss in zip(step_K, loss_K, strict=True)]
    (folder / "curves.csv").write_text("\n".join(["step,lr,loss", *rows]) + "\n")
    table = pa.table({"step": step_K, "lr": np.full(len(step_K), 1e-3), "loss": loss_K})
    pyarrow.parquet.write_table(table, folder / "curves.parquet")
    files = [{"file": "curves.csv", "name": "a"}, {"file": "curves.parquet", "name": "b"}]
    (folder / "curves.json").write_text(json.dumps(files))


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(path))


def _write_axis(folder: Path, probe_set: ProbeSet) -> None:
    """Write runs of five sizes, of which a larger one has learned more by the end."""
    order_N, drop_N = np.random.default_rng(0).uniform(
        [[0], [1]], [[1], [5]], (2, probe_set.n_tokens)
    )
    for k, name in enumerate(AXIS):
        last_N = 1 + drop_N * expit((order_N - k / 4) / 0.06)
        write_run(folder / name, [0, 100], np.stack([last_N + 1, last_N], axis=1), probe_set)
        path = folder / name / "tokscale/run.json"
        size = 10**6 * 4**k
        about = {"parameters": 2 * size, "non_embedding": size, "flops_per_token": 6 * size}
        write_json(path, sealed(read_json(path) | {"size": about}))
    call(f"spectrum {' '.join(AXIS)} --axis M --resamples 2 --out axis --source run")


def _record_blend(folder: Path) -> tuple[str, ...]:
    """Make Megatron's own blend of the data and the record that the job of `run` keeps of it."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    config = gpt_config(folder / "cache", SEQ_LENGTH)
    parts = [gpt_dataset(str(folder / name), config, 100) for name in NAMES]
    blended = BlendedDataset(parts, [0.5, 0.5], 120, config)
    datasets = tuple(DatasetRecord.from_gpt_dataset(part) for part in parts)
    order = BlendRecord.from_blended_dataset(blended)
    DataRecord(datasets, order).save(record_path(folder / "run"))
    web = datasets[0]
    files = (web.document_index, web.sample_index, web.shuffle_index)
    files += (order.dataset_index, order.dataset_sample_index)
    return tuple(str(Path(file).relative_to(folder)) for file in files if file)


def _record_plan(folder: Path) -> tuple[str, ...]:
    """Write the files of a job that follows plan.json and has decided once."""
    decisions, cache = [Decision(10, 100, (1.0, 3.0))], folder / "plancache"
    save_run_plan(Plan.load(folder / "plan.json"), decisions, folder / "planned")
    plan = followed_plan(folder / "planned")
    config = gpt_config(cache, SEQ_LENGTH)
    parts = [gpt_dataset(str(folder / name), config) for name in NAMES]
    scores = [DocumentScores.load(folder / "scores" / scores_path(name).name) for name in NAMES]
    sizes = [len(part) for part in parts]

    def scores_of(d: int) -> SampleScores:
        return SampleScores.from_document_scores(scores[d], sample_index(parts[d]))

    load_or_build_index(plan, 300, cache, build=True)
    strata = load_or_build_strata(plan, sizes, list(NAMES), scores_of, cache, build=True)
    files = tuple(None if file is None else str(file) for file in strata.files)
    datasets = tuple(DatasetRecord.from_gpt_dataset(part) for part in parts)
    order = PlanRecord(str(cache), plan.fingerprint, 300, files)
    DataRecord(datasets, order).save(record_path(folder / "planned"))
    web = datasets[0]
    index = [str(path) for path in cache.glob("*tokscale*") if str(path) not in files]
    names = [web.document_index, web.sample_index, web.shuffle_index, files[0], *index]
    return tuple(str(Path(name).relative_to(folder)) for name in names if name)


def call(line: str) -> None:
    """Run a verb whose words have no spaces."""
    main(line.split())

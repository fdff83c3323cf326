"""From a reference run that watched training documents to scores beside the .bin/.idx files.

Shapes: Q documents of a dataset, W watched ones, L some of its documents, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.names import whole_prefix
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.scores import (
    DocumentScores,
    FittedScores,
    HeldOutError,
    PredictorDetails,
    Reliability,
    ScoreDetails,
    data_digest,
    holds_scores,
    identity_of,
    scores_path,
)
from megatron_tokscale.results import FittedRun
from megatron_tokscale.reweight.halves import Pair
from megatron_tokscale.reweight.measured import Measured, measure, pairs_of
from megatron_tokscale.reweight.predict import (
    MIN_DOCUMENTS,
    Features,
    Predictor,
    check_installed,
    fit_predictor,
)
from megatron_tokscale.reweight.reliability import cells, reliability, shrunk
from megatron_tokscale.reweight.seen import tell_seen
from megatron_tokscale.reweight.surprisal import document_surprisal, token_surprisal
from megatron_tokscale.reweight.watched import (
    TokensByTime,
    find_datasets,
)
from megatron_tokscale.store import Run

_PREDICTOR: Final = "ridge on hashed tokens and pairs, mean surprisal, log length"
_PREDICTOR_SEED: Final = 0  # seed of the predictor's folds: equal data get equal scores
_QUARTILES: Final = (0.25, 0.5, 0.75)

type Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class ScoreSummary:
    """Summary of the scores of a dataset.

    Attributes:
        dataset: its name.
        path: file of the scores.
        fingerprint: fingerprint of the scores.
        documents: number of training documents of the dataset.
        watched: number of these that the run has watched well enough for a score.
        predicted: number of these with a predicted score.
        drop: learnable drop in nats per token, mean over the tokens of the scored documents; None
            without scored documents, or if the run is not fitted.
        unlearned: share of tokens never learned; None likewise.
        learning_time: quartiles over scored documents of exp(mean ln learning time), in tokens that
            the reference run had consumed; None if nothing was learned, or likewise.
        held_out: error of the prediction of each score; None without a prediction.
        reliability: reliability of "fall" and "target", where they are measured.
        fall_steps: probe steps between which falls are measured; None without falls.
    """

    dataset: str
    path: Path
    fingerprint: str
    documents: int
    watched: int
    predicted: int
    drop: float | None
    unlearned: float | None
    learning_time: Quartiles | None
    held_out: Mapping[str, HeldOutError] | None
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    fall_steps: tuple[int, int] | None = None


def score_run(
    run: Run,
    data: DataSource,
    *,
    tuned: Run | None = None,
    second: Run | None = None,
    out: Path | None = None,
    predict: bool = True,
    min_tokens: int = 16,
    force: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[ScoreSummary]:
    """Score the training documents of a job's data, one file per dataset.

    A document is scored by its watched tokens. Its fall is its mean loss near a quarter of the run
    less that at the last probe; its target score is its mean loss at the last probe less that of
    `tuned`; both are shrunk by their reliability (`reweight/reliability.py`). Of a fitted run,
    learning events are `spectrum.events.events_of`, and their times ln(consumed tokens), between
    probes in proportion to the fits' own x. Other documents are predicted (`reweight/predict.py`).
    Surprisal needs no run: -ln p by the counts of single tokens in the training part of all
    datasets, plus one.

    Args:
        run: a run whose probe set watches training documents of these data: fitted, or with a probe
            near a quarter of its steps, or with `tuned`.
        data: the data of the job.
        tuned: a run on the same probe set, of the run's model tuned on a sample of a target.
        second: a run on the same probe set, of another seed of the run: every other token of a
            document is measured by it, so that a seed's own noise lowers the reliability of falls.
        out: folder for the scores; None: beside their .bin/.idx.
        predict: whether to predict the scores of documents that were not watched.
        min_tokens: a document with fewer watched tokens counts as not watched.
        force: whether to replace existing scores. Other files are never replaced.
        progress: receiver of the name of each stage; None for none.
        tell: receiver of notes of one line: scores that cannot be made, documents that the run was
            trained on; None for none.

    Raises:
        TokscaleError: nothing can be scored by the run; it watched other data, held-out documents
            or too few, or is fitted and has no record of its consumed tokens; `tuned` or `second`
            watched other tokens; a file is in the way or cannot be written.
    """
    progress = progress or NoProgress()
    tell = tell or (lambda _: None)
    if min_tokens < 1:
        raise TokscaleError(
            f"--min-tokens is {min_tokens}; expected at least 1 watched token; give another"
        )

    # Check first what needs no work.
    portions = data.portions("train")
    paths = _output_paths(portions, out, force)
    datasets = find_datasets(run.probe_set, portions)
    is_fitted = run.paths.fit.is_file() or run.paths.fits.is_file()
    source = FittedRun.open(run) if is_fitted else None
    tokens_by_time = None if source is None else TokensByTime.from_fitted_run(source)
    pairs = pairs_of(run, tuned, second, is_fitted, tell)

    # The watched documents.
    progress.stage("scores of the watched documents")
    measured = measure(portions, datasets, source, tokens_by_time, pairs, min_tokens, tell)
    _check_enough(portions, measured, min_tokens, predict)
    references = [run] if second is None else [run, second]
    for each in references:
        tell_seen(each, portions, [one.document_W for one in measured], tell)

    # The surprisal of tokens, then the scores of each dataset.
    progress.stage("counting the tokens of the data")
    surprisal_V = token_surprisal(portions, run.probe_set.vocab_size)
    details = _details(references, tuned, source, tokens_by_time, pairs, min_tokens, portions)
    summaries = [
        _score_dataset(portion, each, surprisal_V, details, path, predict, progress)
        for portion, each, path in zip(portions, measured, paths, strict=True)
    ]
    if "fall" not in pairs:
        return summaries
    steps = pairs["fall"].before.step, pairs["fall"].after.step
    return [replace(summary, fall_steps=steps) for summary in summaries]


def _output_paths(portions: Sequence[Portion], out: Path | None, force: bool) -> list[Path]:
    """Return the file of each portion's scores.

    Raises:
        TokscaleError: a file is in the way.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise TokscaleError(f"--out {out} is a file; expected a folder for the scores")
    paths = []
    for portion in portions:
        path = scores_path(portion.tokens.prefix if out is None else str(out / portion.name))
        if path.exists() and not force:
            raise TokscaleError(f"{path} exists; choose another folder, or replace it with --force")
        if path.exists() and not holds_scores(path):
            raise TokscaleError(f"{path} exists and holds no scores; move it away")
        paths.append(path)
    return paths


def _check_enough(
    portions: Sequence[Portion],
    watched: Sequence[Measured],
    min_tokens: int,
    predict: bool,
) -> None:
    """Refuse too few watched documents to score, or to fit a prediction to."""
    if not any(documents.document_W.size for documents in watched):
        raise TokscaleError(
            f"the run watched no training document of these data by {min_tokens} tokens or more; "
            "expected one at least; watch more of them, or lower --min-tokens"
        )
    for portion, documents in zip(portions, watched, strict=True):
        n_watched, n_left = documents.document_W.size, _unwatched(portion, documents).size
        if predict and n_left:
            check_installed()
            if n_watched < MIN_DOCUMENTS:
                raise TokscaleError(
                    f"{n_watched} training documents of {portion.name} are watched by "
                    f"{min_tokens} tokens or more, a prediction for the other {n_left} needs "
                    f"{MIN_DOCUMENTS}; watch more, or leave them without scores (--no-predict)"
                )


def _unwatched(portion: Portion, documents: Measured) -> Integers:
    """Return the training documents that need a prediction: not watched, not empty."""
    is_left_Q = portion.lengths > 0
    is_left_Q[documents.document_W - portion.sequences.start] = False
    return portion.sequences.start + np.flatnonzero(is_left_Q)


def _details(
    runs: Sequence[Run],
    tuned: Run | None,
    source: FittedRun | None,
    tokens_by_time: TokensByTime | None,
    pairs: Mapping[str, Pair],
    min_tokens: int,
    portions: Sequence[Portion],
) -> ScoreDetails:
    """Return the details that the scores of all datasets share."""
    run, last = runs[0], [each.records[-1].consumed_tokens for each in runs]
    consumed = {record.step: record.consumed_tokens for record in run.records}
    log_range = fall_tokens = None
    if tokens_by_time is not None:
        log_tokens_K = tokens_by_time.log_tokens_K
        log_range = float(log_tokens_K[0]), float(log_tokens_K[-1])
    if "fall" in pairs:
        early, late = (consumed[one.step] for one in pairs["fall"][:2])
        fall_tokens = (early, late) if early is not None and late is not None else None
    return ScoreDetails(
        version=__version__,
        run=str(run.path),
        run_id=run.info.run_id,
        probe_fingerprint=run.probe_set.fingerprint,
        fitted_time="" if source is None else source.time,
        log_tokens_range=log_range,
        min_tokens=min_tokens,
        vocab_size=run.probe_set.vocab_size,
        surprisal_of=tuple(portion.name for portion in portions),
        fall_tokens=fall_tokens,
        reference_parameters=run.info.size.get("parameters"),
        reference_tokens=None if None in last else sum(filter(None, last)),
        second_run_id=", ".join(each.info.run_id for each in runs[1:]),
        probes=sum(len(each.step_K) for each in (*runs, *filter(None, [tuned]))),
    )


def _score_dataset(
    portion: Portion,
    measured: Measured,
    surprisal_V: Floats,
    details: ScoreDetails,
    path: Path,
    predict: bool,
    progress: Progress,
) -> ScoreSummary:
    """Score the training documents of a dataset, and write their scores to `path`.

    Raises:
        TokscaleError: the file cannot be written.
    """
    progress.stage(f"surprisal of {portion.name}")
    surprisal_Q = document_surprisal(portion.tokens, surprisal_V)
    predictor = None
    if predict and _unwatched(portion, measured).size:
        predictor = fit_predictor(
            Features(portion.tokens, surprisal_Q),
            measured.document_W,
            measured.targets(),
            seed=_PREDICTOR_SEED,
            progress=progress,
        )
    progress.stage(f"scores of {portion.name}")
    scores = _scores(portion, measured, predictor, surprisal_Q, details)
    try:
        scores.save(path)
    except OSError as error:
        raise TokscaleError(
            f"cannot write {path}: {error.strerror or error}; choose a folder with --out"
        ) from error
    return _summary(portion, scores, path, predictor.held_out if predictor else None)


def _scores(
    portion: Portion,
    measured: Measured,
    predictor: Predictor | None,
    surprisal_Q: Floats32,
    details: ScoreDetails,
) -> DocumentScores:
    """Return the scores of a dataset: of watched documents, and predicted ones of the others."""
    n_documents, document_W = portion.tokens.n_sequences, measured.document_W
    targets = measured.targets()
    values = {name: np.full(n_documents, np.nan, np.float32) for name in targets}
    watched_Q = np.zeros(n_documents, np.int32)
    watched_Q[document_W] = measured.tokens_W

    # The watched documents: scores by sigmoids as they are, differences shrunk.
    found = {}
    for name, target in targets.items():
        values[name][document_W] = target.value_W
    for name, halves in measured.differences.items():
        predicted_W = predictor.predict_held_out(name, document_W) if predictor else None
        cell_W = cells(portion.tokens.lengths[document_W], predicted_W)
        values[name][document_W] = shrunk(halves, cell_W)
        found[name] = reliability(halves, predicted_W)

    # The predicted documents; without a predicted drop there is no learning time.
    if predictor:
        left = _unwatched(portion, measured)
        for name, predicted_L in predictor.predict(left).items():
            values[name][left] = predicted_L
        if measured.fitted is not None:
            for name in ("learning_time", "spread"):
                values[name][values["drop"] == 0] = np.nan
        made_by = PredictorDetails(_PREDICTOR, len(predictor.document_W), predictor.held_out)
        details = replace(details, predictor=made_by)
    return DocumentScores(
        **{f"{name}_Q": array for name, array in values.items()},
        surprisal_Q=surprisal_Q,
        watched_Q=watched_Q,
        dataset=identity_of(portion.tokens),
        digest=data_digest(portion.tokens),
        details=replace(
            details,
            prefix=whole_prefix(portion.tokens.prefix),
            train_documents=(portion.sequences.start, portion.sequences.stop),
            reliability=found,
        ),
    )


def _summary(
    portion: Portion,
    scores: DocumentScores,
    path: Path,
    held_out: Mapping[str, HeldOutError] | None,
) -> ScoreSummary:
    fitted = scores.fitted
    each = (scores.drop_Q, scores.fall_Q, scores.target_Q)
    is_scored_Q = np.isfinite(next(score_Q for score_Q in each if score_Q is not None))
    n_watched = int((scores.watched_Q > 0).sum())
    weight_Q = portion.tokens.lengths[is_scored_Q].astype(np.float64)

    def mean(value_Q: Floats32) -> float | None:
        """Return the mean over the tokens of the scored documents."""
        return float(np.average(value_Q[is_scored_Q], weights=weight_Q)) if weight_Q.sum() else None

    return ScoreSummary(
        dataset=portion.name,
        path=path,
        fingerprint=scores.fingerprint,
        documents=len(portion.sequences),
        watched=n_watched,
        predicted=int(is_scored_Q.sum()) - n_watched,
        drop=mean(fitted.drop_Q) if fitted else None,
        unlearned=mean(fitted.unlearned_Q) if fitted else None,
        learning_time=_learning_time_quartiles(fitted) if fitted else None,
        held_out=held_out,
        reliability=scores.details.reliability,
    )


def _learning_time_quartiles(fitted: FittedScores) -> Quartiles | None:
    log_time_Q = fitted.learning_time_Q[np.isfinite(fitted.learning_time_Q)].astype(np.float64)
    if not log_time_Q.size:
        return None
    low, middle, high = np.exp(np.quantile(log_time_Q, _QUARTILES)).tolist()
    return low, middle, high

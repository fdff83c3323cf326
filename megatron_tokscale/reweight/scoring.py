"""From a reference run that watched training documents to scores beside the .bin/.idx files.

Shapes: N watched tokens, K probe steps, E events, Q documents of a dataset, W its watched ones,
L some of its documents, T tokens of the data, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.corpus.names import listed, whole_prefix
from megatron_tokscale.corpus.source import DataPath, DataSource
from megatron_tokscale.data.scores import (
    DocumentScores,
    data_digest,
    holds_scores,
    identity_of,
    scores_path,
)
from megatron_tokscale.fit import SigmoidFits, TokenClass, fits_path
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.results import FittedRun
from megatron_tokscale.reweight.predict import (
    MIN_DOCUMENTS,
    Features,
    HeldOut,
    Predictor,
    Target,
    check_installed,
    fit_predictor,
)
from megatron_tokscale.spectrum.density import events_of
from megatron_tokscale.store import Run

_BLOCK_TOKENS: Final = 2**22
_COMPARED_TOKENS: Final = 2**14
_QUARTILES: Final = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class ScoreSummary:
    """What the scores of a dataset are like.

    Attributes:
        dataset: its name.
        path: the file of the scores.
        fingerprint: that of the scores.
        documents: training documents of the dataset.
        watched: of these, how many the run has watched well enough for a score.
        predicted: of these, how many got a predicted score.
        drop: learnable drop in nats per token, mean over the tokens of the scored documents; None
            if there are none.
        unlearned: share of tokens never learned, likewise.
        learning_time: quartiles over scored documents of exp(mean ln learning time), in tokens that
            the reference run had consumed; None if nothing was learned.
        held_out: errors of the prediction of each target; None without a prediction.
    """

    dataset: str
    path: Path
    fingerprint: str
    documents: int
    watched: int
    predicted: int
    drop: float | None
    unlearned: float | None
    learning_time: tuple[float, float, float] | None
    held_out: Mapping[str, HeldOut] | None


def score_run(
    run: Run,
    data_path: DataPath,
    split: str | None,
    *,
    out: Path | None = None,
    predict: bool = True,
    min_tokens: int = 16,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[ScoreSummary]:
    """Score the training documents of a job's data, one file per dataset.

    A document's scores are those of its tokens that the run watched: learning events are
    `spectrum.density.events_of`, and their times ln(consumed tokens), between probes in proportion
    to the fits' own x. Other documents are predicted (`reweight.predict`). Surprisal needs no run:
    -ln p by the counts of single tokens in the training part of all datasets, plus one.

    Args:
        run: a fitted run whose probe set watches training documents of these data.
        data_path: the job's --data-path words, or those of each part.
        split: the job's --split; None with per-split arguments.
        out: folder for the scores; by default they lie beside their .bin/.idx.
        predict: whether to predict the scores of documents that were not watched.
        min_tokens: a document with fewer watched tokens counts as not watched.
        force: whether to replace scores that are there. Nothing else is ever replaced.
        progress: called with a word on what is done next.

    Raises:
        TokscaleError: the run is not fitted, watched other data, held-out documents or too few, or
            does not know its consumed tokens; a file is in the way or cannot be written.
    """
    say = progress or (lambda _: None)
    if min_tokens < 1:
        raise TokscaleError(f"a score needs at least 1 watched token, not {min_tokens}")
    portions = DataSource(data_path, split).portions("train")
    paths = _output_paths(portions, out, force)
    source = FittedRun.open(run)
    clock = TokenClock.from_fitted_run(source)
    datasets = _check_probe_set(run.probe_set, portions)
    say("learning times of the watched documents")
    watched = [
        documents.within(portion.sequences).with_tokens(min_tokens)
        for portion, documents in zip(portions, _read_watched(source, clock, datasets), strict=True)
    ]
    _check_enough(portions, watched, min_tokens, predict)
    say("counting the tokens of the data")
    surprisal_V = _token_surprisal(portions, run.probe_set.vocab_size)
    about = {
        "version": __version__,
        "run": str(run.path),
        "run_id": run.info.run_id,
        "probe_fingerprint": run.probe_set.fingerprint,
        "fitted_time": source.time,
        "clock": "ln(consumed tokens)",
        "clock_range": [float(clock.log_tokens_K[0]), float(clock.log_tokens_K[-1])],
        "min_tokens": min_tokens,
        "vocab_size": run.probe_set.vocab_size,
        "surprisal_of": [portion.name for portion in portions],
    }
    summaries = []
    for portion, documents, path in zip(portions, watched, paths, strict=True):
        say(f"surprisal of {portion.name}")
        surprisal_Q = _document_surprisal(portion.tokens, surprisal_V)
        predictor = None
        if predict and _unwatched(portion, documents).size:
            features = Features(portion.tokens, surprisal_Q)
            predictor = fit_predictor(
                features, documents.document_W, documents.targets(), progress=say
            )
        say(f"scores of {portion.name}")
        scores = _scores(portion, documents, predictor, surprisal_Q, about)
        try:
            scores.save(path)
        except OSError as error:
            raise TokscaleError(
                f"cannot write {path}: {error.strerror or error}; choose a folder with --out"
            ) from error
        held_out = predictor.held_out if predictor else None
        summaries.append(_summary(portion, scores, path, held_out))
    return summaries


@dataclass(frozen=True, eq=False)
class TokenClock:
    """Turns the x of a run's fits into ln(consumed tokens), piecewise linearly between probes.

    Attributes:
        x_K: natural logarithm of the fits' time at the probes after training began, ascending.
        log_tokens_K: natural logarithm of the training tokens consumed by then, ascending.
    """

    x_K: Floats
    log_tokens_K: Floats

    @staticmethod
    def from_fitted_run(source: FittedRun) -> "TokenClock":
        """The clock of a fitted run.

        Raises:
            TokscaleError: the run does not know its consumed tokens.
        """
        timed_K = np.isfinite(source.x_K)
        log_tokens_K = source.run.x_K("tokens")[timed_K]
        if not np.isfinite(log_tokens_K).all() or (np.diff(log_tokens_K) <= 0).any():
            raise TokscaleError(
                f"the probes of {source.run.path} do not tell how many tokens were consumed"
            )
        return TokenClock(source.x_K[timed_K], log_tokens_K)

    def log_tokens(self, x_E: Floats) -> Floats:
        """ln(consumed tokens) at `x_E`, which is inside the probed range."""
        return np.interp(x_E, self.x_K, self.log_tokens_K)


@dataclass(frozen=True, eq=False)
class WatchedDocuments:
    """The watched documents of a dataset, by their index in its .idx; fields as in the scores.

    Attributes:
        document_W: int64 index, ascending.
        tokens_W: watched tokens whose losses are all finite.
        learning_time_W: ln(consumed tokens); NaN where nothing is learned.
        spread_W: likewise.
        drop_W: nats per token; NaN for a document without such tokens.
        unlearned_W: share; NaN likewise.
    """

    document_W: Integers
    tokens_W: Floats
    learning_time_W: Floats
    spread_W: Floats
    drop_W: Floats
    unlearned_W: Floats

    def rows(self, chosen_W: Mask) -> "WatchedDocuments":
        """The documents in a mask."""
        return WatchedDocuments(*(array[chosen_W] for array in vars(self).values()))

    def within(self, sequences: range) -> "WatchedDocuments":
        """Those of a part of the dataset."""
        return self.rows((self.document_W >= sequences.start) & (self.document_W < sequences.stop))

    def with_tokens(self, min_tokens: int) -> "WatchedDocuments":
        """Those with so many watched tokens."""
        return self.rows(self.tokens_W >= min_tokens)

    def targets(self) -> dict[str, Target]:
        """What a prediction is learned from; learning times count by their drop."""
        by_drop_W = self.tokens_W * self.drop_W
        return {
            "learning_time": Target(self.learning_time_W, by_drop_W),
            "spread": Target(self.spread_W, by_drop_W),
            "drop": Target(self.drop_W, self.tokens_W),
            "unlearned": Target(self.unlearned_W, self.tokens_W),
        }


def _output_paths(portions: Sequence[Portion], out: Path | None, force: bool) -> list[Path]:
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


def _check_probe_set(probe_set: ProbeSet, portions: Sequence[Portion]) -> list[int | None]:
    """Find the datasets in a probe set, of these data's training documents and tokenizer."""
    part = probe_set.origin.part if probe_set.origin else "train"
    if part != "train":
        raise TokscaleError(
            f"the run watched documents of the {part} part; scores need training documents: watch "
            "them with `megatron-tokscale probe build --part train`"
        )
    datasets = probe_set.dataset_indices(
        [whole_prefix(portion.tokens.prefix) for portion in portions]
    )
    if all(dataset is None for dataset in datasets):
        raise TokscaleError(
            f"the run watched {listed(probe_set.datasets)}, the data are "
            f"{listed([portion.name for portion in portions])}; give the data that the probe set "
            "was built from"
        )
    for portion, dataset in zip(portions, datasets, strict=True):
        if dataset is not None:
            _check_tokens(probe_set, np.flatnonzero(probe_set.dataset_N == dataset), portion.tokens)
    return datasets


def _check_tokens(probe_set: ProbeSet, index_N: Integers, tokens: IndexedTokens) -> None:
    """Look up up to 2^14 of a dataset's watched tokens in its files."""
    advice = "give the data, from the tokenizer, that the probe set was built from"
    document_N, position_N = probe_set.document_N[index_N], probe_set.position_N[index_N]
    if index_N.size and document_N.max() >= tokens.n_sequences:
        raise TokscaleError(
            f"the run watched document {document_N.max()} of {tokens.name}, but {tokens.prefix} "
            f"has {tokens.n_sequences}; {advice}"
        )
    if (position_N >= tokens.lengths[document_N]).any():
        raise TokscaleError(
            f"the run watched longer documents of {tokens.name} than {tokens.prefix} has; {advice}"
        )
    at = np.unique(np.linspace(0, index_N.size - 1, _COMPARED_TOKENS).round().astype(np.int64))
    for n in at if index_N.size else []:
        found = int(tokens.sequence(document_N[n])[position_N[n]])
        watched = int(probe_set.label_N[index_N[n]])
        if found != watched:
            raise TokscaleError(
                f"token {position_N[n]} of document {document_N[n]} is {found} in "
                f"{tokens.prefix}.bin, the run watched {watched}; {advice}"
            )


def _read_watched(
    source: FittedRun, clock: TokenClock, datasets: Sequence[int | None]
) -> list[WatchedDocuments]:
    """The scores of all watched documents, dataset by dataset, in one pass over the fits."""
    probe_set = source.run.probe_set
    key_N = probe_set.dataset_N.astype(np.int64) << 32 | probe_set.document_N
    key_U, unit_N = np.unique(key_N, return_inverse=True)
    n_units = len(key_U)
    centre = float(clock.log_tokens_K.mean())
    tokens_U, unlearned_U, drop_U, first_U, second_U = np.zeros((5, n_units))
    at = 0
    for fits in SigmoidFits.blocks(fits_path(source.run)):
        unit = unit_N[at : at + len(fits)]
        at += len(fits)
        complete = fits.complete_N
        never = complete & fits.is_class(TokenClass.FLAT_UNLEARNED)
        events = events_of(fits)
        unit_E, drop_E = unit[events.token_E], events.drop_E
        time_E = clock.log_tokens(events.midpoint_E) - centre
        tokens_U += np.bincount(unit[complete], minlength=n_units)
        unlearned_U += np.bincount(unit[never], minlength=n_units)
        drop_U += np.bincount(unit_E, drop_E, n_units)
        first_U += np.bincount(unit_E, drop_E * time_E, n_units)
        second_U += np.bincount(unit_E, drop_E * time_E**2, n_units)
    mean_U = _ratio(first_U, drop_U)
    variance_U = np.maximum(_ratio(second_U, drop_U) - mean_U**2, 0)
    drop_U, unlearned_U = _ratio(drop_U, tokens_U), _ratio(unlearned_U, tokens_U)
    columns_U = key_U & (2**32 - 1), tokens_U, mean_U + centre, np.sqrt(variance_U), drop_U
    everything = WatchedDocuments(*columns_U, unlearned_U)
    return [
        everything.rows(key_U >> 32 == (-1 if dataset is None else dataset)) for dataset in datasets
    ]


def _ratio(above: Floats, below: Floats) -> Floats:
    ratio = np.full(len(above), np.nan)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


def _check_enough(
    portions: Sequence[Portion],
    watched: Sequence[WatchedDocuments],
    min_tokens: int,
    predict: bool,
) -> None:
    if not any(documents.document_W.size for documents in watched):
        raise TokscaleError(
            f"the run watched no training document of these data by {min_tokens} tokens or more; "
            "watch more of them, or ask for fewer tokens with --min-tokens"
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


def _unwatched(portion: Portion, documents: WatchedDocuments) -> Integers:
    """The training documents that need a prediction: not watched, not empty."""
    is_left_Q = portion.lengths > 0
    is_left_Q[documents.document_W - portion.sequences.start] = False
    return portion.sequences.start + np.flatnonzero(is_left_Q)


def _token_surprisal(portions: Sequence[Portion], vocab_size: int) -> Floats:
    """-ln p of every token id by its count in the training data plus one, in nats."""
    count_V = np.zeros(vocab_size, dtype=np.int64)
    for portion in portions:
        lengths = portion.tokens.lengths
        start = int(lengths[: portion.sequences.start].sum(dtype=np.int64))
        stop = start + portion.n_tokens
        for first, id_T in _stream(portion.tokens):
            _check_ids(portion.tokens, id_T, vocab_size)
            inside_T = id_T[max(start - first, 0) : max(stop - first, 0)]
            count_V += np.bincount(inside_T, minlength=vocab_size)
    return np.asarray(np.log(count_V.sum() + vocab_size) - np.log(count_V + 1.0))


def _document_surprisal(tokens: IndexedTokens, surprisal_V: Floats) -> Floats32:
    """Mean surprisal of each document's tokens in nats; NaN for empty ones."""
    sum_Q = np.zeros(tokens.n_sequences)
    end_Q = np.cumsum(tokens.lengths, dtype=np.int64)
    for first, id_T in _stream(tokens):
        total_T = np.concatenate([[0.0], np.cumsum(surprisal_V[id_T])])
        holding = np.searchsorted(end_Q, [first, first + id_T.size - 1], side="right")
        here = slice(int(holding[0]), int(holding[1]) + 1)
        stop_L = np.minimum(end_Q[here] - first, id_T.size)
        start_L = np.maximum(end_Q[here] - tokens.lengths[here] - first, 0)
        sum_Q[here] += total_T[stop_L] - total_T[start_L]
    return _ratio(sum_Q, tokens.lengths.astype(np.float64)).astype(np.float32)


def _stream(tokens: IndexedTokens) -> Iterator[tuple[int, NDArray[Any]]]:
    """The tokens of a dataset by blocks: the number of the first, and their ids."""
    every_token = tokens.stream(range(tokens.n_sequences))
    for first in range(0, every_token.size, _BLOCK_TOKENS):
        yield first, every_token[first : first + _BLOCK_TOKENS]


def _check_ids(tokens: IndexedTokens, id_T: NDArray[Any], vocab_size: int) -> None:
    if id_T.dtype.kind == "f":
        raise TokscaleError(f"{tokens.prefix} holds {id_T.dtype} numbers, which are no token ids")
    lowest, highest = int(id_T.min()), int(id_T.max())
    if not 0 <= lowest <= highest < vocab_size:
        raise TokscaleError(
            f"{tokens.prefix} has token id {lowest if lowest < 0 else highest}, the vocabulary of "
            f"the run ends at {vocab_size - 1}; these data are from another tokenizer"
        )


def _scores(
    portion: Portion,
    documents: WatchedDocuments,
    predictor: Predictor | None,
    surprisal_Q: Floats32,
    about: Mapping[str, Any],
) -> DocumentScores:
    n_documents = portion.tokens.n_sequences
    values = {name: np.full(n_documents, np.nan, np.float32) for name in documents.targets()}
    watched_Q = np.zeros(n_documents, np.int32)
    watched_Q[documents.document_W] = documents.tokens_W
    for name, target in documents.targets().items():
        values[name][documents.document_W] = target.value_W
    details: dict[str, Any] = {
        **about,
        "prefix": whole_prefix(portion.tokens.prefix),
        "train_documents": [portion.sequences.start, portion.sequences.stop],
        "predictor": None,
    }
    if predictor:
        left = _unwatched(portion, documents)
        for name, predicted_L in predictor.predict(left).items():
            values[name][left] = predicted_L
        for name in ("learning_time", "spread"):
            values[name][values["drop"] == 0] = np.nan
        details["predictor"] = {
            "model": "ridge on hashed tokens and pairs, mean surprisal, log length",
            "documents": predictor.documents,
            "held_out": {name: asdict(errors) for name, errors in predictor.held_out.items()},
        }
    return DocumentScores(
        **{f"{name}_Q": array for name, array in values.items()},
        surprisal_Q=surprisal_Q,
        watched_Q=watched_Q,
        dataset=identity_of(portion.tokens),
        digest=data_digest(portion.tokens),
        details=details,
    )


def _summary(
    portion: Portion, scores: DocumentScores, path: Path, held_out: Mapping[str, HeldOut] | None
) -> ScoreSummary:
    scored_Q = np.isfinite(scores.drop_Q)
    weight_Q = portion.tokens.lengths[scored_Q].astype(np.float64)
    log_time_Q = scores.learning_time_Q[np.isfinite(scores.learning_time_Q)].astype(np.float64)
    low, middle, high = np.exp(np.quantile(log_time_Q, _QUARTILES)) if log_time_Q.size else [0] * 3
    n_watched = int((scores.watched_Q > 0).sum())
    any_scored = bool(weight_Q.sum() > 0)
    return ScoreSummary(
        dataset=portion.name,
        path=path,
        fingerprint=scores.fingerprint,
        documents=len(portion.sequences),
        watched=n_watched,
        predicted=int(scored_Q.sum()) - n_watched,
        drop=float(np.average(scores.drop_Q[scored_Q], weights=weight_Q)) if any_scored else None,
        unlearned=(
            float(np.average(scores.unlearned_Q[scored_Q], weights=weight_Q))
            if any_scored
            else None
        ),
        learning_time=(float(low), float(middle), float(high)) if log_time_Q.size else None,
        held_out=held_out,
    )

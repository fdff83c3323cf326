"""The measurements of the watched documents by a reference run, and by a tuned one.

Target scores: docs/references.md 9.2.

Shapes: W watched documents of a dataset.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.results import FittedRun
from megatron_tokscale.reweight.halves import Halves, Measurement, Pair, fall_steps, read_pair
from megatron_tokscale.reweight.predict import Target
from megatron_tokscale.reweight.watched import TokensByTime, WatchedDocuments, read_watched
from megatron_tokscale.store import Run


@dataclass(frozen=True, eq=False)
class Measured:
    """The watched documents of a dataset, and what is measured of them.

    Attributes:
        document_W: index in the dataset's .idx, ascending.
        tokens_W: watched tokens behind the scores.
        fitted: their scores by fitted sigmoids; None if the run is not fitted.
        differences: their falls and target scores, by the name of the score.
    """

    document_W: Integers
    tokens_W: Floats
    fitted: WatchedDocuments | None
    differences: Mapping[str, Halves]

    def targets(self) -> dict[str, Target]:
        """Return the scores to fit a prediction to."""
        falls = {
            name: Target(halves.mean_W, halves.tokens_W)
            for name, halves in self.differences.items()
        }
        return (self.fitted.targets() if self.fitted else {}) | falls


def pairs_of(
    run: Run,
    tuned: Run | None,
    second: Run | None,
    is_fitted: bool,
    tell: Callable[[str], None],
) -> dict[str, Pair]:
    """Return the two losses of the fall and of the target score, where they can be measured.

    Raises:
        TokscaleError: neither can be, and the run is not fitted; `tuned` or `second` watched other
            tokens; or `second` has no fall between the same steps.
    """
    pairs = {}
    if tuned is not None:
        _check_tokens(run, tuned, "--tuned", "the run tuned on a target")
        before = Measurement(run, int(run.step_K[-1]))
        pairs["target"] = Pair(before, Measurement(tuned, int(tuned.step_K[-1])))
    try:
        early, late = fall_steps(run)
    except TokscaleError as error:
        if second is not None or (not pairs and not is_fitted):
            raise
        tell(f"{error}; the scores have no falls")
    else:
        pairs["fall"] = Pair(Measurement(run, early), Measurement(run, late))
    if second is not None:
        _check_tokens(run, second, "--second", "another seed of the run")
        if (found := fall_steps(second)) != (early, late):
            raise TokscaleError(
                f"--second {second.path} has falls from step {found[0]} to {found[1]}; expected "
                f"{early} to {late}, those of {run.path}; replay the same steps"
            )
        again = Pair(Measurement(second, early), Measurement(second, late))
        pairs["fall"] = pairs["fall"]._replace(second=again)
    return pairs


def _check_tokens(run: Run, other: Run, flag: str, expected: str) -> None:
    """Refuse another run that did not watch the same tokens, or is the reference run.

    Raises:
        TokscaleError: naming what differs.
    """
    if other.probe_set.fingerprint == run.probe_set.fingerprint:
        if other.path.resolve() == run.path.resolve():
            raise TokscaleError(
                f"{flag} {other.path} is the reference run itself; expected a replay of "
                f"{expected}; give that"
            )
        return
    if other.probe_set.vocab_size != run.probe_set.vocab_size:
        raise TokscaleError(
            f"{other.path} watches tokens of a vocabulary of {other.probe_set.vocab_size}, "
            f"{run.path} of {run.probe_set.vocab_size}: another tokenizer; expected one tokenizer "
            "and one probe set; make it with the tokenizer of the reference run"
        )
    raise TokscaleError(
        f"{other.path} watches probe set {other.probe_set.fingerprint}, {run.path} "
        f"{run.probe_set.fingerprint}; expected one probe set for both; replay both on it, with "
        "--tokscale-replay"
    )


def measure(
    portions: Sequence[Portion],
    datasets: Sequence[int | None],
    source: FittedRun | None,
    tokens_by_time: TokensByTime | None,
    pairs: Mapping[str, Pair],
    min_tokens: int,
    tell: Callable[[str], None],
) -> list[Measured]:
    """Return the watched documents of each dataset that are in its part and have enough tokens.

    `tell` receives a note of one line where losses are not finite.
    """
    fits: list[WatchedDocuments] | None = None
    if source is not None and tokens_by_time is not None:
        fits = read_watched(source, tokens_by_time, datasets)
    halves = {name: read_pair(pair, datasets) for name, pair in pairs.items()}
    known = [dataset for dataset in datasets if dataset is not None]
    for name, pair in pairs.items():
        watched = int(np.isin(pair.before.run.probe_set.dataset_N, known).sum())
        if lost := watched - int(sum(each.tokens_W.sum() for each in halves[name])):
            tell(
                f"{lost:,} of {watched:,} watched tokens have a loss that is not finite at one of "
                f"the two probes; the {name} scores are of the others"
            )
    measured = []
    for d, portion in enumerate(portions):
        fitted = None if fits is None else fits[d]
        differences = {name: each[d] for name, each in halves.items()}
        # All of them have the same rows: the documents of the probe set.
        rows = [each for each in (fitted, *differences.values()) if each is not None]
        document_W, tokens_W = rows[0].document_W, rows[0].tokens_W
        chosen_W = (document_W >= portion.sequences.start) & (document_W < portion.sequences.stop)
        chosen_W &= np.min([each.tokens_W for each in rows], axis=0) >= min_tokens
        measured.append(
            Measured(
                document_W[chosen_W],
                tokens_W[chosen_W],
                None if fitted is None else fitted.rows(chosen_W),
                {name: one.rows(chosen_W) for name, one in differences.items()},
            )
        )
    return measured

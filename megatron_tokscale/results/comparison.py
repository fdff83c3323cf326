"""The content of compare.json: two runs on one probe set, compared token by token.

Run A is the baseline, run B the other run. The noise runs are further seeds of A's training.
A token counts as learned by a run if its state at the common end is learned, or known before the
first probe (`fit.states`). Units are documents, or the samples or blocks that stand in for them
(`unit_kind`); intervals are over them.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.resampling import UnitKind
from megatron_tokscale.core.schemas import COMPARISON_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.store.reader import Time

NO_SECOND_SEED: Final = Undefined("undecided: no second seed; give --noise with a second seed of A")
"""Call on a token, a count or a test that needs the noise between seeds."""


def undetermined(found: Undefined) -> str:
    """Return why there is no factor: undecided without a second seed, else not determined."""
    return found.undefined if found == NO_SECOND_SEED else f"not determined: {found.undefined}"


class Difference(StrEnum):
    """Outcome of the test of two spectra."""

    DIFFER = "differ"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs.

    Attributes:
        name: name of the run's directory, with those above it that tell the runs apart.
        fit: identity of its fits.
        last: its last probe on the clock.
        used: its last probe that is compared: the last one at or before the common end.
        probes: number of its probes that are compared.
        refitted: true if it goes on after the common end, so that its losses up to there were
            fitted again.
        learning_rate: its learning rate at the last compared probe, over its peak until then; NaN
            if it is not known.
    """

    name: str
    fit: FitIdentity
    last: float
    used: float
    probes: int
    refitted: bool
    learning_rate: float


@dataclass(frozen=True)
class Change:
    """Tokens that one run has learned and the other has not: gained by B, or lost by B.

    Attributes:
        tokens: tokens that the one run has learned and the other has not, and whose late loss is
            the lower one there.
        seed: the same count for a noise run in the place of B, the mean over the noise runs.
        excess: the first count less the second, with its interval over units.
        called: tokens beyond the noise between seeds at the false discovery rate of the
            comparison; they are the tokens gained, or lost.
        false_calls: tokens of a noise run at least as far out as the least of these, mean over
            the noise runs: the false calls to expect.
    """

    tokens: int
    seed: float | Undefined
    excess: Estimate | Undefined
    called: int | Undefined
    false_calls: float | Undefined


@dataclass(frozen=True)
class Sooner:
    """The factor by which B is sooner than A: above 1, B needs less time.

    Attributes:
        tokens: tokens that the factor is measured on.
        factor: the factor, with its interval over units for these two runs.
        seeds: the factor of each noise run against A, in the order of the noise runs.
        recipe: the factor of B against the mean of A and its noise runs, with an interval over
            units and seeds: it holds for the two ways of training, not just for these runs.
    """

    tokens: int
    factor: Estimate | Undefined
    seeds: tuple[float, ...]
    recipe: Estimate | Undefined


@dataclass(frozen=True)
class GroupComparison:
    """The comparison of a group of tokens.

    Attributes:
        name: name of the group.
        tokens: its tokens with finite losses at all compared probes of all runs.
        learned_a: share of them that A has learned by the common end.
        learned_b: share of them that B has learned.
        gained: tokens that B has learned and A has not, with the lower late loss in B.
        lost: tokens that A has learned and B has not.
        late_loss_a: mean late loss of A in nats.
        lower: late loss of A less that of B in nats, with its interval over units.
        seed_lower: the same for a noise run in the place of B, for each noise run.
        learning_times: the factor by which B learns the tokens that both learn sooner: the median
            over tokens, each counting by its drop.
        late_loss: the factor by which B is sooner at a loss: the run with the lower late loss
            reaches the late loss of the other run sooner by it.
    """

    name: str
    tokens: int
    learned_a: float
    learned_b: float
    gained: Change
    lost: Change
    late_loss_a: float
    lower: Estimate
    seed_lower: tuple[float, ...]
    learning_times: Sooner
    late_loss: Sooner


@dataclass(frozen=True)
class SpectraTest:
    """The drop-weighted learning-time spectra of the runs, and the test of their difference.

    The distance of two spectra is the root mean square, over the compared range of x, of the
    difference of their cumulative sums: of the nats per token learned by each time.

    Attributes:
        edges: edges of the bins of x, the natural logarithm of the clock.
        a: spectrum of A in nats per token and unit of x, by bin.
        b: spectrum of B.
        noise: spectra of the noise runs.
        distance: distance of A and B in nats per token, with its interval over units.
        seeds: distance of A and each noise run.
        p_documents: p-value of the distance where A and B are swapped unit by unit.
        p_seeds: p-value of B among the seeds of A, with one degree of freedom per noise run.
        outcome: "differ" if both p-values are at most the level; else undecided.
        level: level of the test.
    """

    edges: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    noise: tuple[tuple[float, ...], ...]
    distance: Estimate
    seeds: tuple[float, ...]
    p_documents: float
    p_seeds: float | Undefined
    outcome: Difference
    level: float


@dataclass(frozen=True)
class Passage:
    """The text around a token.

    Attributes:
        before: text before it.
        target: its own text.
        after: text after it.
    """

    before: str
    target: str
    after: str


@dataclass(frozen=True)
class ChangedToken:
    """A token that B has gained or lost; one of the strongest.

    Attributes:
        token: its number among the watched tokens.
        dataset: its dataset.
        document: its document within the dataset; None if documents are not known.
        position: its position in the document; None if it is not known.
        state_a: its state in A at the common end, the label of a `TokenState`.
        state_b: its state in B.
        late_loss_a: its late loss in A, in nats.
        late_loss_b: its late loss in B.
        time_a: its learning time in A on the clock; NaN where A has not learned it.
        time_b: its learning time in B.
        z: late loss of A less that of B over the standard deviation of the difference.
        q_value: least false discovery rate at which it is called, or why there is none.
        passage: its text; None for a run without text.
    """

    token: int
    dataset: str
    document: int | None
    position: int | None
    state_a: str
    state_b: str
    late_loss_a: float
    late_loss_b: float
    time_a: float
    time_b: float
    z: float
    q_value: float | Undefined
    passage: Passage | None


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison.

    Attributes:
        rate: false discovery rate of the calls.
        window: the late loss is the mean over this range of x before the common end.
        n_resamples: bootstrap resamples of the units.
        swaps: draws of the test by swapping units.
        seed: seed of all draws.
    """

    rate: float
    window: float
    n_resamples: int
    swaps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The content of compare.json.

    Attributes:
        a: the baseline.
        b: the run that is compared with it.
        noise: further seeds of A; empty without --noise.
        probe_fingerprint: fingerprint of the probe set of all runs.
        clock: the time that the runs have in common.
        clock_name: its name for people.
        end: the common end on the clock.
        n_tokens: number of watched tokens.
        compared: tokens with finite losses at all compared probes of all runs; all others are left
            out of every number.
        n_units: number of documents, or of what stands in for them.
        unit_kind: which of these the intervals resample.
        notes: sentences on what limits the comparison.
        overall: the comparison over all tokens.
        groups: the comparison by grouping: "dataset", "frequency decile", "position decile",
            "class in A".
        spectra: the spectra and their test, or why there is none.
        gained: the strongest gained tokens; without noise runs, the strongest candidates.
        lost: the strongest lost tokens, in the same form.
        settings: settings of the comparison.
    """

    a: ComparedRun
    b: ComparedRun
    noise: tuple[ComparedRun, ...]
    probe_fingerprint: str
    clock: Time
    clock_name: str
    end: float
    n_tokens: int
    compared: int
    n_units: int
    unit_kind: UnitKind
    notes: tuple[str, ...]
    overall: GroupComparison
    groups: dict[str, tuple[GroupComparison, ...]]
    spectra: SpectraTest | Undefined
    gained: tuple[ChangedToken, ...]
    lost: tuple[ChangedToken, ...]
    settings: ComparisonSettings


def read_comparison(path: Path) -> Comparison:
    """Read a compare.json.

    Raises:
        TokscaleError: the file is missing, damaged or of another schema.
    """
    again = "run `megatron-tokscale compare` again"
    return read_typed_result(Comparison, path, COMPARISON_SCHEMA, again)

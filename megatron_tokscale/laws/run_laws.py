"""`laws_run`: open a run's spectrum and losses, compute its laws, write laws.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.schemas import LAWS_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.source import DEFAULT_SPLIT, DataPath, DataSource
from megatron_tokscale.laws.deceleration import fit_deceleration
from megatron_tokscale.laws.estimates import defined
from megatron_tokscale.laws.explain import explanations
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.laws.language.cagnetta import measure_cagnetta
from megatron_tokscale.laws.one_third.one_third import measure_one_third
from megatron_tokscale.laws.power_law.power_law import FIRST_TIME_SHARE, measure_power_law
from megatron_tokscale.laws.power_law.tail import compare_tail, measure_tail
from megatron_tokscale.laws.quanta.quanta import measure_quanta
from megatron_tokscale.laws.several_runs import several_runs
from megatron_tokscale.laws.zero_sum import measure_zero_sum
from megatron_tokscale.results import SpectrumResult
from megatron_tokscale.results.estimate import Undefined, defined_or_reason
from megatron_tokscale.results.laws import (
    DatasetPowerLaw,
    LawsResult,
    LawsSettings,
    LossPowerLaw,
    OtherStart,
    TailExponent,
    TailMinusLaw,
)
from megatron_tokscale.store import Run, check_different_runs, check_same_tokens

_OTHER_STARTS = (0.01, 0.03, 0.3)
"""Other first times of the loss fit, as shares of the last time: they show whether the exponent
depends on the first time (our choice)."""


def laws_run(
    run: Run,
    others: Sequence[Run] = (),
    *,
    from_: float | None = None,
    corpus: DataPath = (),
    split: str | None = DEFAULT_SPLIT,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> LawsResult:
    """Fit the laws of a run's mean losses and spectrum, test the theories, write laws.json.

    The tail of the spectrum ends two typical widths of a transition before the last probe, as a
    later transition has not reached its floor, and starts a decade earlier (our choice). It is
    compared with the power law of the loss from the same start on. The exponents come from the same
    tokens, so their difference is taken resample by resample.

    Args:
        run: an opened run with RUN/analysis/spectrum.npz, spectrum.json and reconstruction.json.
        others: further runs with the same probe set, for the laws over runs.
        from_: first time to fit, in the spectrum's time, and start of the tail; by default a tenth
            of the last time for the loss.
        corpus: words of the job's --data-path, or of each part; empty for no corpus. The
            correlations of the training part's tokens take a minute or two.
        split: the job's --split; None with per-split arguments.
        n_resamples: number of bootstrap resamples of each fit.
        seed: seed of the bootstrap.
        progress: receiver of the name of each stage, and of the lags of the correlations that are
            done; None for none.

    Returns:
        The content of laws.json.

    Raises:
        TokscaleError: the run has no spectrum, or one of other probes; the others watch other
            tokens; a run is given twice; the corpus cannot be read.
    """
    progress = progress or NoProgress()
    sources = _Sources.open(run, others, corpus, split)
    start = FIRST_TIME_SHARE * sources.last_time if from_ is None else from_
    laws = _laws(sources, LawsSettings(start, n_resamples, seed), from_, progress)
    laws = replace(laws, explanations=explanations(laws))
    write_typed_result(run.paths.laws, LAWS_SCHEMA, laws)
    return laws


@dataclass(frozen=True)
class _Sources:
    """Inputs of the laws, all checked. Make them with `_Sources.open`.

    Attributes:
        run: the run.
        others: further runs with the same probe set.
        spectrum: spectrum of the run.
        inputs: arrays of the spectrum that laws need.
        portions: training parts of the corpus; empty without a corpus.
    """

    run: Run
    others: Sequence[Run]
    spectrum: SpectrumResult
    inputs: Inputs
    portions: Sequence[Portion]

    @classmethod
    def open(cls, run: Run, others: Sequence[Run], corpus: DataPath, split: str | None) -> Self:
        """Open the spectrum and the corpus, and verify the losses of all runs.

        Raises:
            TokscaleError: see `laws_run`.
        """
        for each in (run, *others):
            if each.imported and each.imported.axis != "T":
                raise TokscaleError(
                    f"{each.path} has one column per run along {each.imported.axis}; laws need "
                    "losses over time; import a matrix along T of each run"
                )
        check_different_runs([run, *others])
        check_same_tokens([run, *others])
        spectrum = SpectrumResult.open(run)
        inputs = Inputs.from_spectrum(spectrum)
        for each in (run, *others):
            each.verify()
        portions = DataSource(corpus, split).portions("train") if corpus else []
        return cls(run, others, spectrum, inputs, portions)

    @property
    def last_time(self) -> float:
        """Time of the last probe."""
        return float(self.inputs.t_K[-1])


def _laws(
    sources: _Sources, settings: LawsSettings, tail_start: float | None, progress: Progress
) -> LawsResult:
    """Return all laws and theories, without the table of explanations."""
    run, inputs = sources.run, sources.inputs
    n_resamples, seed = settings.n_resamples, settings.seed
    progress.stage("power laws")
    power_laws = _PowerLaws.fit(sources, settings)
    overall = power_laws.overall
    tail = defined_or_reason(lambda: measure_tail(inputs, tail_start))
    several = None
    if sources.others:
        progress.stage("laws over runs")
        several = several_runs([run, *sources.others], n_resamples=n_resamples, seed=seed)
    progress.stage("rival theories")
    return LawsResult(
        fit=sources.spectrum.fit.identity,
        non_finite=sources.spectrum.fit.non_finite,
        settings=settings,
        overall=overall,
        datasets=power_laws.datasets,
        other_starts=power_laws.other_starts,
        tail=tail,
        tail_minus_law=defined_or_reason(lambda: _tail_minus_law(inputs, tail, settings)),
        one_third=defined_or_reason(lambda: measure_one_third(run, inputs)),
        quanta=measure_quanta(run, inputs, overall, seed),
        zero_sum=defined_or_reason(lambda: measure_zero_sum(run, n_resamples, seed)),
        deceleration=defined_or_reason(
            lambda: fit_deceleration(
                run.time_K(), inputs.mean_loss_RK[0], n_resamples=n_resamples, seed=seed
            )
        ),
        several=several,
        cagnetta=measure_cagnetta(
            run,
            sources.portions,
            overall,
            several.chinchilla if several else Undefined("one run has no laws over runs"),
            n_resamples=n_resamples,
            seed=seed,
            progress=progress,
        ),
    )


def _tail_minus_law(
    inputs: Inputs, tail: TailExponent | Undefined, settings: LawsSettings
) -> TailMinusLaw:
    """Compare the tail with the power law of the loss from the start of the tail on.

    Raises:
        UndefinedError: as in `measure_power_law` and `compare_tail`, or there is no tail.
    """
    tail = defined(tail)
    law = measure_power_law(
        inputs.t_K,
        inputs.mean_loss_RK,
        math.exp(tail.from_x),
        settings.n_resamples,
        settings.seed,
    )
    return compare_tail(tail, law)


@dataclass(frozen=True)
class _PowerLaws:
    """Power laws of a run's mean losses: the fields of `LawsResult` with the same names."""

    overall: LossPowerLaw | Undefined
    datasets: tuple[DatasetPowerLaw, ...]
    other_starts: tuple[OtherStart, ...]

    @classmethod
    def fit(cls, sources: _Sources, settings: LawsSettings) -> Self:
        """Fit a power law to all tokens, to each dataset, and to all tokens from other times on."""
        inputs = sources.inputs

        def law(loss_RK: Floats, start: float = settings.start) -> LossPowerLaw | Undefined:
            return defined_or_reason(
                lambda: measure_power_law(
                    inputs.t_K, loss_RK, start, settings.n_resamples, settings.seed
                )
            )

        starts = [share * sources.last_time for share in _OTHER_STARTS]
        return cls(
            overall=law(inputs.mean_loss_RK),
            datasets=tuple(
                DatasetPowerLaw(name, law(inputs.mean_loss_RDK[:, d]))
                for d, name in enumerate(inputs.datasets)
            ),
            other_starts=tuple(
                OtherStart(start, law(inputs.mean_loss_RK, start)) for start in starts
            ),
        )

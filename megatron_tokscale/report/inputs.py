"""The inputs of the page: a run, its analysis, and the other runs and plans that it shows.

Shapes: N tokens.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.data.record import load_records
from megatron_tokscale.data.scores import ScoreDetails, read_score_details, scores_path
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.probe.text import Tokenizer, load_tokenizer
from megatron_tokscale.report.drawn_plan import DrawnPlan, read_plan
from megatron_tokscale.results import (
    AxisResult,
    FittedRun,
    Forecast,
    LawsResult,
    SpectrumResult,
    Transfer,
    read_axis,
    read_forecast,
    read_laws,
    read_transfer,
)
from megatron_tokscale.store import Run


@dataclass(frozen=True)
class ReportInputs:
    """A run with everything that its page shows. Make one with `ReportInputs.read`.

    Attributes:
        run: the run.
        fits: the fits of all N tokens.
        spectrum: the spectrum, its evidence, and the summary of the fits.
        transfers: tests of other runs' learning times on this run.
        laws: the laws of the run; None if there are none.
        forecast: the nats still to come; None if there is no forecast.
        scores: origin of the document scores beside the run's training data, by dataset.
        axes: losses over runs of growing size.
        plan: the data plan that the run followed, and the samples drawn; None without a plan.
        beside: a run that trained under a plan, to compare with this run; None if there is none.
        plan_beside: the data plan that the run `beside` followed.
        tokenizer: decodes the tokens' ids; None shows the ids.
        n_tokens: how many example tokens are shown.
        seed: the seed of the choice of example tokens.
    """

    run: Run
    fits: SigmoidFits
    spectrum: SpectrumResult
    transfers: tuple[Transfer, ...]
    laws: LawsResult | None
    forecast: Forecast | None
    scores: Mapping[str, ScoreDetails]
    axes: tuple[AxisResult, ...]
    plan: DrawnPlan | None
    beside: Run | None
    plan_beside: DrawnPlan | None
    tokenizer: Tokenizer | None
    n_tokens: int
    seed: int

    @property
    def time(self) -> str:
        """The name of the time."""
        return self.spectrum.fit.identity.time_name

    @property
    def units(self) -> str:
        """The units that the intervals resample: documents, samples or blocks."""
        return self.spectrum.fit.identity.unit_kind

    @classmethod
    def read(
        cls,
        run: Run,
        *,
        beside: Run | None = None,
        axes: Sequence[Path] = (),
        tokenizer: Path | None = None,
        n_tokens: int,
        seed: int,
    ) -> Self:
        """Read RUN/analysis, the plans, and the folders of the axes D and M; check them all.

        Raises:
            TokscaleError: a file is missing or damaged, of another schema, or of other probes than
                the run has now; the tokenizer does not fit; another run or an axis is of another
                probe set.
        """
        if beside is not None:
            _check_beside(run, beside)
        fit = FittedRun.open(run).fit
        spectrum = SpectrumResult.open(run)
        return cls(
            run,
            SigmoidFits.load(run.paths.fits),
            spectrum,
            read_transfer(run, fit),
            read_laws(run, fit),
            read_forecast(run, fit),
            _scores_beside(run),
            tuple(read_axis(run, folder) for folder in axes),
            read_plan(run),
            beside,
            read_plan(beside) if beside is not None else None,
            load_tokenizer(tokenizer, run.probe_set) if tokenizer is not None else None,
            n_tokens,
            seed,
        )


def _scores_beside(run: Run) -> dict[str, ScoreDetails]:
    """Return the origin of the scores beside the run's training data, as far as they are here."""
    path = run.paths.data_record
    if not is_there(path):
        return {}
    with suppress(TokscaleError):  # the page can do without scores, `trace` names what is wrong
        prefixes = {
            each.prefix: each.name for record in load_records(path) for each in record.datasets
        }
        found = {name: read_score_details(scores_path(prefix)) for prefix, name in prefixes.items()}
        return {name: details for name, details in found.items() if details is not None}
    return {}


def _check_beside(run: Run, beside: Run) -> None:
    if beside.path.resolve() == run.path.resolve():
        raise TokscaleError(
            f"--beside {beside.path} is the run itself; expected another run with its probe set; "
            "name that run, or leave --beside out"
        )
    if beside.tokens.fingerprint != run.tokens.fingerprint:
        raise TokscaleError(
            f"{run.path} and {beside.path} do not share a probe set; "
            "compare runs that watch the same tokens"
        )
    if not beside.records:
        raise TokscaleError(f"{beside.path} has no probes yet; train it first")

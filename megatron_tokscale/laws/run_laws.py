"""`laws_run`: from a run's spectrum and losses to laws.json."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_tokscale import __version__
from megatron_tokscale.core.checked import write_result
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.schemas import LAWS_SCHEMA
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.source import DEFAULT_SPLIT, DataPath, DataSource
from megatron_tokscale.laws import theories
from megatron_tokscale.laws.explain import explanations
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.laws.plain import or_reason, plain
from megatron_tokscale.laws.power_law.power_law import FIRST_TIME_SHARE
from megatron_tokscale.laws.several_runs import several_runs
from megatron_tokscale.results import SpectrumResult
from megatron_tokscale.store import Run, check_same_tokens

_OTHER_STARTS = (0.01, 0.03, 0.3)
_Z = 1.96


def laws_run(
    run: Run,
    others: Sequence[Run] = (),
    *,
    from_: float | None = None,
    corpus: DataPath = (),
    split: str | None = DEFAULT_SPLIT,
    n_resamples: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Laws of a run's mean losses and of its spectrum, beside the rival theories, to laws.json.

    The tail of the spectrum starts where the fit of the loss does and ends two typical widths of a
    transition before the last probe, later than which a transition has not shown its floor (our
    choice). Its exponent and that of the loss come from the same tokens; their difference is taken
    resample by resample.

    Args:
        run: an opened run with RUN/analysis/spectrum.npz, spectrum.json and reconstruction.json.
        others: further runs with the same probe set, for the laws over runs.
        from_: first time to fit, in the spectrum's time; by default a tenth of the last.
        corpus: the job's --data-path words, or those of each part; the correlations of the tokens
            of the training part take a minute or two.
        split: the job's --split; None with per-split arguments.
        n_resamples: bootstrap resamples of each fit.
        seed: of the bootstrap.
        progress: called with a word on what is done next.

    Returns:
        The content of laws.json. What is not defined is {"undefined": why}.

    Raises:
        TokscaleError: the run has no spectrum, or one of other probes; the others watch other
            tokens; the corpus cannot be read.
    """
    say = progress or (lambda _: None)
    check_same_tokens([run, *others])
    spectrum = SpectrumResult.open(run)
    inputs = Inputs.from_spectrum(spectrum)
    for each in (run, *others):
        each.verify()
    portions = DataSource(corpus, split).portions("train") if corpus else []
    end = float(inputs.t_K[-1])
    start = FIRST_TIME_SHARE * end if from_ is None else from_

    def law(loss_RK: Any, first: float = start) -> dict[str, Any]:
        return or_reason(lambda: theories.power_law(inputs.t_K, loss_RK, first, n_resamples, seed))

    say("power laws")
    overall = law(inputs.mean_loss_RK)
    tail = or_reason(lambda: theories.tail(inputs, start))
    say("rival theories")
    gamma = or_reason(lambda: theories.contexts(run, n_resamples, seed))
    beta = or_reason(lambda: _correlations(portions, seed))
    predicted = or_reason(lambda: theories.cagnetta(gamma, beta))
    result: dict[str, Any] = {
        "schema_version": LAWS_SCHEMA,
        "version": __version__,
        **plain(spectrum.fit.identity),
        "non_finite": plain(spectrum.fit.non_finite),
        "overall": overall,
        "datasets": [
            {"name": name, **law(inputs.mean_loss_RDK[:, d])}
            for d, name in enumerate(inputs.datasets)
        ],
        "other_starts": [
            {"from": share * end, **law(inputs.mean_loss_RK, share * end)}
            for share in _OTHER_STARTS
        ],
        "tail": tail,
        "tail_minus_law": or_reason(lambda: theories.agreement(tail, overall)),
        "one_third": or_reason(lambda: theories.one_third(run, inputs)),
        "quanta": theories.quanta(run, inputs, overall, seed),
        "zero_sum": or_reason(lambda: theories.zero_sum(run, n_resamples, seed)),
        "deceleration": or_reason(lambda: theories.deceleration(run, inputs, n_resamples, seed)),
        "settings": {"from": start, "n_resamples": n_resamples, "seed": seed},
    }
    if others:
        say("laws over runs")
        result["several"] = several_runs([run, *others], n_resamples=n_resamples, seed=seed)
    result["cagnetta"] = {
        "gamma": gamma,
        "beta": beta,
        "predicted": predicted,
        "measured": or_reason(lambda: _against_data(predicted, result)),
    }
    result["explanations"] = explanations(result, spectrum.evidence)
    return write_result(run.analysis / "laws.json", result)


def _correlations(corpus: Sequence[Portion], seed: int) -> Any:
    if not corpus:
        raise UndefinedError("the training data were not given (--data-path)")
    return theories.correlations(corpus, seed)


def _against_data(predicted: dict[str, Any], result: dict[str, Any]) -> Any:
    """alpha_D beside Chinchilla's beta over the runs, or beside the exponent along this run.

    Along one run data and steps go together, and the learning rate has not decayed: the second is
    a makeshift, and says so.
    """
    law = result.get("several", {}).get("chinchilla", {})
    if "beta" in law:
        low, high = law["beta_interval"]
        found = theories.compared(predicted, law["beta"], (high - low) / (2 * _Z))
        return {"of": "Chinchilla's beta over the runs", **plain(found)}
    overall = result["overall"]
    if "undefined" in overall:
        raise UndefinedError(overall["undefined"])
    found = theories.compared(predicted, overall["exponent"], overall["exponent_se"])
    return {"of": "the exponent along this one run", **plain(found)}

"""The section on the data plan: the samples due by it, and the samples drawn.

Shapes: D datasets, Z strata.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.data import PlanProvenance, PlanSources
from megatron_tokscale.report.charts import MAX_SHOWN
from megatron_tokscale.report.drawn_plan import DrawnPlan
from megatron_tokscale.report.html import (
    dataset,
    details,
    escape,
    facts,
    figure,
    number,
    paragraph,
    plural,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.plan.figures import heat_figure, shares_figure
from megatron_tokscale.results.gain import Gain, gain_in
from megatron_tokscale.reweight.gain_text import gain_rows

_Values = Integers | Floats

MAX_ROWS: Final = 40  # rows of the table of shares above which strata are folded away
_MAX_DECISIONS: Final = 12  # decisions above which their table is folded away
_MAX_NAMED: Final = 6  # most names in one line
_HEADER: Final = (
    "base share",
    "target share",
    "drawn share",
    "drawn − target (samples)",
    "epochs",
    "weight first",
    "weight now",
)
_SIZES: Final = {
    "job": "passes through the samples that the job has counted in its datasets",
    "plan": "passes through the samples that the plan was made for",
    "tokens": "estimated: as if all tokens of the datasets were training data",
}
_ORDERS: Final = {
    "learning-time": "learning time",
    "frequency": "token frequency",
    "fall": "fall",
    "target": "target score",
}
_BASES: Final = {
    "plan": "the share in the blend without the plan",
    "stage": "the share by the weights of the plan's first stage",
}


def plan_section(inputs: ReportInputs) -> list[Section]:
    """Return the section on the plan that the run followed."""
    return data_plan(inputs.plan, "plan", "Data plan", "Data plan")


def data_plan(drawn: DrawnPlan | None, anchor: str, entry: str, title: str) -> list[Section]:
    """Return the section on a plan: its shares, and its weights over the samples."""
    if drawn is None:
        return []
    parts = [
        paragraph(
            "This section compares the samples due by the plan with the samples that the run "
            "drew. " + _range(drawn)
        ),
        facts(_facts(drawn)),
        _changes(drawn),
        _remark(drawn),
        *_tables(drawn),
        *(_figures(drawn, anchor) if drawn.n_samples else []),
    ]
    return [Section(anchor, entry, title, parts)]


def _range(drawn: DrawnPlan) -> str:
    """Return a sentence on the samples that are counted."""
    if not drawn.n_samples:
        return "Up to its last probe, the run has drawn no sample by the plan."
    start = f"after the first {number(drawn.start, ',')}, drawn without the plan, "
    return (
        f"The samples drawn are counted in the plan's index, {start if drawn.start else ''}up to "
        f"sample {number(drawn.stop, ',')}, the last one consumed at the run's last probe."
    )


def _facts(drawn: DrawnPlan) -> list[list[str]]:
    plan, made = drawn.plan, drawn.plan.provenance
    rows = [
        ["Plan", _fingerprint(drawn)],
        ["Policy", _policy(made)],
        ["Made from", _sources(made.sources)],
        [
            "Data",
            f"{plural(len(plan.datasets), 'dataset')} in "
            f"{plural(plan.n_strata, 'stratum', 'strata')}, "
            f"samples of {plural(plan.seq_length, 'token')}, seed {plan.seed}",
        ],
        ["Strata", _cuts(drawn)],
        ["Stages", _stages(drawn)],
        ["Limits", _limits(drawn)],
        ["Gain", _gain(drawn)],
    ]
    return [row for row in rows if row[1]]


def _fingerprint(drawn: DrawnPlan) -> str:
    version = drawn.plan.provenance.version
    made_by = f", made by megatron-tokscale {escape(version)}" if version else ""
    given = "" if not drawn.plan.decisions else f"; before the decisions {drawn.given}"
    return drawn.plan.fingerprint + given + made_by


def _policy(made: PlanProvenance) -> str:
    control = f", control: {made.control}" if made.control else ""
    names = ("window", "strength", "top", "share_limit", "n_stages", "first", "interpolation")
    values = {name: made.settings.get(name) for name in names}
    settings = [f"{name.replace('_', ' ')} {v}" for name, v in values.items() if v is not None]
    if made.settings.get("move_shares"):
        settings.append("datasets do not keep their shares")
    parameters = f" ({', '.join(settings)})" if settings else ""
    return escape(f"{made.policy}{control}{parameters}")


def _sources(sources: PlanSources) -> str:
    """Return the runs and scores that a plan was made from."""
    parts = [
        f"{title} {value}"
        for title, value in (
            ("run", sources.run),
            ("scores of the reference run", sources.reference),
            ("time map", sources.time_map),
        )
        if value is not None
    ]
    if sources.scores:
        named = [f"{value} ({name})" for name, value in sources.scores.items()]
        parts.append("scores " + _first_names(named))
    return escape("; ".join(parts))


def _first_names(names: Sequence[str]) -> str:
    """Return a list of names that ends after the first six."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _cuts(drawn: DrawnPlan) -> str:
    """Return the rules that cut datasets into strata; nothing if no dataset is cut."""
    ways: dict[str, list[str]] = {}
    for name, cut in zip(drawn.name_D, drawn.plan.cuts, strict=True):
        if cut is not None:
            way = f"{cut.unit} by {_ORDERS[cut.order]}"
            way += (
                ", with a last stratum of samples that are never learned" if cut.unlearned else ""
            )
            way += f", {cut.held_out} of each held out" if cut.held_out else ""
            ways.setdefault(way, []).append(name)
    return "; ".join(f"{way}: {escape(_first_names(names))}" for way, names in ways.items())


def _stages(drawn: DrawnPlan) -> str:
    """Return the number of stages, and the first one that the run has not reached."""
    starts = [segment.start for segment in drawn.plan.segments]
    begun = sum(start <= drawn.stop for start in starts)
    later = [start for start in starts if start > drawn.stop]
    after = f", the next at sample {number(later[0], ',')}" if later else ""
    length = drawn.plan.replanning.train_samples
    made_for = "" if length is None else f"; made for {plural(length, 'sample')}"
    return f"{number(len(starts), ',')}, {number(begun, ',')} of them begun{after}{made_for}"


def _limits(drawn: DrawnPlan) -> str:
    """Return the plan's limits on weights and epochs."""
    how, most = drawn.plan.replanning, drawn.plan.max_epochs
    epochs = "epochs without limit" if most is None else f"at most {number(most, 'g')} epochs"
    # Weights that are not derived from a run are only limited in epochs.
    policy = drawn.plan.provenance.policy
    if policy in ("unknown", "uniform", "manual") and not drawn.plan.decisions:
        return epochs
    shares = (
        f"; a dataset's share is within a factor of {how.share_limit:g} of its base share"
        if how.share_limit is not None
        else ""
    )
    return (
        f"a weight is at least {how.floor} of base, and changes by at most a factor of "
        f"{how.max_change} from a stage to the next{shares}; {epochs}"
    )


def _gain(drawn: DrawnPlan) -> str:
    """Return what the plan can gain, as its policy has computed it; nothing if it has not."""
    text = "; ".join(f"{name}: {words}" for name, words in gain_rows(drawn.plan))
    gain = gain_in(drawn.plan, Gain)
    advice = f"; advice against it: {'; '.join(gain.advice)}" if gain and gain.advice else ""
    return escape(text + advice)


def _changes(drawn: DrawnPlan) -> str:
    """Return tables of the plans accepted, and the weights decided, while the run trained."""
    parts = []
    if drawn.plan.accepted:
        rows = [[number(each.at, ","), escape(each.plan)] for each in drawn.plan.accepted]
        caption = "Plans that replaced the plan before them, accepted when the job resumed."
        parts.append(table(caption, ["from sample", "plan"], rows))
    if drawn.plan.decisions:
        shown = _shown(drawn, range(len(drawn.plan.datasets)))
        rows = [
            [
                number(decision.start, ","),
                number(decision.step, ","),
                *(number(decision.weights[d] / sum(decision.weights), ".2%") for d in shown),
            ]
            for decision in drawn.plan.decisions
        ]
        header = ["from sample", "losses up to step"]
        header += [dataset(drawn.colour_D[d], name) for d, name in shown.items()]
        caption = "Weights decided while the run trained." + _left_out(drawn, shown)
        decided = table(caption, header, rows, "dense")
        if len(rows) > _MAX_DECISIONS:
            decided = details(
                f"{plural(len(rows), 'decision')} made while the run trained", decided
            )
        parts.append(decided)
    return "\n".join(parts)


def _remark(drawn: DrawnPlan) -> str:
    """Return the strata that are furthest from the plan, and that have the most epochs."""
    if not drawn.n_samples:
        return ""
    off_Z = np.abs(drawn.count_Z - drawn.target_Z)
    epochs_Z = np.nan_to_num(_epochs(drawn.count_Z, drawn.size_Z), posinf=0.0)
    furthest, most = int(np.argmax(off_Z)), int(np.argmax(epochs_Z))
    names = [escape(drawn.plan.strata[z].name) for z in (furthest, most)]
    return paragraph(
        f"The stratum furthest from its target is {names[0]}, by "
        f"{number(float(off_Z[furthest]), ',.2f')} samples. The stratum with the most epochs is "
        f"{names[1]}, with {number(float(epochs_Z[most]))}."
    )


def _tables(drawn: DrawnPlan) -> list[str]:
    """Return tables of datasets and strata; many strata are folded away by dataset."""
    plan = drawn.plan
    of_D = _row(drawn, drawn.by_dataset)
    of_Z = _row(drawn, lambda value_Z: value_Z)
    caption = (
        f"Shares of the {plural(drawn.n_samples, 'sample')} drawn by the plan. Base share: "
        f"{_BASES[drawn.base_from]}. Epochs: {_SIZES[drawn.size_from]}. Weights: those of the "
        f"first sample, {number(drawn.start, ',')}, and of the next one, {number(drawn.stop, ',')}."
    )
    strata = {d: plan.strata_of(d) for d in range(len(plan.datasets))}
    strata = {d: members for d, members in strata.items() if len(members) > 1}
    is_folded = len(plan.datasets) + sum(map(len, strata.values())) > MAX_ROWS
    rows = []
    for d, name in enumerate(drawn.name_D):
        rows.append([dataset(drawn.colour_D[d], name), *of_D(d)])
        if not is_folded:
            rows += [[_part(drawn, z), *of_Z(z)] for z in strata.get(d, [])]
    what = "dataset" if is_folded or not strata else "dataset and stratum"
    parts = [table(caption, [what, *_HEADER], rows, "dense")]
    for d, members in strata.items() if is_folded else ():
        name = dataset(drawn.colour_D[d], drawn.name_D[d])
        inner = table(
            "The shares are shares of all samples.",
            ["stratum", *_HEADER],
            [[_part(drawn, z), *of_Z(z)] for z in members],
            "dense",
        )
        parts.append(details(f"{plural(len(members), 'stratum', 'strata')} of {name}", inner))
    return parts


def _part(drawn: DrawnPlan, z: int) -> str:
    return f'<span class="part">{escape(drawn.name_Z[z])}</span>'


def _row(drawn: DrawnPlan, sums: Callable[[_Values], _Values]) -> Callable[[int], list[str]]:
    """Return a function: a row's number -> its cells. `sums` adds values of strata up to rows."""
    total = max(drawn.n_samples, 1)
    count, target, size = sums(drawn.count_Z), sums(drawn.target_Z), sums(drawn.size_Z)
    first, now = (sums(drawn.weight_Z(sample)) for sample in (drawn.start, drawn.stop))
    base, epochs = sums(drawn.base_Z), _epochs(count, size)

    def cells(row: int) -> list[str]:
        return [
            number(base[row], ".2%"),
            number(target[row] / total, ".2%"),
            number(count[row] / total, ".2%"),
            number(count[row] - target[row], "+,.2f"),
            number(epochs[row]),
            number(first[row], ".2%"),
            number(now[row], ".2%"),
        ]

    return cells


def _epochs(count: _Values, size: _Values) -> Floats:
    """Return the passes through the samples; not finite where a stratum has no samples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(count / np.asarray(size, dtype=np.float64))


def _shown(drawn: DrawnPlan, among: Sequence[int]) -> dict[int, str]:
    """Return index and name of the six datasets with the most samples due."""
    target_D = drawn.by_dataset(drawn.target_Z)
    chosen = sorted(among, key=lambda d: -target_D[d])[:MAX_SHOWN]
    return {d: drawn.name_D[d] for d in sorted(chosen)}


def _left_out(drawn: DrawnPlan, shown: Mapping[int, str]) -> str:
    total = len(drawn.plan.datasets)
    return f" Shown: {len(shown)} of {total} datasets." if len(shown) < total else ""


def _figures(drawn: DrawnPlan, name: str) -> list[str]:
    shown = _shown(drawn, range(len(drawn.plan.datasets)))
    left = " (left of the dotted line: from sample 0, not to scale)" if drawn.start == 0 else ""
    parts = [
        figure(
            shares_figure(name, drawn, shown),
            f"Above: weights of the datasets over the consumed samples{left}. Below: shares of the "
            "datasets in windows of consumed samples. Lines: the shares due by the plan. Points: "
            "the shares drawn. A share in a window is a whole number of samples, so it can miss "
            "its target by up to a sample." + _left_out(drawn, shown),
        )
    ]
    cut = [d for d in range(len(drawn.plan.datasets)) if len(drawn.plan.strata_of(d)) > 1]
    if cut:
        with_strata = _shown(drawn, cut)
        parts.append(
            figure(
                heat_figure(name, drawn, with_strata),
                "Weight of each stratum divided by its base share, against the consumed samples."
                + _left_out(drawn, with_strata),
            )
        )
    return parts

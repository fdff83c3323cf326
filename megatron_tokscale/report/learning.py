"""What the fits say: the spectrum against the derivative, locality, and the classes.

Shapes: N tokens, D datasets.
"""

from typing import Any

import numpy as np

from megatron_tokscale.fit import TokenClass
from megatron_tokscale.report import figures
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.largest import largest_datasets, left_out
from megatron_tokscale.report.markup import (
    bar,
    dataset,
    escape,
    figure,
    number,
    paragraph,
    section,
    swatch,
    table,
)
from megatron_tokscale.report.scale import LABELS
from megatron_tokscale.report.style import RECONSTRUCTIONS

CLASS_MEANINGS = {
    TokenClass.FALLING: "one falling sigmoid: learned",
    TokenClass.TWO_STEP: "two transitions, or down and up",
    TokenClass.GRADUAL: "straight in x after an onset: no step",
    TokenClass.RISING: "one rising sigmoid: forgotten",
    TokenClass.FLAT_KNOWN: "no change, low loss: known before the first probe",
    TokenClass.FLAT_UNLEARNED: "no change, high loss: never learned",
    TokenClass.UNFITTED: "fewer than five finite losses",
}
_INGREDIENTS = {
    "full": "every token's own model",
    "kernel": "drops and learning times, one common width",
    "spectrum": "learning times alone: equal drops, one width",
}


def spectrum(analysis: Analysis) -> str:
    """The measured derivative beside its reconstructions, and how well they agree."""
    about, tokens = analysis.spectrum, analysis.run.probe_set
    before = analysis.reconstruction["fall_before_first_finite_probe"]
    share = ""
    if before is not None:
        share = (
            f" Of the fall, {number(before)} nats per token lie between step 0 and the first probe "
            "after it, which is on no logarithmic axis."
        )
    return section(
        "spectrum",
        "The learning-time spectrum against −dL/dx",
        paragraph(
            "How fast the mean loss falls, in nats per unit of x "
            f"(x = ln of {LABELS[analysis.time]}), beside what the tokens' learning times say it "
            f"should be. The {number(about['n_tokens'], ',')} fitted tokens have "
            f"{number(about['n_events'], ',')} falling transitions, together a drop of "
            f"{number(about['drop_of_events_nats_per_token'])} nats per token; rises are not in "
            f"it. The mean loss fell by {number(about['fall_nats_per_token'])}.{share}"
        ),
        figure(
            figures.derivative(analysis),
            "Black: measured, with a band of two standard errors (noise common to the probes; "
            "not the sampling of tokens). Grey: the drop-weighted spectrum, smoothed by a Gaussian "
            f"of {number(about['bandwidth_x'])} in x. The reconstructions are smoothed as the "
            "measured curve is.",
        ),
        _agreement(analysis.reconstruction),
        paragraph(
            "On the tokens that were fitted, agreement is nearly algebra: the sum of good fits is "
            "a good fit of the sum. " + escape(analysis.reconstruction["other_documents"]["note"]),
            "soft",
        ),
        figure(
            figures.derivative_by_dataset(analysis),
            "Each dataset by itself: measured −dL/dx (line, two standard errors) and drop-weighted "
            "spectrum (filled)." + left_out(largest_datasets(tokens), tokens),
        ),
    )


def _agreement(result: dict[str, Any]) -> str:
    rows = []
    for name, (colour, _) in RECONSTRUCTIONS.items():
        same, other = result["same_tokens"][name], result["other_documents"][name]
        scores = (same["r2"], same["relative_l1"], other["r2"], other["relative_l1"])
        cells = [number(score, ".4f") for score in scores]
        rows.append([f"{swatch(colour, name)}: {_INGREDIENTS[name]}", *cells])
    header = [
        "reconstruction",
        "R², same tokens",
        "relative L1, same tokens",
        "R², other documents",
        "relative L1, other documents",
    ]
    return table("Agreement with the measured derivative over the probed range.", header, rows)


def locality(analysis: Analysis) -> str:
    """Widths of the transitions beside those of tokens that follow the mean curve."""
    observed = analysis.reconstruction["widths"]["observed"]
    null = analysis.reconstruction["widths"]["mean_curve_null"]
    rows = [
        ["fitted tokens in the comparison", *_pair(observed, null, "tokens", ",")],
        ["of these falling, and counted", *_pair(observed, null, "falling", ",")],
    ]
    for quartile, name in (("p25", "a quarter"), ("p50", "half"), ("p75", "three quarters")):
        widths = (observed["width_decades"], null["width_decades"])
        rows.append([f"{name} of the drop is narrower than (decades)", *_pair(*widths, quartile)])
    widths = (observed["width_of_range"], null["width_of_range"])
    rows.append(["median width over the probed range", *_pair(*widths, "p50", ".1%")])
    rows.append(
        [
            "share of the fall inside the tokens' own windows",
            *_pair(observed, null, "fall_in_windows", ".1%"),
        ]
    )
    half = (observed["width_decades"]["p50"], null["width_decades"]["p50"])
    return section(
        "locality",
        "How local learning is",
        paragraph(
            "The time from 10% to 90% of a token's transition, in decades of time. Beside it the "
            "same fit on tokens that each follow the mean curve, with their own level, amplitude "
            "and noise: what would be seen if no token had a learning time of its own."
        ),
        paragraph(
            f"Half of the falling tokens' drop is in transitions narrower than "
            f"{number(half[0], '.2f')} decades; for mean-curve tokens it is "
            f"{number(half[1], '.2f')}.",
            "verdict",
        ),
        figure(
            figures.widths(analysis),
            "Falling tokens with a trusted midpoint, weighted by their drop; two-step and gradual "
            "tokens are in neither histogram. Widths below the spacing of the probes are known "
            "only as small.",
        ),
        table(
            "A window is a token's own 10–90% window; a perfect sigmoid has 80% of its fall there.",
            ["", "observed", "mean-curve null"],
            rows,
        ),
    )


def _pair(observed: Any, null: Any, key: str, pattern: str = ".3f") -> list[str]:
    return [number(observed[key], pattern), number(null[key], pattern)]


def classes(analysis: Analysis) -> str:
    """Tokens and share of the fall per class, overall and per dataset."""
    rows = []
    for token_class, meaning in CLASS_MEANINGS.items():
        counts = analysis.fit["classes"][token_class.label]
        if token_class is TokenClass.UNFITTED and not counts["tokens"]:
            continue
        rows.append(
            [
                f"{token_class.label}: <span class='soft'>{meaning}</span>",
                number(counts["tokens"], ","),
                bar(counts["share"]),
                bar(counts["fall_share"]),
            ]
        )
    return section(
        "classes",
        "Shares of the classes",
        paragraph(
            "Each token belongs to the model that describes its losses best "
            f"({escape(str(analysis.fit['settings']['criterion']))}). The share of the fall is the "
            "class's part of the measured loss at the first probe minus that at the last, summed "
            "over tokens; a class that forgets has a negative one."
        ),
        table(
            f"All {number(analysis.fit['n_tokens'], ',')} tokens; together they fell by "
            f"{number(analysis.fit['fall_nats'], ',.0f')} nats.",
            ["class", "tokens", "share of tokens", "share of the fall"],
            rows,
        ),
        *_classes_by_dataset(analysis),
    )


def _classes_by_dataset(analysis: Analysis) -> list[str]:
    fits, tokens = analysis.fits, analysis.run.probe_set
    shown = [each for each in CLASS_MEANINGS if fits.is_class(each).any()]
    fall_N = np.nan_to_num(fits.fall_N.astype(np.float64))
    header = ["dataset", *(each.label for each in shown)]
    token_rows, fall_rows = [], []
    for d, name in enumerate(tokens.domains):
        of_dataset = tokens.domain_N == d
        total = float(fall_N[of_dataset].sum())
        of_class = [fits.is_class(each)[of_dataset] for each in shown]
        share = [float(mask.mean()) if mask.size else None for mask in of_class]
        fall = [
            float(fall_N[of_dataset][mask].sum()) / total if total else None for mask in of_class
        ]
        token_rows.append([dataset(d, name), *(number(value, ".1%") for value in share)])
        fall_rows.append([dataset(d, name), *(number(value, ".1%") for value in fall)])
    return [
        table("Share of each dataset's tokens.", header, token_rows),
        table("Share of each dataset's own fall.", header, fall_rows),
    ]

"""The section on the classes of trajectories: the tokens and the fall in each class.

Shapes: N tokens, D datasets.
"""

from typing import Final

import numpy as np

from megatron_tokscale.fit import TokenClass
from megatron_tokscale.report.html import (
    bar,
    dataset,
    escape,
    interval,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section

CLASS_MEANINGS: Final = {
    TokenClass.FALLING: "one falling sigmoid: learned",
    TokenClass.TWO_STEP: "two transitions, in one direction or down and up",
    TokenClass.GRADUAL: "a straight line in x after an onset: no step",
    TokenClass.RISING: "one rising sigmoid: forgotten",
    TokenClass.FLAT_KNOWN: "no change, low loss: known before the first probe",
    TokenClass.FLAT_UNLEARNED: "no change, high loss: never learned",
    TokenClass.UNFITTED: "fewer than five finite losses",
}


def classes_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with tokens and shares of the fall per class, and per dataset."""
    fit = inputs.spectrum.fit
    parts = [
        paragraph(
            "Each token belongs to the class whose model describes its losses best, by the "
            f"criterion {escape(fit.settings.criterion)}. The fall of a token is "
            "its measured loss at the first probe minus its loss at the last. A class's share of "
            "the fall is negative if its tokens forget more than they learn."
        ),
        table(
            f"The falls of all {number(fit.n_tokens, ',')} tokens add up to "
            f"{number(fit.fall_nats, ',.0f')} nats. The shares are shares of the tokens "
            f"with finite losses at all probes, with 95% intervals over {inputs.units}.",
            ["class", "tokens", "share of tokens", "share of the fall"],
            _rows(inputs),
        ),
        *_classes_by_dataset(inputs),
    ]
    return [Section("classes", "Classes", "Shares of the classes", parts)]


def _rows(inputs: ReportInputs) -> list[list[str]]:
    rows = []
    for token_class, meaning in CLASS_MEANINGS.items():
        tokens = inputs.spectrum.fit.classes[token_class.label].tokens
        if token_class is TokenClass.UNFITTED and not tokens:
            continue
        found = inputs.spectrum.evidence.classes.get(token_class.label)
        shares = [] if found is None else [found.share, found.fall_share]
        cells = [bar(share.value) + interval(share, ".1%") for share in shares] or ["–", "–"]
        name = f"{token_class.label}: <span class='soft'>{meaning}</span>"
        rows.append([name, number(tokens, ","), *cells])
    return rows


def _classes_by_dataset(inputs: ReportInputs) -> list[str]:
    fits, tokens = inputs.fits, inputs.run.tokens
    shown = [each for each in CLASS_MEANINGS if fits.is_class(each).any()]
    fall_N = np.nan_to_num(fits.fall_N.astype(np.float64))
    header = ["dataset", *(each.label for each in shown)]
    token_rows, fall_rows = [], []
    for d, name in enumerate(tokens.datasets):
        of_dataset = tokens.dataset_N == d
        total = float(fall_N[of_dataset].sum())
        of_class = [fits.is_class(each)[of_dataset] for each in shown]
        share = [float(mask.mean()) if mask.size else None for mask in of_class]
        fall = [
            float(fall_N[of_dataset][mask].sum()) / total if total else None for mask in of_class
        ]
        token_rows.append([dataset(d, name), *(number(value, ".1%") for value in share)])
        fall_rows.append([dataset(d, name), *(number(value, ".1%") for value in fall)])
    return [
        table("Share of each class in the tokens of each dataset.", header, token_rows),
        table("Share of each class in the fall of each dataset.", header, fall_rows),
    ]

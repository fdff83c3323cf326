"""A made-up comparison of two runs, with every kind of number that its page shows."""

import math

from megatron_tokscale.fit.summary import FitIdentity
from megatron_tokscale.results.comparison import (
    NO_SECOND_SEED,
    Change,
    ChangedToken,
    ComparedRun,
    Comparison,
    ComparisonSettings,
    Difference,
    GroupComparison,
    Passage,
    Sooner,
    SpectraTest,
)
from megatron_tokscale.results.estimate import Estimate, Undefined

HOSTILE = "<script>alert('$x$')</script>"


def around(value, error=0.1):
    return Estimate(value, value - error, value + error)


def made_run(name):
    fit = FitIdentity(
        "id", "finger", (0, 1, 2), ("a", "b", "c"), "step", "fit", "step", "documents"
    )
    return ComparedRun(name, fit, 1280.0, 1000.0, 60, refitted=True, learning_rate=0.8)


def made_change(tokens, called, *, seeds):
    if not seeds:
        return Change(tokens, NO_SECOND_SEED, NO_SECOND_SEED, NO_SECOND_SEED, NO_SECOND_SEED)
    return Change(tokens, tokens / 3, around(tokens * 2 / 3, 5.0), called, called / 20)


def made_group(name, k, *, seeds, lower=0.2, factor=1.25):
    sooner = Sooner(
        500 + k,
        around(factor + k / 100),
        (0.99, 1.02) if seeds else (),
        around(factor + k / 50) if seeds else NO_SECOND_SEED,
    )
    return GroupComparison(
        name,
        1000 + k,
        0.70 + k / 100,
        0.75 + k / 100,
        made_change(90 + k, 40 + k, seeds=seeds),
        made_change(30 + k, 7 + k, seeds=seeds),
        2.5,
        around(lower + k / 100),
        (0.01, -0.02) if seeds else (),
        sooner,
        sooner if factor >= 1 else Sooner(500, around(factor), (), NO_SECOND_SEED),
    )


def made_token(token, *, seeds, passage=True):
    return ChangedToken(
        token,
        f"prose {HOSTILE}",
        3,
        17,
        "to come",
        "learned",
        5.25,
        1.125,
        math.nan,
        640.0,
        8.5,
        0.003 if seeds else NO_SECOND_SEED,
        Passage(f"before {HOSTILE} ", HOSTILE, " after") if passage else None,
    )


def made_comparison(*, seeds=True, spectra=True, lower=0.2, factor=1.25):
    """Return a comparison with two further seeds of A, or with none."""
    group = {"seeds": seeds, "lower": lower, "factor": factor}
    test = SpectraTest(
        (0.0, 1.0, 2.0, 3.0),
        (0.5, 1.0, 0.2),
        (0.7, 0.9, 0.1),
        ((0.5, 1.1, 0.2), (0.4, 1.0, 0.3)) if seeds else (),
        around(0.31),
        (0.07, 0.08) if seeds else (),
        0.002,
        0.041 if seeds else NO_SECOND_SEED,
        Difference.DIFFER if seeds else Difference.UNDECIDED,
        0.05,
    )
    return Comparison(
        a=made_run("base"),
        b=made_run(f"wide {HOSTILE}"),
        noise=(made_run("seed 2"), made_run("seed 3")) if seeds else (),
        probe_fingerprint="finger",
        clock="step",
        clock_name="step",
        end=1000.0,
        n_tokens=2100,
        compared=2000,
        n_units=80,
        unit_kind="documents",
        notes=(f"the runs end at different {HOSTILE}",),
        overall=made_group("all", 0, **group),
        groups={
            "dataset": (made_group("prose", 1, **group), made_group(HOSTILE, 2, **group)),
            "frequency decile": (made_group("1", 3, **group), made_group("2", 4, **group)),
            "class in A": (made_group("falling", 5, **group),),
            "position decile": (made_group("1", 6, **group),),
        },
        spectra=test if spectra else Undefined("no event is learned"),
        gained=(made_token(5, seeds=seeds), made_token(6, seeds=seeds, passage=False)),
        lost=(),
        settings=ComparisonSettings(0.05, 0.7, 200, 999, 1),
    )

"""The axes D and M as shifts of the clock: planted worlds, and 22 real models.

    PYTHONPATH=tests/support python benchmarks/axes.py [--worlds 20] [--data DIR]
        [--folder FOLDER] [--out FILE]

DIR holds gemstone_items.npz (gemstone.py names its source). Every finished repetition is a
line in FOLDER; an interrupted study resumes there. About ten seconds a repetition and world, and
five minutes for the real models, on one core.
"""

import argparse
from pathlib import Path

import numpy as np
import planted_axes
from resumable import Lines, share
from table import heading, markdown

from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.spectrum import learning_times

RESAMPLES, TOKENS, DOCUMENTS = 100, 3000, 60
SCENARIOS = {
    **{f"{n} sizes": {"sizes": n, "kappa": 1.0} for n in (5, 8, 12)},
    "5 sizes, 3 seeds": {"sizes": 5, "kappa": 1.0, "seeds": 3},
    "5 sizes, noise 0.2": {"sizes": 5, "kappa": 1.0, "noise": 0.2},
    "5 sizes, small shift": {"sizes": 5, "kappa": 0.35},
    "12 sizes, small shift": {"sizes": 12, "kappa": 0.35},
    "12 sizes, small shift, noise 0.2": {"sizes": 12, "kappa": 0.35, "noise": 0.2},
    "5 sizes, other tokens": {"sizes": 5, "kappa": 0.0, "missing": 0.2},
    "8 sizes, other tokens": {"sizes": 8, "kappa": 0.0, "missing": 0.2},
    "8 sizes, both": {"sizes": 8, "kappa": 0.5, "missing": 0.1},
    "8 sizes, mostly earlier": {"sizes": 8, "kappa": 1.0, "missing": 0.1},
}
ABOUT = """# Axes by shifts of the clock

`PYTHONPATH=tests/support python benchmarks/axes.py {words}`, seeds 0, 1, 2, ...

{about}

"""
PLANTED = """Every token has one sigmoid in ln time; a run that is smaller by u in ln size learns
it later by -kappa u, and never learns a share 1 - exp(missing u) of the tokens
(`tests/support/planted_axes.py`: 3,000 tokens in 60 documents, 74 probes to step 640, sizes over
2.9 e-folds, noise 0.45 nats unless the name says another, seeds jitter each midpoint by 0.3).
"covered": the planted number lies in its 95% interval over documents and runs. "share": of the gain
of size, the same tokens earlier; planted and found. R²: of the last losses of runs that were left
out of the fit. Errors are mean absolute errors on left-out runs in nats. "groups": skill for the
gains of deciles by learning time (fitted in the largest run) from the largest run's own curves; the
null model has 0. "earlier": verdicts on "the gain of size is the same tokens, learned earlier" (at
least half of it).

"""
DELTAS = """The shift of the smallest run against the largest, by two estimators: by the alignment
of mean curves (the shift model, the package's choice), and by the median over tokens of the
difference of their fitted learning times. A token that the smaller run learns too late has no
learning time there: the median is over the early ones, and too small.

"""


def measured(scenario, seed):
    """Return the numbers of one planted world."""
    settings = SCENARIOS[scenario]
    world = planted_axes.World.draw(
        **settings, n_tokens=TOKENS, documents=DOCUMENTS, resamples=RESAMPLES, seed=seed
    )
    largest_P = world.points.run_P == world.points.run_P[-1]
    fits = fit_sigmoids(world.points.x_P[largest_P], world.loss_NP[:, largest_P])
    shift = world.measured(learning_times(fits))
    truth = planted_axes.true_share(
        world.tokens, settings["kappa"], settings.get("missing", 0.0), points=9
    )
    errors = shift.errors
    return {
        "kappa": interval(shift.kappa.both),
        "documents": interval(shift.kappa.documents),
        "runs": interval(shift.kappa.runs),
        "share": interval(shift.share.both),
        "true share": truth,
        "r2": errors.last_r2.uncorrected,
        "errors": [errors.shift_and_floor, errors.plain_shift, errors.additive],
        "groups": shift.groups["time"].skill.both.value,
        "verdict": str(shift.earlier_test.verdict),
    }


def interval(estimate):
    """Return value, low and high."""
    return [estimate.value, estimate.low, estimate.high]


def planted_rows(worlds, lines):
    for seed in range(worlds):
        for name in SCENARIOS:
            lines.once((name, seed), lambda name=name, seed=seed: measured(name, seed))
    for name, settings in SCENARIOS.items():
        found = [lines.by_key[name, seed] for seed in range(worlds)]
        kappa = np.array([each["kappa"] for each in found])
        earlier = np.array([each["share"] for each in found])
        true = np.mean([each["true share"] for each in found])
        errors = np.mean([each["errors"] for each in found], axis=0)
        verdicts = [each["verdict"] for each in found]
        yield [
            name,
            f"{settings['kappa']:g}",
            f"{kappa[:, 0].mean():.3f} ± {kappa[:, 0].std():.3f}",
            covered(kappa, settings["kappa"]),
            f"{true:.2f}",
            f"{earlier[:, 0].mean():.2f} ± {earlier[:, 0].std():.2f}",
            covered(earlier, np.array([each["true share"] for each in found])),
            f"{min(each['r2'] for each in found):.3f}",
            " / ".join(f"{error:.3f}" for error in errors),
            f"{np.mean([each['groups'] for each in found]):.2f}",
            ", ".join(f"{verdicts.count(word)} {word}" for word in sorted(set(verdicts))),
        ]


def covered(interval_W3, true):
    """Return the share of the intervals that hold the planted value, with its exact interval."""
    inside = (interval_W3[:, 1] <= true) & (true <= interval_W3[:, 2])
    return share(inside.sum(), len(inside))


def deltas(kappa, seed):
    """Return the shift of the smallest run by alignment and by the median over tokens."""
    world = planted_axes.World.draw(
        5, kappa=kappa, n_tokens=TOKENS, documents=DOCUMENTS, resamples=2, seed=seed
    )
    aligned = world.measured().runs[0].delta.uncorrected
    times = []
    for run in (0, 4):
        own_P = world.points.run_P == run
        fits = fit_sigmoids(world.points.x_P[own_P], world.loss_NP[:, own_P])
        times.append(learning_times(fits))
    return [aligned, float(np.nanmedian(times[0] - times[1]))]


def delta_rows(worlds, lines):
    for kappa in (0.35, 1.0):
        found = np.array(
            [
                lines.once((f"delta {kappa}", seed), lambda k=kappa, s=seed: deltas(k, s))
                for seed in range(worlds)
            ]
        )
        true = kappa * planted_axes.SPAN
        error = np.sqrt(((found - true) ** 2).mean(axis=0))
        yield [
            f"{true:.3f}",
            *(
                f"{mean:.3f} (error {rms:.3f})"
                for mean, rms in zip(found.mean(0), error, strict=True)
            ),
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--data", type=Path, help="folder of gemstone_items.npz")
    parser.add_argument("--folder", type=Path, default=Path("axes-run"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import scipy
    import torch

    torch.set_num_threads(1)
    lines = Lines(arguments.folder / "planted.jsonl")
    sections = [
        (
            f"Planted worlds, {arguments.worlds} of each",
            PLANTED,
            [
                *(
                    "world",
                    "kappa",
                    "found (mean ± sd)",
                    "covered",
                    "share",
                    "found",
                    "covered",
                    "least R²",
                ),
                "errors: shift and floor / plain shift / E + A N^-a + B t^-b",
                *("groups", "earlier"),
            ],
            planted_rows(arguments.worlds, lines),
        ),
        (
            "The shift of one run, by two estimators",
            DELTAS,
            ["planted", "by alignment of mean curves", "median over tokens"],
            delta_rows(min(arguments.worlds, 5), lines),
        ),
    ]
    if arguments.data:
        import gemstone

        sections += gemstone.sections(arguments.data, Lines(arguments.folder / "gemstone.jsonl"))
    text = ""
    for title, about, columns, rows in sections:
        section = f"## {title}\n\n{about}{markdown(columns, list(rows))}\n\n"
        print(section, flush=True)
        text += section
    if arguments.out:
        words = f"--worlds {arguments.worlds}" + (" --data DIR" if arguments.data else "")
        about = heading(torch=torch.__version__, scipy=scipy.__version__, numpy=np.__version__)
        arguments.out.write_text(ABOUT.format(words=words, about=about) + text.rstrip() + "\n")


if __name__ == "__main__":
    main()

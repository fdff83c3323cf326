"""Back-tests of `forecast`: the hazard of falls beside the power law of the mean.

    PYTHONPATH=tests/support OMP_NUM_THREADS=1 python benchmarks/forecast.py --data DIR \\
        --ledger FILE [--seeds 10] [--models 22] [--items 2000] [--runs RUN ...] [--out FILE]

- Planted worlds (`planted_worlds.py`): 6,000 tokens, 59 probes to step 640. The truth is known to
  step 6,400, so the forecast itself is scored, not its back-tests alone; and so is the method that
  `forecast` prints first, the best of its back-tests.
- Gemstone: items of four tasks in 22 models (`gemstone_items`); back-tests from a quarter and from
  half of 350 billion tokens.
- The OLMo ladder: losses of 11 datasets without tokens, so without a hazard: the power law and the
  slope alone, from half of the time at which the learning rate is half its peak.
- Runs of the plugin, by --runs: the back-tests of `megatron-tokscale forecast` on 10,000 tokens.

Every result is a line of FILE; a benchmark that was stopped resumes. A core of a machine at rest
takes 4 s for a planted world, 3 s for a task of a model, and 5 s for a run: about ten minutes
for all of the defaults (reckoned from these).

Shapes: N tokens, K probes, M models.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import scipy
from gemstone import Items
from planted_worlds import WORLDS, axis, noise, text_of
from real_laws import Ladder
from resumable import Lines, share
from table import heading, print_sections

from megatron_tokscale.compare.forecast.judge import judge
from megatron_tokscale.compare.forecast.origin import Forecaster, Watched
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.estimate import Estimate, defined_or_reason
from megatron_tokscale.results.forecast import FACTORS, ORIGINS, Method, Origin
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency, token_groups
from megatron_tokscale.spectrum.run_spectrum import draw_tokens
from megatron_tokscale.spectrum.scored_range import scored_range, scored_range_of
from megatron_tokscale.store import Run

TOKENS, LAST = 6000, 640
RUN_TOKENS = 10_000
RESAMPLES = 200
CURVE_RESAMPLES = 20  # of a curve of the ladder, of which there are 220
PLANTED = {"A2": 0, "A3": 1, "B1": 2, "B2": 3, "C": 5, "D": 6}
"""Worlds, and the second part of their seeds. B3 is none: its decay ends with the run."""
METHODS = (Method.COMBINATION, Method.HAZARD, Method.POWER_LAW, Method.SLOPE, Method.NOTHING)
SHOWN = METHODS[:4]
CHOSEN_ON = ("baseline", "hidden64", "hidden192")
"""Runs on which combination and slope were chosen, with the planted worlds of odd seeds."""
QUANTA = "quanta"
"""Run on the quanta corpus: held out, and no run of the demo."""
COLUMNS = [
    *("", "origin", "by", "forecasts", "fall that came, nats"),
    *(f"{method}: error" for method in SHOWN),
    "printed first: error",
    *(f"{method}: covered" for method in SHOWN),
]
ABOUT = """Errors are sums of absolute errors over the sum of the falls that came; "nothing more
falls" has an error of 100% where all falls are positive. Covered: forecasts whose 95% interval
holds what came; where that is measured, both intervals meet. Printed first: the best method by the
back-tests of the same run. Chosen on the runs `baseline`, `hidden64` and `hidden192` and on the
planted worlds of odd seeds: the combination (among means of two and of three methods, with equal
weights and with weights by earlier errors), the measure of the slope, and what is done with a
hazard without a correction: its interval, and that it is left out of the combination. The choice
used the back-tests of both and the forecasts from T of the worlds. By the back-tests alone, with
uncorrected hazards in it, the mean of all three methods had errors of 14% (runs) and 9% (worlds),
that of two 12% and 15%; from T on 22% and 13%. The hazard's own constants were chosen earlier, on
other draws of the worlds A2, B1, B2, C and D and on `baseline`. Held out: the runs `seed2`,
`hidden32`, `hidden48` and `hidden96`, even seeds, Gemstone's items and the ladder. The runs: the
demo (`baseline`, hidden size 128), another seed, and other hidden sizes; 1,280 steps each; and
`quanta`, of `examples/quanta_corpus/study.py --until reference`, 600 steps, held out too."""


def watched_of(
    x_K, loss_NK, dataset_N, document_N, groups, from_x, to_x, seed, resamples=RESAMPLES
):
    """Return the tokens of a forecast, from arrays."""
    names = tuple(str(each) for each in np.unique(dataset_N))
    units = Units.from_documents(dataset_N, document_N, seed)
    return Watched(
        x_K=x_K,
        loss_NK=loss_NK.astype(np.float32),
        groups=groups,
        classes={"group": groups},
        dataset_N=dataset_N.astype(np.int16),
        datasets=names,
        units=units,
        weight_RU=units.weights(resamples, seed),
        from_x=from_x,
        to_x=to_x,
        takes_shifts_out=True,
        seed=seed,
    )


def back_tests(forecaster):
    """Return the back-tests of a forecaster."""
    return [defined_or_reason(lambda share=share: forecaster.origin(share)) for share in ORIGINS]


def rows_of(origin, came_H=None):
    """Return the numbers of an origin's horizons as plain values."""
    found = []
    for h, horizon in enumerate(origin.horizons):
        truth = Estimate(came_H[h]) if came_H is not None else horizon.measured
        row = {"origin": origin.share, "factor": horizon.factor, "came": truth.value}
        for method in METHODS:
            said = horizon.falls[method]
            if isinstance(said, Estimate):
                low, high = (truth.low, truth.high) if truth.has_interval else [truth.value] * 2
                meets = bool(said.low <= high and low <= said.high) if said.has_interval else None
                row[method.value] = [said.value, meets]
        found.append(row)
    return found


def planted(name, seed):
    """Return the results in a planted world: its horizons, and the standings of the methods."""
    rng = np.random.default_rng([seed, PLANTED[name]])
    text, x_K = text_of(TOKENS, rng), axis(10 * LAST)
    clean_NK = WORLDS[name].draw(text, x_K, rng)
    loss_NK = clean_NK + noise(text, len(x_K), rng)
    mean_K, past_K = clean_NK.mean(axis=0), x_K <= math.log(LAST) + 1e-9
    scored = scored_range(
        x_K[past_K], loss_NK[:, past_K].mean(axis=0), text.entropy, np.full(past_K.sum(), np.nan)
    )
    groups = groups_by_frequency(text.dataset_N, text.log_share_N)
    watched = watched_of(
        x_K[past_K],
        loss_NK[:, past_K],
        text.dataset_N,
        text.document_N,
        groups,
        scored.from_x,
        scored.to_x,
        seed,
    )
    forecaster = Forecaster(watched)
    tests = back_tests(forecaster)
    later = [math.log(LAST * factor) for factor in FACTORS]
    came_H = np.interp(math.log(LAST), x_K, mean_K) - np.interp(later, x_K, mean_K)
    rows = rows_of(forecaster.origin(1.0), came_H.tolist())
    rows += [row for test in tests if isinstance(test, Origin) for row in rows_of(test)]
    return {"rows": rows, "standing": standings(tests)}


def standings(tests):
    """Return the standing of each method by the back-tests, the best first."""
    return [[each.method.value, each.standing.value] for each in judge(tests)]


def items_of(data, task, model, most):
    """Return the results on the items of a task in a model."""
    loss_NK = data.of(task)[:most, data.models.index(model)]
    zeros_N, item_N = np.zeros(len(loss_NK), np.int64), np.arange(len(loss_NK))
    watched = watched_of(
        data.x_K,
        loss_NK,
        zeros_N,
        item_N,
        groups_by_frequency(zeros_N),
        data.x_K[0],
        data.x_K[-1],
        0,
    )
    tests = back_tests(Forecaster(watched))
    rows = [row for test in tests if isinstance(test, Origin) for row in rows_of(test)]
    return {"rows": rows, "standing": standings(tests)}


def ladder_row(ladder, key, dataset):
    """Return the results on a curve of the ladder: without tokens, so without a hazard."""
    tokens_K, loss_K = ladder.losses(*key, dataset)
    table = ladder.tables[key]
    (curve,) = (each for each in table.curves if each.name == dataset)
    step_K = curve.step_K.astype(np.int64)
    rate_K = np.asarray(table.rates())[np.minimum(step_K, len(table.rates()) - 1)]
    timed_K = tokens_K > 0
    x_K, loss_K, rate_K = np.log(tokens_K[timed_K]), loss_K[timed_K], rate_K[timed_K]
    scored = scored_range(x_K, loss_K, None, rate_K)
    zeros_N = np.zeros(1, np.int64)
    groups, ends = groups_by_frequency(zeros_N), (scored.from_x, scored.to_x)
    watched = watched_of(
        x_K, loss_K[None], zeros_N, zeros_N, groups, *ends, 0, resamples=CURVE_RESAMPLES
    )
    found = Forecaster(watched).origin(0.5)
    return {"rows": rows_of(found)}


def run_rows(path, seed):
    """Return the back-tests of a run, on tokens drawn from it."""
    run = Run.open(path)
    x_K, tokens = run.x_K(), run.tokens
    scored = scored_range_of(run, x_K, run.mean_losses())
    chosen = draw_tokens(run.n_tokens, RUN_TOKENS, seed)
    loss_NK = run.read_losses(0, run.n_tokens)[chosen]
    groups = token_groups(tokens).rows(chosen)
    place_N = tokens.dataset_N[chosen], tokens.document_N[chosen]
    watched = watched_of(x_K, loss_NK, *place_N, groups, scored.from_x, scored.to_x, seed)
    tests = back_tests(Forecaster(watched))
    rows = [row for test in tests if isinstance(test, Origin) for row in rows_of(test)]
    errors = [
        [test.share, *vars(test.group_errors["group"]).values()]
        for test in tests
        if isinstance(test, Origin) and test.group_errors
    ]
    return {"rows": rows, "standing": standings(tests), "groups": errors}


def table_rows(results):
    """Return a row of the table for each name, origin and factor; `results` are pairs of a name
    and a result."""
    cells = {}
    for name, result in results:
        for row in result["rows"]:
            entry = row, result.get("standing", [[None]])[0][0]
            cells.setdefault((name, row["origin"], row["factor"]), []).append(entry)
    for (name, origin, factor), found in cells.items():
        rows = [row for row, _ in found]
        came = sum(abs(row["came"]) for row in rows)
        from_ = "T" if origin == 1 else f"T/{1 / origin:g}"
        errors, covered = [], []
        for method in SHOWN:
            said = [row[method.value] for row in rows if method.value in row]
            if len(said) < len(rows):
                errors.append("-")
            else:
                miss = sum(abs(row[method.value][0] - row["came"]) for row in rows)
                errors.append(f"{miss / came:.0%}")
            meets = [each[1] for each in said if each[1] is not None]
            covered.append(share(sum(meets), len(meets)) if meets else "-")
        yield [
            *(name, from_, f"x{factor:g}", str(len(rows)), f"{came / len(rows):.3f}"),
            *errors,
            first(found) if origin == 1 else "-",
            *covered,
        ]


def first(found):
    """Return the error of the methods that are printed first; `found` are rows with these."""
    miss = sum(abs(row[method][0] - row["came"]) for row, method in found)
    return f"{miss / sum(abs(row['came']) for row, _ in found):.0%}"


def standing_rows(results):
    """Return, by name, the share of runs in which each method stands, and is the best."""
    by_name = {}
    for name, result in results:
        by_name.setdefault(name, []).append(result["standing"])
    for name, found in by_name.items():
        cells = []
        for method in SHOWN:
            stands = sum(dict(each)[method.value] == "stands" for each in found)
            best = sum(each[0][0] == method.value for each in found)
            cells.append(f"{stands} / {best}")
        nothing = sum(each[0][0] == Method.NOTHING.value for each in found)
        yield [name, str(len(found)), *cells, str(nothing)]


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--ledger", type=Path, required=True, help="file of the results so far")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", type=int, default=22)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    lines = Lines(arguments.ledger)
    worlds = [
        (seed, name, lines.once(("planted", name, seed), planted, name, seed))
        for seed in range(arguments.seeds)
        for name in PLANTED
    ]
    data = Items(arguments.data / "gemstone_items" / "gemstone_items.npz")
    # Spread over the sizes, the largest first.
    models = [
        data.models[m]
        for m in np.linspace(len(data.models) - 1, 0, arguments.models).round().astype(int)
    ]
    items = [
        (
            task,
            lines.once(
                ("gemstone", task, model, arguments.items),
                items_of,
                data,
                task,
                model,
                arguments.items,
            ),
        )
        for model in models
        for task in data.tasks
    ]
    ladder = Ladder.read(arguments.data / "olmo_ladder")
    curves = [
        (key[0], lines.once(("olmo", *key, dataset), ladder_row, ladder, key, dataset))
        for key in ladder.tables
        for dataset in ladder.datasets
    ]
    runs = [
        (path.name, lines.once(("run", str(path)), run_rows, path, 0)) for path in arguments.runs
    ]
    halves = {True: "chosen on", False: "held out"}
    both = [
        *((halves[seed % 2 == 1], result) for seed, _, result in worlds),
        *((halves[name in CHOSEN_ON], result) for name, result in runs),
    ]
    held = [(name, result) for seed, name, result in worlds if seed % 2 == 0]
    demo = [(name, result) for name, result in runs if name != QUANTA]
    runs += [(f"all of the demo {halves[name in CHOSEN_ON]}", result) for name, result in demo]
    standing = ["", "runs", *(f"{method}: stands / best" for method in SHOWN), "nothing best"]
    sections = [
        ("Planted worlds and runs by what they were used for", COLUMNS, table_rows(both)),
        ("Planted worlds, held out", COLUMNS, table_rows(held)),
        ("Planted worlds, held out: what the back-tests say", standing, standing_rows(held)),
        ("Runs of the plugin", COLUMNS, table_rows(runs)),
        ("Runs of the plugin: what the back-tests say", standing, standing_rows(runs)),
        ("Gemstone items", COLUMNS, table_rows(items)),
        ("Gemstone items: what the back-tests say", standing, standing_rows(items)),
        ("OLMo ladder, 11 datasets of each run", COLUMNS, table_rows(curves)),
    ]
    text = print_sections(section for section in sections)
    if arguments.out:
        command = (
            "PYTHONPATH=tests/support OMP_NUM_THREADS=1 python benchmarks/forecast.py --data DIR "
            f"--ledger FILE --seeds {arguments.seeds} --models {arguments.models} "
            f"--items {arguments.items} --runs {' '.join(map(str, arguments.runs))}"
        )
        about = heading(scipy=scipy.__version__, numpy=np.__version__)
        arguments.out.write_text(f"# Forecasts\n\n`{command}`\n\n{about}\n\n{ABOUT}\n\n{text}")


if __name__ == "__main__":
    main()

"""The steps of the demo; a step whose result exists is skipped."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, write_json
from megatron_tokscale.core.progress import ProgressOnStderr
from megatron_tokscale.core.writable import unwritable
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.demo import corpus
from megatron_tokscale.demo.job import FULL, QUICK, SPLIT, Size, is_trained, megatron_flags, train
from megatron_tokscale.store import Run

if TYPE_CHECKING:
    from megatron_tokscale.reweight import Job

_SEED: Final = 1234  # for the choice of documents and watched tokens, and the order of samples
_ANALYSIS_SEED: Final = 0  # for the draws of the spectrum; the published numbers use it
_PROBE_SCHEDULE: Final = "log:per-octave=8+last"


def run_demo(out: Path, *, quick: bool = False) -> Path:
    """Run the whole loop in `out`, print where the report is, and return its path.

    A demo that was stopped resumes.

    Raises:
        TokscaleError: `out` cannot be written, holds other files or a demo of another size, or a
            step failed.
    """
    size = QUICK if quick else FULL
    _claim(out, size)
    started = time.monotonic()
    demo = _Demo(out, size)
    steps: list[tuple[str, Callable[[], None]]] = [
        ("tokenize speeches and Python's library", demo.make_data),
        ("choose the tokens to watch", demo.choose_tokens),
        ("train with probes (Megatron, two processes)", demo.train_baseline),
        ("fit a sigmoid to every token; spectrum", lambda: demo.analyse(demo.baseline)),
        ("plan the data by what is about to be learned", demo.make_plan),
        ("train again under the plan", demo.train_planned),
        ("fit and spectrum of the second run", lambda: demo.analyse(demo.planned)),
        ("forecast of the first run", demo.forecast),
        ("report", demo.write_report),
    ]
    for number, (what, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {what}", flush=True)
        step()
    print(f"done in {time.monotonic() - started:.0f} s: open {demo.report}")
    return demo.report


def _claim(out: Path, size: Size) -> None:
    """Note the demo's size in `out`, a new or empty folder or that of a demo which was stopped.

    Raises:
        TokscaleError: `out` cannot be written, or holds other files or a demo of another size.
    """
    known = out / "demo.json"
    if reason := unwritable(out, known.name):
        raise TokscaleError(
            f"{out} cannot be written to ({reason}); expected a folder; give another --out"
        )
    if not known.exists():
        if out.exists() and any(out.iterdir()):
            raise TokscaleError(
                f"{out} holds other files than a demo's; expected a new or an empty folder; give "
                "another --out"
            )
        write_json(known, asdict(size))
    elif read_json(known) != asdict(size):
        raise TokscaleError(f"{out} holds a demo of another size; remove it or give another --out")


class _Demo:
    """The demo's files, and the steps that make them."""

    def __init__(self, out: Path, size: Size):
        self.out, self.size = out, size
        self.tokenizer = out / "tokenizer.json"
        self.probe_set = out / "probe.safetensors"
        self.plan, self.uniform = out / "plan.json", out / "uniform.json"
        self.baseline, self.planned = out / "baseline", out / "planned"
        self.prefixes = [out / "data" / name for name in ("speeches", "python")]
        self.report = out / "report.html"

    @property
    def data_path(self) -> list[str]:
        """Words of Megatron's --data-path: both kinds of text in equal parts."""
        return [word for prefix in self.prefixes for word in ("0.5", str(prefix))]

    def make_data(self) -> None:
        """Tokenize both kinds of text, with one tokenizer that is trained on them."""
        done = self.out / "data" / "done.json"
        if done.exists():
            return
        done.parent.mkdir(parents=True, exist_ok=True)
        size = self.size
        texts = [
            corpus.take(documents, size.characters, _SEED)
            for documents in (corpus.speeches(), corpus.library_source())
        ]
        corpus.train_tokenizer(
            [text for part in texts for text in part], size.vocab_size, self.tokenizer
        )
        counts = {}
        for prefix, part in zip(self.prefixes, texts, strict=True):
            n_tokens = corpus.write_dataset(part, self.tokenizer, prefix)
            counts[prefix.name] = {"documents": len(part), "tokens": n_tokens}
            print(f"  {prefix.name}: {len(part)} documents, {n_tokens:,} tokens", flush=True)
        write_json(done, counts)

    def choose_tokens(self) -> None:
        """Draw windows of held-out documents, as many tokens from each kind of text."""
        from megatron_tokscale.probe.build import ProbeSettings, build_probe_set, describe

        if not self.probe_set.exists():
            settings = ProbeSettings(
                data_path=self.data_path,
                split=SPLIT,
                seq_length=self.size.seq_length,
                vocab_size=self.size.vocab_size,
                n_tokens=self.size.probe_tokens,
                eod=0,
                seed=_SEED,
            )
            probe_set = build_probe_set(settings)
            probe_set.save(self.probe_set)
            _print_indented(describe(probe_set))

    def train_baseline(self) -> None:
        """Train on the base weights, in the keyed order of samples that all plans have."""
        from megatron_tokscale.reweight import plan_uniform

        if not self.uniform.exists():
            plan_uniform(self._job(), self.uniform)
        self._train("baseline", self.baseline, self.uniform)

    def train_planned(self) -> None:
        """Train the same model again under the plan."""
        self._train("planned", self.planned, self.plan)

    def _train(self, what: str, run: Path, plan: Path) -> None:
        if is_trained(run, self.size.train_iters):
            return
        probe = ["--tokscale-probe-set", str(self.probe_set)]
        probe += ["--tokscale-probe-schedule", _PROBE_SCHEDULE]
        megatron = megatron_flags(self.size, self.data_path, self.out / "cache")
        train(what, run, self.size, [*megatron, *probe, "--tokscale-plan", str(plan)])
        if not is_trained(run, self.size.train_iters):
            raise TokscaleError(f"the training job ended early; see the end of {run / 'train.log'}")

    def analyse(self, path: Path) -> None:
        """Fit a run, find its spectrum, and print both."""
        from megatron_tokscale.fit import fit_run
        from megatron_tokscale.fit.fit_text import describe_fit
        from megatron_tokscale.results import SpectrumResult
        from megatron_tokscale.spectrum import spectrum_run
        from megatron_tokscale.spectrum.spectrum_text import describe_datasets, describe_spectrum

        run = Run.open(path)
        if not run.paths.reconstruction.exists():
            fit_run(run, progress=ProgressOnStderr())
            spectrum_run(run, seed=_ANALYSIS_SEED)
        spectrum = SpectrumResult.open(run)
        _print_indented(describe_fit(spectrum.fit))
        print(describe_spectrum(spectrum.evidence))
        print(describe_datasets(spectrum.summary), flush=True)

    def make_plan(self) -> None:
        """Make and print a plan: weights per kind of text, from the first run's spectra."""
        from megatron_tokscale.data import Plan
        from megatron_tokscale.reweight import describe_plan, plan_run

        if not self.plan.exists():
            plan_run(Run.open(self.baseline), self._job(), self.plan)
        _print_indented(describe_plan(Plan.load(self.plan)).strip())

    def _job(self) -> "Job":
        from megatron_tokscale.reweight import job_of

        size, data = self.size, DataSource(self.data_path, SPLIT)
        return job_of(data, size.train_samples, size.seq_length, _SEED)

    def forecast(self) -> None:
        """Forecast what the first run has still to learn, and print the forecast."""
        from megatron_tokscale.compare.forecast import describe_forecast, forecast_run
        from megatron_tokscale.results import SpectrumResult
        from megatron_tokscale.results.forecast import read_forecast

        run = Run.open(self.baseline)
        found = read_forecast(run, SpectrumResult.open(run).fit)
        if found is None:
            found = forecast_run(run, seed=_ANALYSIS_SEED, progress=ProgressOnStderr())
        print(describe_forecast(found), flush=True)

    def write_report(self) -> None:
        """Write one page about both runs."""
        from megatron_tokscale.report import report_run

        report_run(
            Run.open(self.baseline),
            beside=Run.open(self.planned),
            tokenizer=self.tokenizer,
            out=self.report,
            seed=_ANALYSIS_SEED,
        )


def _print_indented(text: str) -> None:
    print("  " + text.replace("\n", "\n  "), flush=True)

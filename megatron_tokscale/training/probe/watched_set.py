"""One probe set of a job, with its run directory, its metrics and its last losses.

Shapes: N watched tokens, V values of one probe.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from megatron.training import global_vars

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import renamed
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.progress import ProgressTracker, catch_up
from megatron_tokscale.training.probe.metrics import Detokenizer, Metrics
from megatron_tokscale.training.probe.probe_store import ProbeStore
from megatron_tokscale.training.scalars import reported
from megatron_tokscale.training.settings import JobProbeSettings, ProbeSetFile

_TIMER: Final = "tokscale-probe"


class WatchedSet:
    """A probe set that a job watches. All ranks hold one and act together.

    Attributes:
        name: name in the log; empty for the job's first set.
        probe_set: the watched tokens.
        store: the run directory.
        previous_N: losses of the last probe, on the rank that writes.
    """

    def __init__(
        self,
        file: ProbeSetFile,
        probe_set: ProbeSet,
        settings: JobProbeSettings,
        run: Path,
        args: Namespace,
    ) -> None:
        """Check the run directory.

        Args:
            file: the file of the probe set.
            probe_set: its content.
            settings: settings of the job's probes.
            run: run directory of the job.
            args: Megatron's arguments.

        Raises:
            TokscaleError: the run directory is of another run.
        """
        self.name, self.probe_set = file.name, probe_set
        self.store = ProbeStore(
            file.directory(run), probe_set, args, stops_on_error=settings.stops_on_write_error
        )
        self._metrics = Metrics(
            probe_set,
            settings.fall_threshold,
            _tokenizer_of_text(args) if self.store.is_writer else None,
            _names_in_log(probe_set, args),
        )
        self._tracker = ProgressTracker()
        self.previous_N: Floats32 | None = None

    @property
    def timer(self) -> str:
        """The name of the timer of the set's passes."""
        return f"{_TIMER}-{self.name}" if self.name else _TIMER

    @property
    def n_values(self) -> int:
        """Number of values V."""
        return self._metrics.n_values

    def measure(self, step: int, loss_N: Floats32 | None) -> Floats:
        """Return the V values of the probe at `step`, and remember its losses.

        They are zeros on a rank without losses. Only one rank has losses, and the others wait for
        it: an error of any kind is printed there, and the values of that probe are unknown.
        """
        if loss_N is None:
            return np.zeros(self.n_values)
        values_V = np.full(self.n_values, np.nan)
        of_set = f"{self.name} " if self.name else ""
        with reported(f"the metrics of the {of_set}probe at step {step} are not in the log"):
            values_V = self._measured(step, loss_N)
        self.previous_N = loss_N
        return values_V

    def _measured(self, step: int, loss_N: Floats32) -> Floats:
        """Return the V values of the probe at `step`.

        The states of tokens depend on losses of earlier probes. Those that this job has not taken
        are read from disk, at its first probe.
        """
        if self._tracker.time is not None and self._tracker.time >= step:  # a replay fills a gap
            self._tracker = ProgressTracker()
        catch_up(self._tracker, self.store.files_before(step))
        self._tracker.add(step, loss_N)
        progress = self._tracker.progress() if self._tracker.time == step else None
        return self._metrics.measure(loss_N, self.previous_N, progress)

    def named(self, values_V: Floats) -> Mapping[str, float]:
        """Return the known values by their names in the log."""
        known = self._metrics.named(values_V)
        return {f"{self.name}/{key}": value for key, value in known.items()} if self.name else known


def _names_in_log(probe_set: ProbeSet, args: Namespace) -> list[str]:
    """Return the datasets' names, numbered as in the job's training data and its logged plan.

    The probe set may come from the validation part, whose datasets can have another order.
    """
    try:
        known = DataSource.from_flags(args).names("train")
    except TokscaleError:  # a replay has no data
        return list(probe_set.datasets)
    return renamed(probe_set.prefixes, probe_set.datasets, known)


def _tokenizer_of_text(args: Namespace) -> Detokenizer | None:
    """Return Megatron's tokenizer, if its ids stand for a text."""
    is_null = str(args.tokenizer_type).startswith("Null")
    tokenizer: Detokenizer | None = None if is_null else global_vars.get_tokenizer()
    return tokenizer

"""Every path of a run, in one class: the files of its job and of its analyses.

ROOT/tokscale/
  run.json                    what the run is, and the launches that trained it
  probe.safetensors           the probe set; an imported run has tokens.safetensors instead
  losses/step_*.safetensors   one file per probe; losses/abandoned/ of branches given up
  samples/rank_*.bin          losses of the training samples; samples/abandoned/ as for losses
  journal.jsonl               one line per event
  data.json                   where the training samples come from
  plan.json, replans.json     the plan that the run follows, and the decisions made since
  cache/                      a plan's index, where the job's data cache cannot hold it
  abandoned/RUN-ID/           files of a run that another has replaced
  .lock                       held by the job that writes
ROOT/analysis/                fits, spectra, laws and the report
ROOT/probe-sets/NAME/         the run directory of a further probe set of the job: the same files,
                              but those about the training, which are the job's own
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.writable import check_new_file
from megatron_tokscale.store.losses import losses_name

_PROBE_SETS: Final = "probe-sets"


def check_result(folder: Path, name: str) -> None:
    """Refuse a folder for the result of several runs: one of a run, or with a file of this name.

    Raises:
        TokscaleError: `folder` is a run directory or a folder of a run's files, holds the file
            already, or cannot be written to.
    """
    around = RunPaths(folder.parent)
    is_inside = folder in (around.folder, around.analysis) and is_there(around.identity)
    if is_inside or is_there(RunPaths(folder).identity):
        raise TokscaleError(
            f"{folder} holds the files of a run; expected a folder for the result; choose another "
            "--out"
        )
    check_new_file(folder / name, "it is not replaced")


@dataclass(frozen=True)
class RunPaths:
    """The paths of the run in directory `root`, whether or not the files exist."""

    root: Path

    @property
    def folder(self) -> Path:
        """The folder of all files that the training job writes."""
        return self.root / "tokscale"

    @property
    def of_training(self) -> Path:
        """The folder of the files about the training: for a further probe set, the job's folder."""
        root = self.root.absolute()
        return root.parents[1] / "tokscale" if root.parent.name == _PROBE_SETS else self.folder

    @property
    def further(self) -> Path:
        """The folder of the run directories of the job's further probe sets."""
        return self.root / _PROBE_SETS

    def of_probe_set(self, name: str) -> Path:
        """Return the run directory of the further probe set of that name."""
        return self.further / name

    @property
    def probe_sets(self) -> list[Path]:
        """The run directories of the further probe sets that hold a run, by name."""
        folders = sorted(self.further.iterdir()) if self.further.is_dir() else []
        return [folder for folder in folders if RunPaths(folder).identity.is_file()]

    @property
    def identity(self) -> Path:
        """The run's `Identity`; a directory without it holds no run."""
        return self.folder / "run.json"

    @property
    def probe_set(self) -> Path:
        """The run's copy of the probe set."""
        return self.folder / "probe.safetensors"

    @property
    def tokens(self) -> Path:
        """Known columns of the watched tokens of an imported run."""
        return self.folder / "tokens.safetensors"

    @property
    def losses(self) -> Path:
        """The folder of losses files."""
        return self.folder / "losses"

    def losses_at(self, step: int) -> Path:
        """Return the file of the losses at a probe step."""
        return self.losses / losses_name(step)

    @property
    def abandoned_losses(self) -> Path:
        """The folder of losses from branches that a job has left by resuming before them."""
        return self.losses / "abandoned"

    @property
    def samples(self) -> Path:
        """The folder of the training samples' losses: for a further probe set, the job's folder."""
        return self.of_training / "samples"

    @property
    def journal(self) -> Path:
        """The journal of all jobs that have written into the directory."""
        return self.folder / "journal.jsonl"

    @property
    def lock(self) -> Path:
        """The file that the writing job locks."""
        return self.folder / ".lock"

    @property
    def data_record(self) -> Path:
        """The record of where the run's training samples come from."""
        return self.of_training / "data.json"

    @property
    def plan(self) -> Path:
        """The run's copy of the plan that it follows."""
        return self.of_training / "plan.json"

    @property
    def decisions(self) -> Path:
        """The decisions on weights that were made while the run trained."""
        return self.of_training / "replans.json"

    @property
    def cache(self) -> Path:
        """The folder of a plan's index, where the job's data cache cannot hold it."""
        return self.folder / "cache"

    def abandoned(self, run_id: str) -> Path:
        """Return the folder for the files of a run that another one replaces."""
        return self.folder / "abandoned" / run_id

    @property
    def analysis(self) -> Path:
        """The folder of all files that are computed from the run."""
        return self.root / "analysis"

    @property
    def fits(self) -> Path:
        """The table of fits, one row per token."""
        return self.analysis / "fits.parquet"

    @property
    def fit(self) -> Path:
        """The summary of the fits, and their inputs."""
        return self.analysis / "fit.json"

    @property
    def fit_parts(self) -> Path:
        """The folder of finished blocks of a fit in progress."""
        return self.analysis / "fit.parts"

    @property
    def spectrum(self) -> Path:
        """The numbers of the learning-time spectrum."""
        return self.analysis / "spectrum.json"

    @property
    def spectrum_arrays(self) -> Path:
        """The curves of the learning-time spectrum."""
        return self.analysis / "spectrum.npz"

    @property
    def reconstruction(self) -> Path:
        """The reconstruction of the mean loss, and the evidence from this run alone."""
        return self.analysis / "reconstruction.json"

    @property
    def transfer(self) -> Path:
        """The predictions from other runs' learning times."""
        return self.analysis / "transfer.json"

    @property
    def laws(self) -> Path:
        """The scaling laws and theories."""
        return self.analysis / "laws.json"

    @property
    def matrix(self) -> Path:
        """The numbers of a matrix along D or M that need no fit."""
        return self.analysis / "matrix.json"

    @property
    def matrix_arrays(self) -> Path:
        """Learned or not, and the time to the threshold, of every token of such a matrix."""
        return self.analysis / "matrix.npz"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.analysis / "report.html"

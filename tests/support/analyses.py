"""Analysis files changed or planted by hand, with checksums that are right."""

import json

import numpy as np

from megatron_tokscale.core.checked import file_checksum, write_arrays, write_result
from megatron_tokscale.core.schemas import FIT_SCHEMA, SPECTRUM_SCHEMA
from megatron_tokscale.fit import fits_path
from megatron_tokscale.results import heading

EVIDENCE = ("spectrum.json", "reconstruction.json")


def edit(path, **changes):
    """Change some keys of a JSON file that carries a checksum."""
    write_result(path, json.loads(path.read_text()) | changes)


def replace_arrays(run, **arrays):
    """Change arrays of a run's spectrum.npz."""
    path = run.analysis / "spectrum.npz"
    with np.load(path) as file:
        checksum = write_arrays(path, dict(file) | arrays)
    for name in EVIDENCE:
        edit(run.analysis / name, arrays_crc32=checksum)


def _fit_of(run, time):
    return {
        "schema_version": FIT_SCHEMA,
        "run_id": run.info.run_id,
        "probe_fingerprint": run.probe_set.fingerprint,
        "time": time,
        "steps": run.step_K.tolist(),
        "losses_crc32": list(run.checksums().values()),
        "fit_id": "0123456789abcdef",
    }


def plant_fits(run, fits, time="step"):
    """The files of a fit, with the fits of these tokens."""
    about = _fit_of(run, time)
    fits.save(fits_path(run), about)
    write_result(run.analysis / "fit.json", about | {"fits_crc32": file_checksum(fits_path(run))})


def plant_spectrum(run, datasets, **arrays):
    """The files of a fit and of a spectrum, which hold what a plan needs of them."""
    fit = _fit_of(run, "step")
    write_result(run.analysis / "fit.json", fit)
    made_of = {
        "schema_version": SPECTRUM_SCHEMA,
        **heading(fit),
        "arrays_crc32": write_arrays(run.analysis / "spectrum.npz", arrays),
    }
    for name in EVIDENCE:
        write_result(run.analysis / name, {**made_of, "datasets": datasets})

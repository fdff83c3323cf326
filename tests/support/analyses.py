"""Analysis files changed or planted by hand, with checksums that are right."""

import enum
import json
import math
import types
from dataclasses import fields, is_dataclass
from enum import EnumType
from typing import Literal, TypeAliasType, Union, get_args, get_origin, get_type_hints

import numpy as np

from megatron_tokscale.core.checked import file_checksum, write_arrays, write_typed_result
from megatron_tokscale.core.files import sealed, write_json
from megatron_tokscale.core.schemas import FIT_SCHEMA, SPECTRUM_SCHEMA
from megatron_tokscale.fit.summary import FitIdentity, FitSummary
from megatron_tokscale.results.evidence import Evidence
from megatron_tokscale.results.npz import array_forms, write_npz
from megatron_tokscale.results.spectrum import DatasetCounts, SpectrumArrays, SpectrumSummary

EVIDENCE = ("spectrum.json", "reconstruction.json")


def edit(path, **changes):
    """Change some keys of a JSON file that carries a checksum."""
    write_json(path, sealed(json.loads(path.read_text()) | changes))


def edit_identity(path, key, **changes):
    """Change what a JSON file says of the fits that it is made of, under `key`."""
    edit(path, **{key: json.loads(path.read_text())[key] | changes})


def replace_arrays(run, **arrays):
    """Change arrays of a run's spectrum.npz."""
    path = run.paths.spectrum_arrays
    with np.load(path) as file:
        checksum = write_arrays(path, dict(file) | arrays)
    for name in EVIDENCE:
        edit(run.paths.analysis / name, arrays_crc32=checksum)


def blank(kind, **values):
    """Make a dataclass whose fields are empty or undefined, but for `values`."""
    hints = get_type_hints(kind)
    return kind(
        **{
            each.name: values[each.name] if each.name in values else _blank(hints[each.name])
            for each in fields(kind)
        }
    )


def _blank(annotation):
    if isinstance(annotation, TypeAliasType):
        return _blank(annotation.__value__)
    if get_origin(annotation) in (Union, types.UnionType):
        return _blank(get_args(annotation)[-1])
    if get_origin(annotation) is Literal:
        return get_args(annotation)[0]
    if is_dataclass(annotation):
        return blank(annotation)
    if isinstance(annotation, EnumType):
        return next(iter(annotation))
    if annotation is float:
        return math.nan
    if isinstance(annotation, enum.EnumType):
        return next(iter(annotation))
    return None if annotation is type(None) else (get_origin(annotation) or annotation)()


def identity_of(run, time="step"):
    """The identity of fits of the losses that the run has now."""
    return FitIdentity(
        run_id=run.info.run_id,
        probe_fingerprint=run.probe_set.fingerprint,
        steps=tuple(run.step_K.tolist()),
        losses_crc32=tuple(run.checksums().values()),
        time=time,
        fit_id="0123456789abcdef",
        time_name=time,
        unit_kind="documents",
    )


def plant_fits(run, fits, time="step"):
    """The files of a fit, with the fits of these tokens."""
    identity = identity_of(run, time)
    fits.save(run.paths.fits, vars(identity))
    summary = blank(FitSummary, identity=identity, fits_crc32=file_checksum(run.paths.fits))
    write_typed_result(run.paths.fit, FIT_SCHEMA, summary)


def plant_spectrum(run, datasets, **arrays):
    """The files of a fit and of a spectrum, which hold what a plan needs of them.

    `datasets` maps each dataset to its number of tokens.
    """
    identity = identity_of(run)
    write_typed_result(run.paths.fit, FIT_SCHEMA, blank(FitSummary, identity=identity))
    forms = array_forms(SpectrumArrays)
    empty = {name: np.zeros((1,) * n_axes, dtype) for name, (dtype, n_axes) in forms.items()}
    checksum = write_npz(run.paths.spectrum_arrays, SpectrumArrays(**empty | arrays))
    made_of = {"fit": identity, "arrays_crc32": checksum}
    counts = tuple(
        blank(DatasetCounts, name=name, n_tokens=n_tokens) for name, n_tokens in datasets.items()
    )
    summary = blank(SpectrumSummary, **made_of, datasets=counts)
    write_typed_result(run.paths.spectrum, SPECTRUM_SCHEMA, summary)
    write_typed_result(run.paths.reconstruction, SPECTRUM_SCHEMA, blank(Evidence, **made_of))

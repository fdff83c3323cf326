"""A run directory of an older schema becomes a run with the same losses."""

import json

import numpy as np
import pytest
from runs import plain_probe_set, write_run
from safetensors import safe_open
from safetensors.numpy import save_file

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.tensors import text_crc32
from megatron_tokscale.store import Run
from megatron_tokscale.store.exchange.old_run import import_old_run, is_run_directory

STEPS = [0, 1, 2, 4, 8]


@pytest.fixture
def old(tmp_path):
    """A run as the first version left it: run.json and probe.safetensors of schema 1."""
    loss_NK = np.random.default_rng(0).uniform(0, 9, (64, len(STEPS))).astype(np.float32)
    run = write_run(tmp_path / "old", STEPS, loss_NK)
    run.paths.identity.write_text(json.dumps({"schema_version": 1, "run_id": "x", "model": {}}))
    with safe_open(run.paths.probe_set, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    details = json.dumps({"split": "99,1,0", "seed": 1})
    metadata |= {"schema_version": "1", "details": details, "details_crc32": text_crc32(details)}
    save_file(arrays, run.paths.probe_set, metadata)
    return run, loss_NK


def test_its_losses_and_its_text_are_taken_over(old, tmp_path):
    run, loss_NK = old
    with pytest.raises(TokscaleError, match=r"older schema.*megatron-tokscale import"):
        Run.open(run.path)
    assert is_run_directory(run.path)
    import_old_run(run.path, tmp_path / "new")
    new = Run.open(tmp_path / "new")
    np.testing.assert_array_equal(new.read_losses(), loss_NK)
    new.verify()
    assert new.step_K.tolist() == STEPS
    assert new.probe_set.fingerprint == plain_probe_set(64).fingerprint
    assert np.isfinite(new.x_K("tokens")[1:]).all()


def test_without_its_probe_set_only_the_losses_are_known(old, tmp_path):
    run, loss_NK = old
    run.paths.probe_set.unlink()
    run.paths.identity.unlink()
    import_old_run(run.path, tmp_path / "new")
    new = Run.open(tmp_path / "new")
    np.testing.assert_array_equal(new.read_losses(), loss_NK)
    assert new.tokens.probe_set is None and new.tokens.unit_kind == "blocks"


def test_a_run_of_today_needs_no_import(tmp_path):
    run = write_run(tmp_path / "run", STEPS, np.ones((16, len(STEPS))))
    with pytest.raises(TokscaleError, match="every verb reads as it is"):
        import_old_run(run.path, tmp_path / "new")


def test_a_probe_set_of_other_tokens_is_refused(old, tmp_path):
    run, _ = old
    plain_probe_set(16).save(run.paths.probe_set)
    with pytest.raises(TokscaleError, match="is not the probe set of the losses"):
        import_old_run(run.path, tmp_path / "new")
    assert not (tmp_path / "new").exists()

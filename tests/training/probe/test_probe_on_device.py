"""The probe on a labelled CUDA device: no tensor on a wrong device, no wait before the gather."""

import json
import os
import subprocess
import sys

import pytest
from integer_losses import SEQ_LENGTH, numbered_probe_set
from jobs import TESTS, job_environment
from labelled_pass import CASES, STEPS, file_name, number_of

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A function (case, step) -> what each rank of `labelled_pass` has found."""
    folder = tmp_path_factory.mktemp("found")
    result = subprocess.run(
        [sys.executable, str(TESTS / "labelled_pass.py"), str(folder)],
        env=job_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-6000:]

    def of_ranks(case, step):
        names = [file_name(case, step, rank) for rank in range(case[0])]
        return [json.loads((folder / name).read_text()) for name in names]

    return of_ranks


def expected_losses(n_sequences):
    """The losses of `labelled_pass`, token by token."""
    probe_set = numbered_probe_set(n_sequences)
    losses = []
    for row in range(n_sequences):
        tokens, labels = (ids[row].tolist() for ids in (probe_set.tokens_BS, probe_set.labels_BS))
        for position in range(SEQ_LENGTH):
            if probe_set.mask_BS[row, position]:
                seen = sum(number_of(token) for token in tokens[: position + 1])
                losses.append(seen + number_of(labels[position]))
    return losses


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_pass_gives_every_loss_and_waits_once(found, case, step):
    writer, *others = found(case, step)
    assert writer["losses"] == expected_losses(case[-1])
    assert writer["synchronisations"] == {"device to host": 1}
    assert writer["operations"] > 0
    for other in others:
        assert other["losses"] is None
        assert other["synchronisations"] == {}

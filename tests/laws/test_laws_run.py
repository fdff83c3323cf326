"""laws.json of a run on disk, whose spectrum files are planted. K probe steps, D datasets."""

import json

import numpy as np
import pytest
from runs import write_run

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import write_json
from megatron_tokscale.laws import describe_laws, fit_power_law, laws_run

STEPS = np.concatenate([[0], np.unique(np.geomspace(1, 5000, 45).round())]).astype(int)


@pytest.fixture
def run(tmp_path):
    """A run of two domains whose losses themselves do not matter here."""
    return write_run(tmp_path / "run", STEPS, np.ones((32, len(STEPS))))


def write_spectrum(run, **replaced):
    """Exponent 0.3 in the mean, 0.3 and nothing in the datasets, 0.3 in the tail."""
    t = np.maximum(STEPS, 0.5)
    with np.errstate(divide="ignore"):
        x_K = np.log(STEPS)
    x_G = np.linspace(0, x_K[-1], 256)
    falling = 2 + 8 * t**-0.3
    arrays = {
        "step_K": STEPS,
        "x_K": x_K,
        "mean_loss_K": falling,
        "mean_loss_DK": np.stack([falling + 1, np.sqrt(t)]),
        "x_G": x_G,
        "drop_weighted_G": 2.4 * np.exp(-0.3 * x_G),
    }
    about = {
        "schema_version": 1,
        "time": "step",
        "probe_fingerprint": run.probe_set.fingerprint,
        "bandwidth_x": 0.05,
        "common_width_x": 0.2,
        "domains": [{"name": "prose"}, {"name": "code"}],
    }
    run.analysis.mkdir(exist_ok=True)
    np.savez(run.analysis / "spectrum.npz", **(arrays | replaced))
    write_json(run.analysis / "spectrum.json", about)


def test_laws_json_holds_the_planted_exponents(run):
    write_spectrum(run)
    result = laws_run(run, n_resamples=10)
    assert json.loads((run.analysis / "laws.json").read_text()) == json.loads(json.dumps(result))
    law = result["overall"]["power_law"]
    assert (law["floor"], law["exponent"]) == pytest.approx((2, 0.3), abs=1e-3)
    assert law["from_time"] >= 500
    prose = result["datasets"][0]
    assert prose["name"] == "prose"
    assert prose["power_law"]["floor"] == pytest.approx(3, abs=1e-2)
    tail = result["spectrum"]["tail"]
    assert tail["exponent"] == pytest.approx(0.3)
    assert tail["from_x"] >= np.log(500)
    assert tail["to_x"] <= np.log(5000) - 0.4
    assert result["tail_minus_law"]["difference"] == pytest.approx(0, abs=1e-3)


def test_what_is_undefined_is_null_and_says_why(run):
    write_spectrum(run, drop_weighted_G=np.zeros(256))
    result = laws_run(run, n_resamples=2)
    code = result["datasets"][1]
    assert code["power_law"] is None
    assert "does not fall" in code["undefined"]
    assert result["spectrum"]["tail"] is None
    assert result["tail_minus_law"] is None
    assert "does not fall" in describe_laws(result)


def test_the_start_of_the_fit_can_be_chosen(run):
    write_spectrum(run)
    result = laws_run(run, from_=50, n_resamples=2)
    law = result["overall"]["power_law"]
    assert law["from_time"] == pytest.approx(STEPS[STEPS >= 50][0])
    by_hand = fit_power_law(STEPS, 2 + 8 * np.maximum(STEPS, 0.5) ** -0.3, from_=50, n_resamples=2)
    assert law["exponent"] == pytest.approx(by_hand.exponent, rel=1e-4)
    assert result["settings"]["from"] == 50


def test_the_description_shows_every_law(run):
    write_spectrum(run)
    text = describe_laws(laws_run(run, n_resamples=2))
    assert all(word in text for word in ("all tokens", "prose", "code", "tail exponent", "0.300"))


def test_a_curve_that_is_no_power_law_is_called_so(run):
    bend = 3 + np.tanh(7.5 - np.log(np.maximum(STEPS, 1)))
    write_spectrum(run, mean_loss_K=bend)
    text = describe_laws(laws_run(run, from_=20, n_resamples=20))
    assert "residuals drift" in text


def test_a_run_without_a_spectrum_says_what_to_run(run):
    with pytest.raises(TokscaleError, match=r"run `megatron-tokscale spectrum .*` first"):
        laws_run(run)
    assert not (run.analysis / "laws.json").exists()


def test_a_spectrum_of_other_probes_is_refused(run):
    write_spectrum(run, step_K=STEPS + 1)
    with pytest.raises(TokscaleError, match="of other probes"):
        laws_run(run)


def test_a_damaged_spectrum_is_refused(run):
    write_spectrum(run)
    path = run.analysis / "spectrum.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TokscaleError, match="is damaged"):
        laws_run(run)

"""Verbs on runs with damaged, stale or NaN files: one line, exit 2, nothing written."""

import json
import shutil
import zlib

import numpy as np
import pytest
from analyses import edit
from runs import probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.laws import laws_run
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.results import FittedRun, SpectrumResult
from megatron_tokscale.reweight import read_spectra
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.store import Run
from megatron_tokscale.store.losses import losses_name, read_record

STEPS = probe_steps(24, last=2000)
N_TOKENS = 160
LOSSES = f"tokscale/losses/{losses_name(int(STEPS[9]))}"


def losses():
    rng = np.random.default_rng(0)
    x_K = np.log(np.maximum(STEPS, 0.5))
    midpoint_N, drop_N = rng.uniform(2, 6, (N_TOKENS, 1)), rng.uniform(1, 5, (N_TOKENS, 1))
    noise_NK = 0.05 * rng.standard_normal((N_TOKENS, len(STEPS)))
    return 1 + drop_N * expit((midpoint_N - x_K) / 0.3) + noise_NK


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("analysed") / "run", STEPS, losses())
    fit_run(run)
    spectrum_run(run, n_resamples=10, null_tokens=40)
    laws_run(run, n_resamples=4)
    return run


@pytest.fixture
def copied(analysed, tmp_path):
    return shutil.copytree(analysed.path, tmp_path / "run")


def flip(path, at=None):
    """Invert one byte, by default the last one of the losses or the middle one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 0xFF
    path.write_bytes(data)


def flip_text(path, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def files(folder):
    return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def refused(arguments, folder, capsys):
    """Run a verb that is refused and writes nothing; return its last line on stderr."""
    before = files(folder)
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    assert files(folder) == before
    return capsys.readouterr().err.strip().splitlines()[-1]


VERBS = ["fit", "spectrum", "laws", "report"]


@pytest.mark.parametrize("verb", ["fit", "spectrum", "laws"])
def test_a_flipped_loss_ends_every_verb_that_reads_losses(copied, verb, capsys):
    flip(copied / LOSSES, at=-1)
    line = refused([verb, copied], copied, capsys)
    assert losses_name(int(STEPS[9])) in line and "wrong checksum" in line


def test_a_flipped_loss_ends_a_report_with_example_tokens_and_a_comparison(copied, analysed):
    flip(copied / LOSSES, at=-1)
    from megatron_tokscale.report.sections.beside.speedup import mean_curves

    with pytest.raises(TokscaleError, match="wrong checksum"):
        Run.open(copied).read_losses(3, 4)
    with pytest.raises(TokscaleError, match="wrong checksum"):
        mean_curves((analysed, Run.open(copied)))


def test_a_losses_file_is_checked_once_in_a_process(copied, monkeypatch):
    run, read = Run.open(copied), []
    crc32 = zlib.crc32
    monkeypatch.setattr(
        "megatron_tokscale.store.losses.zlib.crc32",
        lambda data, *start: (read.append(np.asarray(data).nbytes), crc32(data, *start))[1],
    )
    for start in range(0, N_TOKENS, 10):
        run.read_losses(start, start + 10)
    assert sum(read) == 4 * N_TOKENS * len(STEPS)
    list(run.finite_blocks())
    run.verify()
    assert sum(read) == 4 * N_TOKENS * len(STEPS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"step":"', b'"stop":"', "damaged"),
        (b'"consumed_tokens":"', b'"consumed_tokens":"', None),
        (b'"F32"', b'"I32"', "losses of shape .* and type I32"),
        (b'"kind":"tokscale-losses"', b'"kind":"tokscale-lossex"', "not a losses file"),
        (b'"schema_version":"1"', b'"schema_version":"x"', "schema version 'x'"),
        (b'"versions":"test"', b'"versions":"tesu"', "checksum of its record"),
    ],
)
def test_an_altered_header_is_refused(copied, old, new, message):
    path = copied / LOSSES
    flip_text(path, old, new)
    if message is None:
        assert read_record(path)[0].step == STEPS[9]
        return
    with pytest.raises(TokscaleError, match=message) as error:
        Run.open(copied)
    assert "\n" not in str(error.value)


def test_every_flipped_byte_of_a_header_is_refused_in_one_line_or_harmless(copied):
    path = copied / LOSSES
    whole = path.read_bytes()
    record, _ = read_record(path)
    length = 8 + int.from_bytes(whole[:8], "little")
    for at in range(length):
        data = bytearray(whole)
        data[at] ^= 0x01
        path.write_bytes(data)
        try:
            run = Run.open(copied)
            run.verify()
        except TokscaleError as error:
            assert "\n" not in str(error)
        else:
            assert run.records[9] == record or str(run.records[9]) == str(record)


def test_a_losses_file_whose_name_gives_another_step_is_refused(copied):
    folder = copied / "tokscale/losses"
    (folder / losses_name(int(STEPS[9]))).rename(folder / losses_name(int(STEPS[9]) + 1))
    with pytest.raises(TokscaleError, match=f"is of step {STEPS[9]} by its record"):
        Run.open(copied)


def test_every_flipped_byte_of_a_probe_set_is_refused_or_harmless(tmp_path, analysed):
    path = tmp_path / "probe.safetensors"
    analysed.probe_set.save(path)
    whole, origin = path.read_bytes(), analysed.probe_set.origin
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 0x01
        path.write_bytes(data)
        try:
            found = ProbeSet.load(path)
        except TokscaleError:
            continue
        assert found.fingerprint == analysed.probe_set.fingerprint
        assert found.origin == origin and found.mask_BS.dtype == bool


@pytest.mark.parametrize("name", ["fits.parquet", "fit.json"])
@pytest.mark.parametrize("verb", ["spectrum", "report"])
def test_flipped_fits_are_refused(copied, name, verb, capsys):
    flip(copied / "analysis" / name)
    line = refused([verb, copied], copied, capsys)
    assert name in line and "megatron-tokscale fit" in line


@pytest.mark.parametrize("name", ["spectrum.npz", "spectrum.json", "reconstruction.json"])
@pytest.mark.parametrize("verb", ["laws", "report"])
def test_a_flipped_spectrum_is_refused(copied, name, verb, capsys):
    flip(copied / "analysis" / name)
    line = refused([verb, copied], copied, capsys)
    assert name in line and "megatron-tokscale spectrum" in line
    with pytest.raises(TokscaleError, match=name.replace(".", r"\.")):
        read_spectra(Run.open(copied))


def test_an_altered_digit_in_a_result_is_refused(copied):
    path = copied / "analysis/laws.json"
    text = path.read_text()
    at = text.index('"r2": 0.') + len('"r2": 0.')
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    with pytest.raises(SystemExit):
        main(["report", str(copied)])


def damage_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_list(path):
    path.write_text("[1, 2]")


def damage_empty(path):
    path.write_text("")


def damage_keys(path):
    path.write_text(json.dumps({"schema_version": 3}))


@pytest.mark.parametrize("damage", [damage_cut, damage_list, damage_empty, damage_keys])
@pytest.mark.parametrize(
    "name", ["fit.json", "spectrum.json", "reconstruction.json", "laws.json", "fits.parquet"]
)
def test_a_damaged_analysis_ends_a_report_with_one_line(copied, name, damage, capsys):
    damage(copied / "analysis" / name)
    assert name in refused(["report", copied], copied, capsys)


def add_probe(folder):
    """Add a probe, as if the job had trained on."""
    extended = write_run(
        folder.parent / "longer",
        [*STEPS, 3000],
        np.concatenate([losses(), losses()[:, -1:]], axis=1),
    )
    name = losses_name(3000)
    shutil.copy(extended.path / "tokscale/losses" / name, folder / "tokscale/losses" / name)


def replace_losses(folder):
    """Put other losses at the same steps, as a training that began anew does."""
    other = write_run(folder.parent / "other", STEPS, losses() + 0.5)
    shutil.copytree(other.path / "tokscale", folder / "tokscale", dirs_exist_ok=True)


@pytest.mark.parametrize("change", [add_probe, replace_losses])
@pytest.mark.parametrize("verb", ["spectrum", "laws", "report"])
def test_a_stale_analysis_ends_every_verb(copied, change, verb, capsys):
    change(copied)
    line = refused([verb, copied], copied, capsys)
    assert "than the run has now; run `megatron-tokscale fit" in line
    for reader in (read_spectra, SpectrumResult.open, FittedRun.open):
        with pytest.raises(TokscaleError, match="than the run has now"):
            reader(Run.open(copied))


@pytest.mark.parametrize("change", [add_probe, replace_losses])
def test_a_spectrum_older_than_its_fits_ends_every_verb(copied, change, capsys):
    change(copied)
    fit_run(Run.open(copied))
    for verb in ("laws", "report"):
        line = refused([verb, copied], copied, capsys)
        assert "than the run has now; run `megatron-tokscale spectrum" in line
    with pytest.raises(TokscaleError, match="run `megatron-tokscale spectrum"):
        read_spectra(Run.open(copied))


def test_an_analysis_of_an_older_schema_is_refused(copied, capsys):
    edit(copied / "analysis/spectrum.json", schema_version=2)
    assert "of an older schema; run" in refused(["laws", copied], copied, capsys)


def nan_run(path, change):
    loss_NK = losses()
    change(loss_NK)
    return write_run(path, STEPS, loss_NK)


def one_probe(loss_NK):
    loss_NK[:, 7] = np.nan


def the_end(loss_NK):
    loss_NK[:, 18:] = np.inf


@pytest.mark.parametrize("change", [one_probe, the_end])
def test_probes_without_a_finite_loss_are_left_out_and_named(tmp_path, change, capsys):
    run = nan_run(tmp_path / "run", change)
    whole = losses()
    change(whole)
    kept_K = np.isfinite(whole).any(axis=0)
    assert run.step_K.tolist() == STEPS[kept_K].tolist()
    assert list(run.left_out) == STEPS[~kept_K].tolist()
    for verb in (["fit"], ["spectrum", "--resamples", "4"], ["laws", "--resamples", "4"]):
        main([*verb, str(run.path)])
        steps = f"at step{'s' * (len(run.left_out) > 1)} {', '.join(map(str, run.left_out))} "
        said = capsys.readouterr().err
        assert steps + ("has" if len(run.left_out) == 1 else "have") + " no finite loss" in said
    with np.load(run.paths.spectrum_arrays) as arrays:
        expected_K = whole[:, kept_K].astype(np.float32).mean(axis=0)
        np.testing.assert_allclose(arrays["mean_loss_K"], expected_K, rtol=1e-5)


def test_a_run_without_a_finite_loss_is_fitted_and_has_no_spectrum(tmp_path, capsys):
    run = nan_run(tmp_path / "run", lambda loss_NK: loss_NK.fill(np.nan))
    main(["fit", str(run.path)])
    assert "are NaN or infinite" in capsys.readouterr().out
    assert json.loads(run.paths.fit.read_text())["status"]["non-finite"] == N_TOKENS
    assert "nothing to analyse" in refused(["spectrum", run.path], run.path, capsys)


def test_the_step_where_most_losses_are_missing_is_named(tmp_path, capsys):
    def scatter(loss_NK):
        for n in range(N_TOKENS):
            loss_NK[n, n % 3] = np.nan

    run = nan_run(tmp_path / "run", scatter)
    main(["fit", str(run.path)])
    line = refused(["spectrum", run.path], run.path, capsys)
    assert f"most miss at steps {STEPS[0]} (54 of 160 not finite)" in line


def test_constant_losses_have_no_spectrum(tmp_path, capsys):
    run = nan_run(tmp_path / "run", lambda loss_NK: loss_NK.fill(2.5))
    main(["fit", str(run.path)])
    assert "is the same at all probes" in refused(["spectrum", run.path], run.path, capsys)


def test_non_finite_losses_are_counted_beside_the_means(tmp_path, capsys):
    def some(loss_NK):
        loss_NK[3:6, 4] = np.nan

    run = nan_run(tmp_path / "run", some)
    for verb in (["fit"], ["spectrum", "--resamples", "4"], ["laws", "--resamples", "4"]):
        main([*verb, str(run.path)])
        assert "3 losses of 3 " in capsys.readouterr().out


def estimates(content, path=""):
    """Yield every (path, value, interval) in a result."""
    if isinstance(content, list):
        for i, each in enumerate(content):
            yield from estimates(each, f"{path}/{i}")
    elif isinstance(content, dict):
        for name, value in content.items():
            if isinstance(content.get(f"{name}_interval"), list):
                yield f"{path}/{name}", value, content[f"{name}_interval"]
            yield from estimates(value, f"{path}/{name}")
        if content.keys() >= {"value", "low", "high"}:
            yield path, content["value"], (content["low"], content["high"])


@pytest.mark.parametrize("name", ["spectrum.json", "reconstruction.json", "laws.json"])
def test_every_value_lies_in_its_interval_and_in_its_range(analysed, name):
    found = list(estimates(json.loads((analysed.paths.analysis / name).read_text())))
    assert found
    for path, value, (low, high) in found:
        if low is None or high is None:
            continue
        assert low <= value <= high, path
        if path.endswith(("/error", "/share", "_decades/p50", "/p25", "widths/test/estimate")):
            assert low >= 0, path
        if path.endswith(("/r2", "/ceiling", "/events", "/permuted", "/full", "/share")):
            assert high <= 1, path

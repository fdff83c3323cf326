"""The demo writes into a folder of its own, and leaves every other one as it is."""

import pytest

from megatron_tokscale.cli import main


@pytest.mark.parametrize("name", ["probe.safetensors", "notes.txt"])
def test_a_folder_of_other_files_is_left_as_it_is(tmp_path, capsys, name):
    (tmp_path / name).write_text("another's")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "--out", str(tmp_path)])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "holds other files than a demo's; expected a new or an empty folder" in line
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "another's"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("another's")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "--out", str(path)])
    assert stop.value.code == 2
    assert "expected a folder; give another --out" in capsys.readouterr().err
    assert path.read_text() == "another's"

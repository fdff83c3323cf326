"""The patches add lines to Megatron's scripts, and take none away."""

import subprocess

from documents import ROOT

PATCHES = sorted((ROOT / "patches").glob("*.patch"))
SCRIPTS = ("pretrain_gpt.py", "pretrain_hybrid.py")


def test_a_patch_only_inserts():
    assert PATCHES
    for patch in PATCHES:
        lines = patch.read_text().splitlines()
        assert not [line for line in lines if line.startswith("-") and line[:4] != "--- "]


def test_the_patch_applies_as_its_readme_says(tmp_path):
    for name in SCRIPTS:
        (tmp_path / name).write_text(f"# {name}\nprint(1)\n")
    command = ["git", "apply", "--unidiff-zero", str(ROOT / "patches/pretrain_gpt.patch")]
    assert " ".join(command[:3]) in (ROOT / "patches/README.md").read_text()
    subprocess.run(command, cwd=tmp_path, check=True)
    for name in SCRIPTS:
        first, *rest = (tmp_path / name).read_text().splitlines()
        assert first.startswith("import megatron_tokscale.adaptor")
        assert rest == [f"# {name}", "print(1)"]

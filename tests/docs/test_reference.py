"""The reference is made from the code, and complete."""

import re
import tomllib
from pathlib import Path

import pytest
from documents import ROOT, read
from reference import FOLDER, is_same, pages

from megatron_tokscale.training import support
from megatron_tokscale.training.plugin import HOOKS

PACKAGE = ROOT / "megatron_tokscale"


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_a_generated_page_is_up_to_date(path):
    assert is_same(path, pages()[path]), "run `make reference`"


def test_every_kind_of_file_with_a_schema_is_described():
    from megatron_tokscale.core import schemas

    page = (FOLDER / "files.md").read_text()
    for files in re.findall(r"_SCHEMA: Final = \d+  # (.+)", Path(schemas.__file__).read_text()):
        for file in files.split(", "):
            described = file.replace("step_*", "step_00001024")
            assert re.search(rf"^(##.*|\| )`.*{re.escape(described)}", page, re.M), file


def refusals():
    tables = [value for value in vars(support).values() if isinstance(value, tuple)]
    return [row for table in tables for row in table if isinstance(row, support.Refusal)]


def test_every_refusal_is_in_the_table_of_what_is_supported():
    page = read("docs/reference/supported.md")
    assert len(refusals()) > 20
    for refusal in refusals():
        assert f"`{refusal.flag}" in page, refusal.flag


def test_every_hook_is_in_the_map():
    page = read("docs/architecture.md")
    for hook in HOOKS:
        assert f"`{hook.module.rpartition('.')[2]}.{hook.name}`" in page, hook.name


def test_every_room_is_in_the_map():
    page = read("docs/architecture.md")
    rooms = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    for room in rooms:
        assert f"| `{room}/` |" in page, room
    for module in PACKAGE.glob("[a-z]*.py"):
        assert f"`{module.name}`" in page, module.name


def test_the_map_has_the_layers_of_the_import_contract():
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]
    layers = next(row["layers"] for row in settings["contracts"] if row["type"] == "layers")
    assert f"    {' > '.join(layers)}\n" in read("docs/architecture.md")

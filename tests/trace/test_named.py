"""Files that name samples and documents: what is written is read, anything else is refused."""

import json

import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.trace.named import Named


def load(tmp_path, text):
    path = tmp_path / "skip.txt"
    path.write_text(text)
    return Named.load(path)


def test_lines_name_samples_and_documents(tmp_path):
    found = load(tmp_path, "# both\n7\n\n3  # again\nweb:17\na:b/c:0\n7\n")
    assert found == Named((3, 7), (("web", 17), ("a:b/c", 0)))


def test_json_names_samples_and_documents(tmp_path):
    content = {"samples": [5, 3], "documents": ["web:17"], "run_id": "x"}
    assert load(tmp_path, json.dumps(content)) == Named((3, 5), (("web", 17),), "x")
    assert load(tmp_path, '{"samples": [1]}') == Named((1,), ())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "names no sample"),
        ("# nothing\n", "names no sample"),
        ("{}", "names no sample"),
        ("-3", "the sample '-3'"),
        ("1.5", "the sample '1.5'"),
        ("web:x", "NAME:ID"),
        (":3", "NAME:ID"),
        ("{", "not JSON"),
        ('{"samples": 3}', "no lists"),
        ('{"samples": [true]}', "the sample True"),
        ('{"documents": [3]}', "NAME:ID"),
        ('{"kind": "tokscale-spikes", "schema_version": 99}', "99"),
        ('{"kind": "tokscale-spikes", "schema_version": 1, "checksum": "0"}', "checksum is wrong"),
    ],
)
def test_other_content_is_refused_with_one_line(tmp_path, text, match):
    with pytest.raises(TokscaleError, match=match) as raised:
        load(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(TokscaleError, match="cannot read"):
        Named.load(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokscaleError, match="cannot read"):
        Named.load(tmp_path / "binary")

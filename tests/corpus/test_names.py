"""Names that tell datasets apart, and which dataset of one list is which of another."""

import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import listed, match_prefixes, numbered, renamed, whole_prefix


def test_namesakes_have_numbers_and_others_do_not():
    assert numbered(["web", "code"]) == ["web", "code"]
    assert numbered(["text", "text", "code", "text"]) == ["text#0", "text#1", "code", "text#3"]
    assert len({*numbered(["a#1", "a", "a"])}) == 3
    assert numbered([]) == []


def test_a_message_names_a_few():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(300)]) == "0, 1, 2, 3 and 296 more"


def test_a_whole_prefix_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert whole_prefix("a/../b/text") == f"{tmp_path}/b/text"
    assert whole_prefix("") == ""


def test_names_of_another_list_never_stand_for_two_datasets():
    known = {"/x/a/t": "t#0", "/x/b/t": "t#1", "/x/c/u": "u"}
    assert renamed(["/x/b/t", "/x/a/t"], ["t#0", "t#1"], known) == ["t#1", "t#0"]
    assert renamed(["/y/a/t"], ["t"], known) == ["t#0"]
    assert renamed(["/x/d/v", "/x/c/u"], ["v", "u"], known) == ["v", "u"]
    assert renamed(["/x/a/t", "/x/d/v"], ["t", "u"], known) == ["t#0", "/x/d/v"]
    assert renamed(["/z/t"], ["t"], known) == ["/z/t"]  # it may be either


MATCHES = {
    "the same, in another order": (["/x/a/t", "/x/b/t"], ["/x/b/t", "/x/a/t"], [1, 0]),
    "more than there are": (["/x/a/t", "/x/c/u"], ["/x/a/t"], [0, None]),
    "a namesake is not there": (["/x/a/t", "/x/b/t"], ["/x/a/t"], [0, None]),
    "moved": (["/x/a/t", "/x/b/t"], ["/y/b/t", "/y/a/t"], [1, 0]),
    "one name in both": (["/x/web"], ["/y/z/web", "/y/code"], [0]),
    "names alone": (["web", "/x/code"], ["/y/code", "/y/web"], [1, 0]),
    "twice the same": (["/x/a/t", "/x/a/t"], ["/x/a/t", "/x/b/t", "/x/a/t"], [0, 0]),
    "none": (["/x/a"], [], [None]),
    "part of a name": (["/x/webtext"], ["/x/text"], [None]),
}


@pytest.mark.parametrize("case", MATCHES)
def test_datasets_are_found_by_their_prefixes(case):
    wanted, known, expected = MATCHES[case]
    assert match_prefixes(wanted, known, "the set") == expected


AMBIGUOUS = {
    "other folders": (["/x/a/t", "/x/b/t"], ["/y/c/t", "/y/d/t"]),
    "two for one": (["/x/t"], ["/y/a/t", "/y/b/t"]),
    "one for two": (["/x/a/t", "/x/b/t"], ["/y/t"]),
    "the other of two": (["/x/a/t", "/x/b/t"], ["/x/a/t", "/x/c/t"]),
    "names alone": (["t", "t"], ["/x/t"]),
    "names twice": (["/x/t"], ["t", "t"]),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_namesakes_that_cannot_be_told_apart_are_refused(case):
    with pytest.raises(TokscaleError, match="cannot be told from its namesakes"):
        match_prefixes(*AMBIGUOUS[case], "the set")

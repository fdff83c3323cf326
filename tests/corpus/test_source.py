"""A job's data flags are read as Megatron reads them, or refused with one line."""

import argparse
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from jobs import write_documents

from megatron_tokscale.cli.entry import make_parser
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.source import (
    DEFAULT_SPLIT,
    PARTS,
    DataSource,
    parse_data_path,
    split_range,
)

# Read as Megatron reads them, whatever stands between the numbers.
SPLITS = [
    *("969,30,1", "969, 30, 1", "90 10 0", "90:10:0", "[90,10,0]", "90,10,", "90%,10%,0"),
    *("100", "99,1", "0.7,0.2,0.1", ".5,.5", "5.,3.,2.", "1/1/1", "969-30-1", "(8;1;1)", "90,,10"),
    *("0,1,0", "0,0,1", "1,0,1", "333,333,334", "1,1,1", "7,2,1", "0.1,0.2,0.7", "1;1;1\n"),
    "123456789,1,1",
]
# Megatron fails on these, or takes numbers out of them that nobody has written.
BAD_SPLITS = [
    *("", "nan,1,1", "inf,1,1", "1e3,1,1", "1e-3", "a,b", "-1,1,1", "90,-5,5", "0,0,0", "1,1,1,1"),
    *("1.2.3,1,1", ".,1,1", "1_0,1,1", "0x10,1,1", "1" * 400, "train:90,valid:10", "−1,1,1"),
]


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def megatron_bounds(split):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_divides_documents_as_megatron_does(split):
    sizes = [0, 1, 2, 3, 7, 10, 99, 157, 1000, 12_345, 10**6 + 1, 2**31 - 1]
    for n in sizes:
        for part, bounds in zip(PARTS, megatron_bounds(split), strict=True):
            first, last = (round(bound * float(n)) for bound in bounds or (0.0, 0.0))
            found = split_range(split, part, n)
            assert len(found) == last - first
            assert not found or found.start == first


def test_splits_drawn_at_random_round_as_megatrons():
    generator = np.random.default_rng(0)
    for _ in range(300):
        split = ",".join(f"{share:.3f}" for share in generator.random(3) * 10)
        n = int(generator.integers(1, 10**7))
        for part, bounds in zip(PARTS, megatron_bounds(split), strict=True):
            first, last = (round(bound * float(n)) for bound in bounds or (0.0, 0.0))
            assert (len(found := split_range(split, part, n)), found.start) == (last - first, first)


@pytest.mark.parametrize("split", BAD_SPLITS)
def test_a_split_that_megatron_would_not_read_as_it_is_meant_is_refused(split):
    with pytest.raises(TokscaleError, match="--split") as caught:
        split_range(split, "train", 10)
    if len(split) < 99:
        one_line(caught)


BLENDS = [
    ["a"],
    ["a", "b"],
    ["a", "b", "c"],
    [" a", "b "],
    ["1", "a"],
    ["30", "a", "70", "b"],
    ["1e-3", " a ", "2.5", "b", ".5", "c"],
    ["1_000", "a", "+3", "b"],
    [" 0.5 ", "a", "0.5\n", "b"],
    ["0.1", "a", "0.2", "b", "0.3", "a"],
    ["0", "a", "1", "b"],
    ["1", "2"],
    ["7"],
    ["./7", "a", "b"],
    ["1e-320", "a", "1", "b"],
    [*(word for i in range(300) for word in (f"{1 / (i + 1)}", f"/{i}/text"))],
]


@pytest.mark.parametrize("words", BLENDS)
def test_a_blend_is_megatrons(words):
    from megatron.core.datasets.utils import get_blend_from_list, normalize

    prefixes, weights = get_blend_from_list(words)
    assert parse_data_path(words) == (prefixes, None if weights is None else normalize(weights))


BAD_BLENDS = {
    "no words": [],
    "a weight is missing: odd": ["0.3", "a", "b"],
    "a weight is missing: even": ["0.3", "a", "b", "c"],
    "a prefix first": ["a", "0.3", "b", "0.7"],
    "a weight without a prefix": ["0.3", "a", "0.7"],
    "half of them": ["a", "b", "0.7", "c"],
    "nan": ["nan", "a", "1", "b"],
    "inf": ["inf", "a", "1", "b"],
    "negative": ["-1", "a", "2", "b"],
    "nothing": ["0", "a", "0", "b"],
    "too much": ["1e308", "a", "1e308", "b"],
    "an empty prefix": ["1", "  ", "1", "b"],
    "s3": ["s3://bucket/a"],
    "msc": ["1", "msc://profile/a", "1", "b"],
}


@pytest.mark.parametrize("case", BAD_BLENDS)
def test_a_blend_that_megatron_would_not_read_as_it_is_meant_is_refused(case):
    with pytest.raises(TokscaleError, match="--data-path") as caught:
        parse_data_path(BAD_BLENDS[case])
    one_line(caught)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [write_documents(folder / name, [[1, 2, 3]] * n) for name, n in (("a", 50), ("b", 20))]


FLAGS = ["data_path", "data_args_path", "per_split_data_args_path", "split"]
FLAGS += [f"{part}_data_path" for part in PARTS]


def flags(**given):
    return argparse.Namespace(**{name: given.get(name) for name in FLAGS})


def megatron_blends(args):
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    return per_split or [blend] * 3


def normalised(blend):
    from megatron.core.datasets.utils import normalize

    return blend and (blend[0], None if blend[1] is None else normalize(blend[1]))


def test_every_way_to_give_data_is_megatrons(tmp_path):
    blend = ["0.25", "a", "0.5", "b"]
    (tmp_path / "words").write_text(" 0.25 a\n\t0.5\n\nb ")
    (tmp_path / "parts").write_text(
        json.dumps({"train": [0.25, "a", 1, " b"], "valid": "a  b\n", "test": None})
    )
    for args in (
        flags(data_path=blend),
        flags(data_path=blend, split="1,1,1"),
        flags(data_args_path=str(tmp_path / "words"), split="1,1,1"),
        flags(train_data_path=blend, valid_data_path=["c"]),
        flags(per_split_data_args_path=str(tmp_path / "parts")),
    ):
        source = DataSource.from_flags(args)
        for part, expected in zip(PARTS, megatron_blends(args), strict=True):
            if expected is None:
                with pytest.raises(TokscaleError, match=f"give --{part}-data-path"):
                    source.blend(part)
            else:
                assert source.blend(part) == normalised(expected)


def test_the_default_split_is_that_of_megatrons_validation(prefixes):
    import inspect

    from megatron.training.arguments import validate_args

    assert f"legacy_default_split_value = '{DEFAULT_SPLIT}'" in inspect.getsource(validate_args)
    assert DataSource.from_flags(flags(data_path=prefixes)) == DataSource(prefixes, "969, 30, 1")


VERBS = {
    "score": ["score", "RUN"],
    "laws": ["laws", "RUN"],
    "plan": [
        "plan",
        "build",
        "frontier",
        "--seq-length",
        "8",
        "--train-samples",
        "9",
        "--out",
        "x",
    ],
    "probe": ["probe", "build", "--seq-length", "8", "--vocab-size", "9", "--out", "x"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_all_the_ways(verb, tmp_path):
    (tmp_path / "words").write_text("0.3 a 0.7 b")
    (tmp_path / "parts").write_text(json.dumps({"train": "a", "valid": ["b"], "test": None}))
    for words, expected in (
        (["--data-path", "a"], DataSource(["a"], DEFAULT_SPLIT)),
        (["--data-path", "a", "b", "--split", "90:10:0"], DataSource(["a", "b"], "90:10:0")),
        (
            ["--data-args-path", str(tmp_path / "words"), "--split", "1"],
            DataSource(["0.3", "a", "0.7", "b"], "1"),
        ),
        (
            ["--train-data-path", "a", "--valid-data-path", "b", "c"],
            DataSource({"train": ["a"], "valid": ["b", "c"]}, None),
        ),
        (
            ["--per-split-data-args-path", str(tmp_path / "parts")],
            DataSource({"train": ["a"], "valid": ["b"]}, None),
        ),
    ):
        arguments = make_parser().parse_args([*VERBS[verb], *words])
        assert DataSource.is_given(arguments)
        assert DataSource.from_flags(arguments) == expected
    assert not DataSource.is_given(make_parser().parse_args(VERBS[verb]))


def bad_ways(folder):
    contents = {
        "empty list": {"train": [], "valid": ["a"], "test": None},
        "empty words": {"train": "", "valid": ["a"], "test": None},
        "missing": {"train": ["a"], "valid": ["a"]},
        "nothing": {"train": None, "valid": None, "test": None},
        "number": {"train": 5, "valid": ["a"], "test": None},
        "nested": {"train": [["a"]], "valid": ["a"], "test": None},
        "true": {"train": [True, "a"], "valid": ["a"], "test": None},
        "nan": {"train": [math.nan, "a", 1, "b"], "valid": ["a"], "test": None},
        "valid": {"train": ["a"], "valid": ["0.3", "a", "b"], "test": None},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "words").write_text("a b")
    (folder / "latin").write_bytes(b"\xe4 b")
    files = [flags(per_split_data_args_path=str(folder / name)) for name in contents]
    return [
        *files,
        flags(),
        flags(data_path=[]),
        flags(split="1,1,1"),
        flags(data_path=["a"], train_data_path=["a"]),
        flags(data_path=["a"], data_args_path=str(folder / "words")),
        flags(data_args_path=str(folder / "words"), train_data_path=["a"], split="1"),
        flags(train_data_path=["a"], per_split_data_args_path=str(folder / "valid")),
        flags(data_args_path=str(folder / "words")),  # Megatron demands --split here
        flags(data_args_path=str(folder / "latin"), split="1"),
        flags(data_args_path=str(folder), split="1"),
        flags(data_args_path="msc://a/b", split="1"),
        flags(per_split_data_args_path="s3://a/b"),
        flags(train_data_path=["a"], split="1,1,1"),
        flags(train_data_path=["a"], valid_data_path=[]),
        flags(data_path=["a"], split=""),
        *(
            argparse.Namespace(**{**vars(flags(data_path=["a"])), name: value})
            for name, value in (
                ("mock_data", True),
                ("object_storage_cache_path", "/tmp"),
                ("per_dataset_sequences_path", "counts.json"),
            )
        ),
    ]


def test_data_that_megatron_refuses_or_reads_otherwise_are_refused(tmp_path):
    for args in bad_ways(tmp_path):
        with pytest.raises(TokscaleError) as caught:
            DataSource.from_flags(args)
        one_line(caught)


def test_flags_that_are_not_read_are_named():
    for name in ("mock_data", "object_storage_cache_path", "per_dataset_sequences_path"):
        args = SimpleNamespace(data_path=["a"], **{name: "x"})
        with pytest.raises(TokscaleError, match=f"--{name.replace('_', '-')} is not supported"):
            DataSource.from_flags(args)


def test_a_prefix_given_twice_is_one_dataset_of_both_weights(prefixes):
    a, b = prefixes
    folder, name = a.rsplit("/", 1)
    words = ["0.1", a, "0.6", b, "0.3", f"{folder}/../{folder.rsplit('/', 1)[1]}/./{name}"]
    found = DataSource(words, "1,0,0").portions("train")
    assert [portion.tokens.prefix for portion in found] == [a, b]
    assert [portion.weight for portion in found] == pytest.approx([0.4, 0.6])
    assert [portion.name for portion in found] == ["a", "b"]
    found = DataSource([a, b, a], "1,0,0").portions("train")
    assert [portion.weight for portion in found] == pytest.approx([300 / 360, 60 / 360])


def test_namesakes_are_numbered_in_the_order_of_the_blend(tmp_path):
    for name in ("web/text", "code/text", "books"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_documents(tmp_path / name, [[1, 2, 3]] * 9)
    words = [f"{tmp_path}/{name}" for name in ("web/text", "code/text", "books")]
    found = DataSource(words, "1,1,1").portions("valid")
    assert [portion.name for portion in found] == ["text#0", "text#1", "books"]

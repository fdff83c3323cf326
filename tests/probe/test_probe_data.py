"""A probe set takes its documents from where Megatron takes those of the same part of the data."""

import argparse
import json

import numpy as np
import pytest
from jobs import EOD, VOCAB_SIZE, markov_documents, write_documents

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.source import DataSource, read_data_args, read_per_split_data_args
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set

FLAGS = ["data_path", "data_args_path", "per_split_data_args_path"]
FLAGS += [f"{part}_data_path" for part in ("train", "valid", "test")]
SEQ_LENGTH = 16


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = {"a": 300, "b": 157, "c": 100}
    return {
        name: write_documents(folder / name, markov_documents(seed, size))
        for seed, (name, size) in enumerate(sizes.items())
    }


def megatron_documents(cache, split, **flags):
    """The documents of each dataset in each part, as Megatron's own builder divides them."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    args = argparse.Namespace(**{name: flags.get(name) for name in FLAGS})
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend=blend,
        blend_per_split=blend_per_split,
        split=split,
        path_to_cache=str(cache),
        tokenizer=MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=VOCAB_SIZE
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    parts = BlendedMegatronDatasetBuilder(GPTDataset, [50, 5, 5], lambda: True, config).build()
    found = {}
    for part, dataset in zip(("train", "valid", "test"), parts, strict=True):
        if dataset is not None:
            each = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
            found[part] = {one.dataset_path: one.indices.tolist() for one in each}
    return found


def probe_documents(data_path, split, part):
    """The documents of each dataset in a probe set of all the windows there are."""
    portions = DataSource(data_path, split).portions(part)
    n_windows = [-(-(portion.lengths - 1) // SEQ_LENGTH) for portion in portions]
    found = {}
    for portion, windows in zip(portions, n_windows, strict=True):  # equal shares: one at a time
        prefix = portion.tokens.prefix
        probe_set = build_probe_set(
            ProbeSettings(
                data_path=[prefix] if split else {part: [prefix]},
                split=split,
                part=part,
                seq_length=SEQ_LENGTH,
                vocab_size=VOCAB_SIZE,
                n_sequences=int(windows.sum()),
                eod=EOD,
            )
        )
        found[prefix] = np.unique(probe_set.document_BS).tolist()
    return found


@pytest.mark.parametrize("split", ["90,5,5", "960,30,10", "1,1,1", "70,30"])
@pytest.mark.parametrize("weights", [None, ("0.2", "0.8"), ("3", "1")])
def test_parts_of_a_split_are_megatrons(prefixes, tmp_path, split, weights):
    words = [prefixes["a"], prefixes["b"], prefixes["c"]]
    if weights:
        words = [weights[0], prefixes["a"], weights[1], prefixes["b"]]
    expected = megatron_documents(tmp_path, split, data_path=words)
    assert {"train", "valid"} <= set(expected)
    for part, documents in expected.items():
        assert probe_documents(words, split, part) == documents


def test_a_file_of_words_is_read_as_megatron_reads_it(prefixes, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(f"0.5 {prefixes['a']}\n0.5   {prefixes['b']}\n")
    expected = megatron_documents(tmp_path, "80,10,10", data_args_path=str(path))
    assert probe_documents(read_data_args(path), "80,10,10", "valid") == expected["valid"]


@pytest.fixture
def per_split(prefixes):
    return {
        "train": ["0.3", prefixes["a"], "0.7", prefixes["b"]],
        "valid": [prefixes["c"], prefixes["b"]],
        "test": [prefixes["c"]],
    }


def test_per_split_parts_are_the_whole_of_their_datasets_as_in_megatron(per_split, tmp_path):
    flags = {f"{part}_data_path": words for part, words in per_split.items()}
    for part, documents in megatron_documents(tmp_path, None, **flags).items():
        assert probe_documents(per_split, None, part) == documents


def test_a_file_of_parts_is_read_as_megatron_reads_it(per_split, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({**per_split, "train": " ".join(per_split["train"]), "test": None}))
    expected = megatron_documents(tmp_path, None, per_split_data_args_path=str(path))
    words = read_per_split_data_args(path)
    assert set(expected) == {"train", "valid"}
    for part, documents in expected.items():
        assert probe_documents(words, None, part) == documents
    assert words["train"] == per_split["train"]
    with pytest.raises(TokscaleError, match="no data for its test part; give --test-data-path"):
        DataSource(words, None).portions("test")


def test_weights_are_those_of_the_blend(per_split, prefixes):
    assert [portion.weight for portion in DataSource(per_split, None).portions("train")] == [
        0.3,
        0.7,
    ]
    portions = DataSource([prefixes["a"], prefixes["b"]], "1,1,1").portions("valid")
    sizes = [portion.lengths.sum() for portion in portions]
    assert [portion.weight for portion in portions] == pytest.approx(sizes / np.sum(sizes))


BAD_FILES = {
    '{"train": [], "valid": []}': '"test"',
    '{"train": 5, "valid": [], "test": []}': '"train"',
    "[1]": "JSON object",
    "no json": "not JSON",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_damaged_file_of_parts_is_refused(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(TokscaleError, match=BAD_FILES[content]):
        read_per_split_data_args(path)


def test_a_missing_or_empty_file_of_words_is_refused(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    for name, message in (("empty", "is empty"), ("nowhere", "cannot read")):
        with pytest.raises(TokscaleError, match=message):
            read_data_args(tmp_path / name)


def test_a_split_goes_with_data_path_alone(per_split, prefixes):
    with pytest.raises(TokscaleError, match="--split"):
        DataSource(per_split, "969,30,1").portions("valid")
    with pytest.raises(TokscaleError, match="--split"):
        DataSource([prefixes["a"]], None).portions("valid")


def settings_of(data_path, split, **changes):
    fields = {"data_path": data_path, "split": split, "seq_length": SEQ_LENGTH}
    return ProbeSettings(**fields | {"vocab_size": VOCAB_SIZE, "eod": EOD} | changes)


@pytest.fixture
def small(tmp_path):
    """Ten documents: 969,30,1 leaves none of them for validation; and ten of one token each."""
    return {
        "few": write_documents(tmp_path / "few", [[1, 2, 3, 4, EOD]] * 10),
        "tiny": write_documents(tmp_path / "tiny", [[1]] * 10),
    }


@pytest.mark.parametrize("size", [{"n_tokens": 300}, {"n_tokens": 3}, {"n_sequences": 2}])
def test_a_dataset_without_documents_in_the_part_is_named_with_what_helps(prefixes, small, size):
    words = [prefixes["a"], small["few"], prefixes["b"]]
    with pytest.raises(TokscaleError) as caught:
        build_probe_set(settings_of(words, "969,30,1", **size))
    assert str(caught.value) == (
        "1 of 3 datasets have no document in the valid part of --split 969,30,1: "
        f"{small['few']}; leave them out of --data-path, give a larger share in --split, or "
        "per-split data"
    )
    del words[1]  # each of the ways out
    assert build_probe_set(settings_of(words, "969,30,1", n_tokens=30)).datasets == ("a", "b")
    words.append(small["few"])
    assert build_probe_set(settings_of(words, "80,20,0", n_tokens=15)).n_sequences
    assert build_probe_set(settings_of({"valid": words}, None, n_tokens=30)).n_sequences


def test_a_dataset_without_a_token_to_predict_is_named(prefixes, small):
    for data_path, split, flag in (
        ([prefixes["a"], small["tiny"]], "1,1,1", "--data-path"),
        ({"valid": [prefixes["a"], small["tiny"]]}, None, "--valid-data-path"),
    ):
        with pytest.raises(TokscaleError, match="no document of 2 tokens or more") as caught:
            build_probe_set(settings_of(data_path, split, n_tokens=30))
        assert f"{small['tiny']}; leave them out of {flag}" in str(caught.value)


@pytest.mark.parametrize(
    ("split", "part"), [("100,0,0", "valid"), ("1", "test"), ("0,1,1", "train")]
)
def test_a_split_without_the_part_says_so(prefixes, split, part):
    with pytest.raises(
        TokscaleError, match=f"--split {split} has no {part} part; expected a share"
    ):
        build_probe_set(settings_of([prefixes["a"]], split, part=part, n_tokens=3))


@pytest.mark.parametrize("unit", ["n_tokens", "n_sequences"])
@pytest.mark.parametrize("per_dataset", ["equal", "proportional"])
def test_too_many_tokens_are_refused_with_the_number_that_fits(prefixes, small, unit, per_dataset):
    words = ["0.7", prefixes["a"], "0.3", small["few"]]
    with pytest.raises(TokscaleError, match="ask for fewer, ") as caught:
        build_probe_set(settings_of(words, "1,1,1", per_dataset=per_dataset, **{unit: 10_000}))
    most = int(str(caught.value).partition("ask for fewer, ")[2].partition(" ")[0])
    build_probe_set(settings_of(words, "1,1,1", per_dataset=per_dataset, **{unit: most}))
    with pytest.raises(TokscaleError):
        build_probe_set(settings_of(words, "1,1,1", per_dataset=per_dataset, **{unit: most + 2}))


def test_a_dataset_too_small_for_any_number_is_named(prefixes, small):
    words = ["0.999", small["few"], "0.001", prefixes["a"]]
    with pytest.raises(TokscaleError, match=r"no number of tokens helps: .* --per-dataset equal"):
        build_probe_set(settings_of(words, "1,1,1", per_dataset="proportional", n_tokens=2000))


def test_a_prefix_given_twice_is_watched_once_with_both_weights(prefixes):
    words = ["0.2", prefixes["a"], "0.5", prefixes["b"], "0.3", prefixes["a"]]
    found = build_probe_set(
        settings_of(words, "1,1,1", per_dataset="proportional", n_sequences=100)
    )
    assert found.datasets == ("a", "b")
    assert np.bincount(found.dataset_BS[:, 0]).tolist() == [50, 50]
    assert found.prefixes == [prefixes["a"], prefixes["b"]]

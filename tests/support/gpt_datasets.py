"""Megatron's own GPT datasets on tiny corpora, in which every token tells where it is from."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jobs import write_documents

from megatron_tokscale.data.samples import Piece, SampleIndex


def write_unique_tokens(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Documents of these lengths; token n of the file has the id `first` + n."""
    stops = first + np.cumsum(lengths)
    return write_documents(
        prefix,
        [list(range(stop - n, stop)) for stop, n in zip(stops.tolist(), lengths, strict=True)],
    )


def gpt_config(cache: Path | None, seq_length: int, *, extra: bool = True, seed: int = 1):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(["unused"], None),
        split="1,0,0",
        path_to_cache=cache and str(cache),
        tokenizer=SimpleNamespace(
            eod=-7, vocab_size=None, unique_identifiers={"class": "Tiny", "path": "Größe/ü"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=extra,
    )


def gpt_dataset(prefix: str, config, n_samples: int | None = None, documents: range | None = None):
    """The training dataset of a prefix, of all its documents or some."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    low = GPTDataset.build_low_level_dataset(prefix, config)
    indices = np.array(documents or range(len(low)), dtype=np.int32)
    return GPTDataset(low, prefix, indices, n_samples, Split.train, config)


def sample_index(dataset) -> SampleIndex:
    return SampleIndex(
        dataset.dataset.sequence_lengths,
        dataset.document_index,
        dataset.sample_index,
        dataset.shuffle_index,
        int(dataset.config.add_extra_token_to_sequence),
    )


def read_tokens(sample: dict, *, extra: bool = True) -> list[int]:
    """All tokens that a sample reads: its inputs, and the label of the last of them."""
    tokens = sample["tokens"].tolist()
    return [*tokens, int(sample["labels"][-1])] if extra else tokens


def pieces_of(tokens: list[int], lengths: list[int], first: int = 0) -> list[Piece]:
    """The documents and offsets that ids written by `write_unique_tokens` tell."""
    start_Q = first + np.cumsum(lengths) - lengths
    pieces: list[Piece] = []
    for token in tokens:
        document = int(np.searchsorted(start_Q, token, side="right")) - 1
        offset = token - int(start_Q[document])
        if pieces and pieces[-1].document == document and pieces[-1].stop == offset:
            pieces[-1] = pieces[-1]._replace(stop=offset + 1)
        else:
            pieces.append(Piece(document, offset, offset + 1))
    return pieces

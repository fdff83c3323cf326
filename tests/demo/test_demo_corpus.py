"""The demo's writer of token ids, read back by the package's reader."""

import pytest

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.demo.corpus import write_ids

pytest.importorskip("megatron.core")


def test_documents_of_ids_are_read_back_as_they_were_written(tmp_path):
    documents = [[1, 2, 65535], [7], [0, 0]]
    assert write_ids(documents, tmp_path / "data") == 6
    tokens = IndexedTokens.open(str(tmp_path / "data"))
    assert tokens.lengths.tolist() == [3, 1, 2]
    assert tokens.stream(range(3)).tolist() == [1, 2, 65535, 7, 0, 0]

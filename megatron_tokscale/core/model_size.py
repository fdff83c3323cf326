"""Measures of a model's size, for the axis M."""

from typing import Final, Literal

type ModelSize = Literal["parameters", "non-embedding", "flops"]
"""Number of parameters, of parameters without embeddings, or of FLOPs per token."""

SIZE_KEYS: Final[dict[ModelSize, str]] = {
    "parameters": "parameters",
    "non-embedding": "non_embedding",
    "flops": "flops_per_token",
}
"""Keys of run.json by the measure."""

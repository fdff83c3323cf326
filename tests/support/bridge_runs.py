"""Runs of a small GPT in Megatron-Bridge's own training loop, for tests."""

import json
from typing import Any

from jobs import TESTS, Corpus, run_forked
from megatrons import bridge_path


def bridge_settings(corpus: Corpus, train_iters: int, **settings: Any) -> str:
    """The settings of `bridge_job.py` as JSON."""
    cache = str(corpus.probe_set.parent / "bridge-cache")
    data = {"data_path": corpus.data_path, "cache": cache, "train_iters": train_iters}
    return json.dumps(data | settings, default=str)


def run_bridge(corpus: Corpus, n_processes: int, train_iters: int, **settings: Any) -> str:
    """Train under Megatron-Bridge to the end and return the job's output."""
    words = (str(TESTS / "bridge_job.py"), bridge_settings(corpus, train_iters, **settings))
    return run_forked(n_processes, *words, python_path=bridge_path())


def probed(corpus: Corpus, **settings: Any) -> dict[str, Any]:
    """Settings of a callback that probes."""
    defaults: dict[str, Any] = {
        "tokscale_probe_set": corpus.probe_set,
        "tokscale_probe_schedule": "linear:2+list:1",
        "tokscale_verify_isolation": True,
    }
    return defaults | settings

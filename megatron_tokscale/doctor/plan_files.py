"""The files of a job's plan, made before the job: `megatron-tokscale plan prepare`.

A job makes them at its start on rank 0, while all its other ranks wait: minutes for a small corpus,
hours for a large one. The verb makes the same files in one process, without a GPU. It reads the
job's flags as the doctor does and calls the functions that the job calls.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.source import DEFAULT_SPLIT, DataSource
from megatron_tokscale.doctor.doctor import enter_folder_of_script, quiet
from megatron_tokscale.doctor.plan_checks import train_samples
from megatron_tokscale.doctor.preflight import parse


def prepare_plan(words: Sequence[str]) -> Path:
    """Make the files of a job's plan that are not there yet; return their folder.

    Args:
        words: the job's command line behind the launcher: a script, if it has one, and the flags.

    Raises:
        TokscaleError: the job has no plan or would be refused, or its start is not known here.
    """
    flags, _ = enter_folder_of_script(words)
    with quiet():
        args, _ = parse(flags)
        return _prepare(args)


def _prepare(args: Namespace) -> Path:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    from megatron_tokscale.training.data.follower import Follower
    from megatron_tokscale.training.data.megatron_datasets import gpt_dataset_config
    from megatron_tokscale.training.events import TrainingState
    from megatron_tokscale.training.history.start import start_of
    from megatron_tokscale.training.settings import JobSettings

    settings = JobSettings.from_args(args)
    if settings.plan is None:
        raise TokscaleError("the job has no plan; expected --tokscale-plan among its flags; add it")
    settings.check()
    start, n_samples = start_of(args), train_samples(args)
    if start is None or n_samples is None:
        missing = "the step at which it resumes" if start is None else "the number of its samples"
        raise TokscaleError(
            f"{missing} is not known from the job's flags; expected flags that tell it; let the "
            "job make the plan's files"
        )
    # What Megatron's validation of the flags would add.
    args.iteration, args.rank, args.data_parallel_size = start.step, 0, 1
    if args.data_path is not None and args.split is None:
        args.split = DEFAULT_SPLIT
    follower = Follower(settings.plan, settings, args)
    config = gpt_dataset_config(args)
    config.fast_cache_load = config.defer_npy_index_mmap = False  # files that are not there yet
    datasets = [
        GPTDataset(
            GPTDataset.build_low_level_dataset(str(part.tokens.prefix), config),
            str(part.tokens.prefix),
            np.array(part.sequences, dtype=np.int32),
            None,  # one epoch, as the plan draws from it
            Split.train,
            config,
        )
        for part in DataSource.from_flags(args).portions("train")
    ]
    state = TrainingState(step=start.step, consumed_samples=start.consumed, args=args)
    return follower.make_files(state, SimpleNamespace(datasets=datasets), n_samples)

"""The losses of one step's training samples, under a saved checkpoint: a part of a replay.

The samples are read as `megatron-tokscale trace` reads them, and go through the probe's forward
pass, in any parallel layout.

Shapes: B samples of the step, S sequence length, N tokens in the loss mask, by rows.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.training import global_vars, print_rank_0

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.record import record_path
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Launch, RunPaths
from megatron_tokscale.store.launches import launch_of
from megatron_tokscale.store.losses import list_losses
from megatron_tokscale.store.sample_losses import (
    Records,
    SamplesHeader,
    make_records,
    replayed_name,
    write_replayed,
)
from megatron_tokscale.trace.steps import Steps
from megatron_tokscale.trace.trace import Trace
from megatron_tokscale.training.events import TrainingState
from megatron_tokscale.training.probe import probe_pass
from megatron_tokscale.training.probe.isolation import isolated
from megatron_tokscale.training.probe.prober import Prober
from megatron_tokscale.training.ranks import first_of_all_ranks, refuse_together, together
from megatron_tokscale.training.support import check_replayed_step


def checkpoint_before(saved: Sequence[int], step: int) -> int:
    """Return the step of the last checkpoint from before step number `step` was taken.

    Raises:
        TokscaleError: there is none.
    """
    before = [each for each in saved if each < step]
    if not before:
        raise TokscaleError(
            f"--tokscale-replay-step {step}: no checkpoint is from before that step: the first one "
            f"is that of step {saved[0]}; give a step after {saved[0]}"
        )
    return before[-1]


class ReplayedStep:
    """The samples of a step, and their losses under a checkpoint. All ranks hold one.

    Attributes:
        step: the step, the first one being 1.
    """

    def __init__(self, step: int, run: Path, prober: Prober, args: Namespace) -> None:
        """Check the settings.

        Args:
            step: the step.
            run: the run directory, with the records of the training's data and launches.
            prober: holds the run directory.
            args: Megatron's arguments.

        Raises:
            TokscaleError: the samples of the training cannot be made again under a flag.
        """
        check_replayed_step(args)
        self.step = step
        self._run, self._prober, self._args = run, prober, args
        self._launches: Sequence[Launch] = ()
        self._samples = range(0)
        self._batch: ProbeSet | None = None

    def read(self, launches: Sequence[Launch]) -> None:
        """Read the samples of the step; all ranks call it.

        Args:
            launches: launches that the checkpoints hold, on the rank that writes.

        Raises:
            AgreedError: the samples of the step are not known, or cannot be read.
        """

        def find() -> str:
            self._launches = self._prober.store.launches() or launches
            losses = list_losses(RunPaths(self._run).losses)
            samples = Steps(self._run, self._launches, losses).samples(self.step)
            return json.dumps([samples.start, samples.stop])

        text = first_of_all_ranks(together(find, where=self._prober.is_writer))
        self._samples = range(*json.loads(text or "[0, 0]"))
        self._batch = together(self._read_batch)

    def take(self, state: TrainingState, checkpoint: int) -> None:
        """Compute the losses under the loaded weights, and write them; all ranks call it.

        Args:
            state: state of the job, with the weights of the checkpoint.
            checkpoint: step of the checkpoint.

        Raises:
            AgreedError: the forward step does not fit, or the file cannot be written.
        """
        assert self._batch is not None and state.forward_step is not None
        batch = self._batch
        loss_N, refusal = None, None
        with isolated(state.model, state.args):
            try:
                loss_N = probe_pass.run(batch, state.forward_step, state.model, state.args)
            except TokscaleError as error:  # on the writer alone
                refusal = str(error)
        refuse_together(refusal)
        run_id = self._prober.store.run_id()
        where = self._prober.is_writer

        def write() -> None:
            assert loss_N is not None
            launch = launch_of(self._launches, self.step)
            header = SamplesHeader(
                run_id=run_id,
                launch_id=launch.launch_id,
                first_step=launch.step,
                rank=0,
                ranks=1,
                seq_length=batch.seq_length,
                checkpoint=checkpoint,
            )
            path = self._prober.store.samples / "replayed" / replayed_name(self.step)
            write_replayed(path, header, _records(self.step, self._samples, batch, loss_N))

        together(write, where=where)
        print_rank_0(
            f"tokscale: losses of the {len(self._samples)} samples of step {self.step}, under the "
            f"checkpoint of step {checkpoint}, are in {self._prober.store.samples / 'replayed'}"
        )

    def _read_batch(self) -> ProbeSet:
        """Return the samples as sequences whose watched tokens are those of the loss mask.

        Raises:
            TokscaleError: the origin of the samples is not known, or a file cannot be read.
        """
        is_recorded = record_path(self._run).is_file()
        cache = self._args.data_cache_path
        trace = Trace.from_cache(cache) if cache and not is_recorded else Trace.open(self._run)
        rows = []
        for k in self._samples:
            found = trace.sample(k)
            tokens = IndexedTokens.open(found.dataset.prefix)
            parts = [tokens.sequence(p.document)[p.start : p.stop] for p in found.pieces]
            rows.append(np.concatenate(parts).astype(np.int32))
        return _batch_of(rows, self._args)


def _batch_of(rows: Sequence[np.ndarray], args: Namespace) -> ProbeSet:
    """Return the sequences of samples, with Megatron's loss mask: see `GPTDataset`."""
    length = int(args.seq_length)
    # Without an extra token in the dataset, the last label is not known, and not in the mask.
    tokens = np.stack([np.append(row, 0)[: length + 1] for row in rows]).astype(np.int32)
    tokens_BS, labels_BS = tokens[:, :-1], tokens[:, 1:]
    mask_BS = np.ones(tokens_BS.shape, np.bool_)
    mask_BS[:, -1] = [len(row) > length for row in rows]
    if args.eod_mask_loss:
        mask_BS &= tokens_BS != global_vars.get_tokenizer().eod
    nowhere_BS = np.zeros(tokens_BS.shape, np.int32)
    return ProbeSet(
        tokens_BS=np.ascontiguousarray(tokens_BS),
        labels_BS=np.ascontiguousarray(labels_BS),
        mask_BS=mask_BS,
        document_BS=nowhere_BS,
        position_BS=nowhere_BS,
        dataset_BS=nowhere_BS.astype(np.int16),
        datasets=("the step's samples",),
        vocab_size=int(tokens.max()) + 1,
    )


def _records(step: int, samples: range, batch: ProbeSet, loss_N: Floats32) -> Records:
    """Return the records of the samples from the losses of their tokens in the loss mask."""
    loss_BS = np.full(batch.mask_BS.shape, -np.inf)
    loss_BS[batch.mask_BS] = loss_N
    n_tokens_B = batch.mask_BS.sum(1)
    is_empty_B = n_tokens_B == 0
    nats_B = np.where(batch.mask_BS, loss_BS, 0.0).sum(1)
    position_B = loss_BS.argmax(1)
    largest_B = loss_BS[np.arange(len(loss_BS)), position_B]
    return make_records(
        step,
        np.arange(samples.start, samples.stop),
        nats_B / np.where(is_empty_B, np.nan, n_tokens_B),
        np.where(is_empty_B, np.nan, largest_B),
        np.where(is_empty_B, -1, position_B),
        n_tokens_B,
    )

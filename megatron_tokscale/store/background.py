"""A thread that writes losses while training continues, one probe at a time.

Shapes: N watched tokens.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from megatron_tokscale.core.arrays import AnyFloats
from megatron_tokscale.store.losses import LossRecord
from megatron_tokscale.store.writer import RunWriter


class BackgroundWriter:
    """Hands probes to a thread that writes them, one at a time.

    The interpreter waits for the thread before it ends, so a probe that was handed over is written
    unless the process is killed.
    """

    def __init__(self, writer: RunWriter):
        self._writer = writer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokscale-losses")
        self._pending: Future[None] | None = None

    def submit(self, loss_N: AnyFloats, record: LossRecord) -> None:
        """Start to write a probe; `loss_N` must not be changed until `join`."""
        assert self._pending is None, "join the last probe first"
        self._pending = self._thread.submit(self._writer.write, loss_N, record)

    def wait(self) -> None:
        """Wait until the last probe is on disk or has failed; `join` returns which."""
        if self._pending is not None:
            wait([self._pending])

    def join(self) -> OSError | None:
        """Wait until the last probe is on disk; return the error if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.result()
        except OSError as error:
            return error
        return None

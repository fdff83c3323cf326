"""A thread that writes losses while training continues, one piece at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class BackgroundWriter[*Piece]:
    """Hands pieces of losses to a thread that writes them, one at a time.

    The interpreter waits for the thread before it ends, so a piece that was handed over is written
    unless the process is killed.
    """

    def __init__(self, write: Callable[[*Piece], None]):
        """Keep the function that writes a piece; it may raise `OSError`."""
        self._write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokscale-losses")
        self._pending: Future[None] | None = None

    def submit(self, *piece: *Piece) -> None:
        """Start to write a piece, whose arrays must not be changed until `join`."""
        assert self._pending is None, "join the last piece first"
        self._pending = self._thread.submit(self._write, *piece)

    @property
    def is_busy(self) -> bool:
        """True while a piece is being written."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until the last piece is on disk or has failed; `join` returns which."""
        if self._pending is not None:
            wait([self._pending])

    def join(self) -> OSError | None:
        """Wait until the last piece is on disk; return the error if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.result()
        except OSError as error:
            return error
        return None

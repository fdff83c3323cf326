"""The ends of a job with an error: one line, and what the training loop would have finished."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron_tokscale.core.errors import AgreedError, exit_with_one_line, say


def exit_rank_with_one_line() -> AbstractContextManager[None]:
    """End this rank as `exit_with_one_line` does; the first rank to fail prints its own error."""
    from megatron_tokscale.training.ranks import is_first_to_end, meet_to_end

    return exit_with_one_line(is_first_to_end, meet_to_end)


@contextmanager
def finishing_saves(finish: Callable[[], None]) -> Iterator[None]:
    """Finish an asynchronous checkpoint, and flush the scalars, if all ranks end with an error.

    A training loop does both at its end, which the error skips. A checkpoint that cannot be
    finished is reported beside the error.

    Args:
        finish: finishes the checkpoint. It is collective, so an error of one rank alone must not
            wait for it.
    """
    try:
        yield
    except AgreedError:
        from megatron_tokscale.training.scalars import flush_scalars

        flush_scalars()
        try:
            finish()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            say(f"the checkpoint that was being saved is not finished: {error}")
        raise


def finish_save() -> None:
    """Finish an asynchronous checkpoint of Megatron's own loop; all ranks call it together."""
    from megatron.training.async_utils import maybe_finalize_async_save

    maybe_finalize_async_save(blocking=True, terminate=True)

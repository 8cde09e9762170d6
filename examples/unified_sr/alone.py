"""Work that processes side by side need once: one does it, the others wait and take its result, or are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(lock: Path, what: str, say: Callable[[str], None], *, patience: float | None = None) -> Iterator[None]:
    """Hold a lock, which the system frees if the process that holds it dies.

    Where there can be no lock, as in a folder that cannot be written, the work is done without; that is said.

    Args:
        lock: its file, which stays.
        what: is being made, for the line that says what is waited for.
        say: prints a line to the user.
        patience: seconds that it waits for another process before it gives up; None waits as long as that takes.

    Raises:
        BlockingIOError: if another process holds the lock longer than the patience.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=patience or 0)
        except Timeout:
            if patience is not None:
                raise BlockingIOError(
                    f"{what}: another process is at it (it holds {str(lock)!r}); wait until it is over, or end it"
                ) from None
            say(f"{what}: another process is at it, whose result is waited for")
            held.acquire()
    except BlockingIOError:
        raise
    except (OSError, NotImplementedError) as error:
        say(f"{what}: made without a lock, so perhaps by several processes ({error})")
        yield
        return
    try:
        yield
    finally:
        held.release()

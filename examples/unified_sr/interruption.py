"""A run that is asked to stop (SIGTERM) leaves at the next moment from which it can go on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

UNFINISHED = 75
"""The exit status of what was stopped and goes on when it is started again: EX_TEMPFAIL of sysexits.h."""


class Interrupted(BaseException):
    """The run was asked to stop. No error, so that nothing takes it for one."""


class Interruption:
    """Whether this process was asked to stop. Outside of ``deferred`` a request ends what goes on at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._deferred = False

    def listen(self) -> None:
        """Take SIGTERM for a request, and leave Ctrl-C to the process that started this one."""
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self, wait: bool = True) -> Iterator[None]:
        """Inside, a request waits until the end; with ``wait=False`` it does not, whatever is around.

        Raises:
            Interrupted: on entering or leaving, as soon as a request that is there need not wait.
        """
        self._heed()
        before, self._deferred = self._deferred, wait
        try:
            self._heed()
            yield
        finally:
            self._deferred = before
        self._heed()

    def _receive(self, number: int, frame: Any) -> None:
        del number, frame
        self.wanted = True
        self._heed()

    def _heed(self) -> None:
        if self.wanted and not self._deferred:
            raise Interrupted


INTERRUPTION = Interruption()
"""That of this process: signals are of the whole process."""

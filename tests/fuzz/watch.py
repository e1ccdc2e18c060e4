"""What no input may bring about: anything run, written or fetched, a second of work, a gigabyte."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds of the processor that one input may take.
SECONDS = 1.0

#: Audit events (docs.python.org/3/library/audit_events.html) that a reader of files never causes.
_FORBIDDEN = (
    *(
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
    ),
    *("subprocess.Popen", "socket.connect", "socket.bind", "urllib.Request", "pty.spawn"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink"),
    *("os.truncate", "shutil.", "ctypes.dlopen", "code.__new__", "webbrowser.open", "ftplib."),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watching = False


class Executed(AssertionError):
    """The reading of a file did something to the world."""


class TooSlow(AssertionError):
    """An input took longer than :data:`SECONDS`."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING and path != os.devnull:
            raise Executed(f"{path!r} was opened to write")
    elif event.startswith(_FORBIDDEN):
        raise Executed(f"{event} {arguments!r}")


sys.addaudithook(_audit)


@contextmanager
def watched(seconds: float = SECONDS) -> Iterator[None]:
    """Fails where the block does more than read, or takes longer of the processor's time."""
    global _watching
    began = time.process_time()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    taken = time.process_time() - began
    if taken > seconds:
        raise TooSlow(f"it took {taken:.2f} s")


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024

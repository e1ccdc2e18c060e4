"""A process on a pseudo-terminal, to see what a person sees (POSIX only)."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_on_terminal(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], columns: int = 100
) -> tuple[int, str]:
    """Run with stdout and stderr on one terminal; returns the exit code and what it showed."""
    if sys.platform == "win32":
        raise NotImplementedError("there is no pty module on Windows")
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    unwanted = {"COLUMNS", "NO_COLOR", "FORCE_COLOR"}
    inherited = {key: value for key, value in os.environ.items() if key not in unwanted}
    child = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    shown = read_to_end(ours)
    return child.wait(), shown.replace("\r\n", "\n")


def read_to_end(terminal: int) -> str:
    """What comes out of our end of a terminal until the other is closed; ours is closed then."""
    received = b""
    try:
        while data := os.read(terminal, 65536):
            received += data
    except OSError:
        # This is how Linux says that the other end is closed.
        pass
    os.close(terminal)
    return received.decode()

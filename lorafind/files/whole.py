"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``target`` when the block has ended well.

    It stands in the same folder, under a name that the scan passes over and that no other process
    has. Raises OSError with the name of ``target``.
    """
    part = target.with_name(f".lorafind-{secrets.token_hex(6)}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise

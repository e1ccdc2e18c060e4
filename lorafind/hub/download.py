"""One large file over plain HTTP: goes on where an earlier try has ended, checked before it counts.

What has come so far stays beside the place of the file under a name of its own. The file itself
appears when all of it is there and its SHA-256 is the one that was stated.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from lorafind.bases.problem import BasisProblem
from lorafind.hub.problem import http
from lorafind.index.progress import Progress

#: Seconds of waiting before each further try that has brought nothing new.
PAUSES = (0.5, 1.0, 2.0)
_MIB = 1 << 20
#: Answers that another try may change.
_PASSING = frozenset({500, 502, 503, 504})


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    name: str,
    url: str,
    headers: Mapping[str, str],
    target: Path,
    size: int,
    digest: str,
    check: Callable[[Path], None],
    watch: Progress,
) -> None:
    """Bring the ``size`` bytes of a URL to ``target``.

    name: what messages call it; digest: SHA-256 of the bytes, hex; check: a last look at the whole
    file before it appears.

    Raises BasisProblem where the disk has no room or other bytes have come (which are removed),
    what ``check`` raises (then they are removed too), and the errors of the HTTP library and of
    huggingface_hub.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.lorafind.incomplete")
    partial.touch()
    with partial.open("r+b") as file:
        if file.seek(0, os.SEEK_END) > size:
            _restart(file)
        _make_sure_of_room(target.parent, size - file.tell())
        # A bar in MiB: in files there would be nothing to see.
        watch.stage("Downloading, MiB", -(-size // _MIB), 0)
        watch.advance(file.tell() // _MIB, 0)
        _complete(url, headers, file, size, watch)
    try:
        if (found := sha256(partial)) != digest:
            raise BasisProblem(
                f"{name} came with other bytes than the Hub states (SHA-256 {found}, not "
                f"{digest}): nothing was kept. Try again; if it happens again, do not use it."
            )
        check(partial)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            partial.unlink(missing_ok=True)
        raise
    partial.replace(target)


def _complete(
    url: str, headers: Mapping[str, str], file: BinaryIO, size: int, watch: Progress
) -> None:
    """Append until all bytes are there; gives up when several tries in a row bring nothing."""
    from huggingface_hub.errors import HfHubHTTPError

    pauses = iter(PAUSES)
    while (before := file.tell()) < size:
        failure: Exception | None = None
        try:
            _append(url, headers, file, size, watch)
        except http().TransportError as error:
            failure = error
        except HfHubHTTPError as error:
            if error.response.status_code not in _PASSING:
                raise
            failure = error
        if file.tell() > before:
            pauses = iter(PAUSES)
            continue
        pause = next(pauses, None)
        if pause is None:
            raise failure or http().RemoteProtocolError("it ended too early")
        time.sleep(pause)


def _append(
    url: str, headers: Mapping[str, str], file: BinaryIO, size: int, watch: Progress
) -> None:
    """Ask for what is missing and write what comes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        get_session,
        hf_raise_for_status,
    )

    # Compressed, an answer would have other offsets.
    asked = {**headers, "Accept-Encoding": "identity"}
    if file.tell():
        asked["Range"] = f"bytes={file.tell()}-"
    waiting = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=asked, timeout=waiting) as answer:
        hf_raise_for_status(answer)
        if file.tell() and answer.status_code != 206:
            _restart(file)
        # As they come: blocks of a fixed size would lose what a cut connection has brought.
        for block in answer.iter_bytes():
            before = file.tell()
            # One byte too many is enough to tell that these are not the bytes that were stated.
            file.write(block[: size + 1 - before])
            watch.advance(file.tell() // _MIB - before // _MIB, 0)
            if file.tell() > size:
                return


def _restart(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _make_sure_of_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BasisProblem(
            f"The disk has no room for this basis: it needs {needed / 1e6:.1f} MB in {folder}, "
            f"{free / 1e6:.1f} MB are free. Free some space, or set HF_HOME to another disk."
        )

"""Where a file is: a path of this machine, or the URL of an object in a store (``s3://…``).

Everything that only needs the text of a URL is here, and nothing that talks to a store: local
paths never import fsspec. What does talk is :mod:`lorafind.files.remote`.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

#: What begins a URL. A scheme of one letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
#: Other names of a scheme, which would make one object two.
_SAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs"}
#: Schemes of local files.
_LOCAL = frozenset({"file", "local"})
#: Parameters of a URL that open it for whoever reads them.
_SECRET = re.compile(r"[?&][^=&]*(sig|token|secret|key|passw|credential)[^=&]*=", re.IGNORECASE)

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class State(NamedTuple):
    """Of ``os.stat_result`` what tells one state of a file from another; see :func:`state`."""

    st_size: int
    st_mtime_ns: int


def is_remote(path: AnyPath) -> bool:
    """True for a URL of a store, which no function of ``os`` understands."""
    found = _URL.match(os.fsdecode(path))
    return found is not None and found[1].lower() not in _LOCAL


def scheme_of(url: AnyPath) -> str:
    """The scheme of a URL, empty for a path."""
    found = _URL.match(os.fsdecode(url))
    return found[1] if found else ""


def absolute(path: AnyPath) -> str:
    """The one way in which a place is written.

    A path is made absolute, ``~`` expanded; a URL gets its scheme's usual name and loses slashes
    at its end. Raises OSError for a URL of everything, and for one with a password, key or token in
    it, which would stand in the index and in messages.
    """
    text = os.fsdecode(path)
    found = _URL.match(text)
    if found is None:
        return os.path.abspath(os.path.expanduser(text))
    scheme, rest = found[1].lower(), text[found.end() :]
    if scheme in _LOCAL:
        return os.path.abspath(rest)
    user, at, host = rest.partition("/")[0].rpartition("@")
    if (at and ":" in user) or _SECRET.search(rest):
        shown = f"{scheme}://{host if at else rest.partition('?')[0]}"
        raise OSError(
            errno.EINVAL,
            "a URL with a password, key or token in it is not taken, since it would stand in the "
            "index: put that into the store's own configuration or fsspec's (~/.config/fsspec)",
            shown,
        )
    scheme, rest = _SAME.get(scheme, scheme), rest.rstrip("/")
    if not rest and scheme != "memory":
        raise OSError(errno.EINVAL, "name what is to be read in it, as in s3://bucket/loras", text)
    return f"{scheme}://{rest}"


def below(url: bytes, root: bytes) -> bytes:
    """What follows ``root`` in the URL of something in it; empty for anything else."""
    start = root if root.endswith(b"/") else root + b"/"
    return url[len(start) :] if url.startswith(start) else b""


def beside(path: AnyPath, name: str) -> str:
    """The path of ``name`` in the folder of a file."""
    text = os.fsdecode(path)
    if is_remote(text):
        return text[: text.rindex("/") + 1] + name
    return os.path.join(os.path.dirname(text), name)


def folder_of(path: AnyPath) -> str:
    """The folder of a file, as it can be listed."""
    text = os.fsdecode(path)
    if not is_remote(text):
        return os.path.dirname(text)
    start, _, _ = text.rpartition("/")
    return start + "/" if start.endswith("/") else start


def handled(path: AnyPath) -> Path | str:
    """A path as a Path, which would merge the slashes of a URL: that stays a text."""
    text = os.fsdecode(path)
    return text if is_remote(text) else Path(text)


def exists(path: AnyPath) -> bool:
    """True where something is there; of a URL only that it is one, since asking takes a while."""
    return is_remote(path) or os.path.lexists(path)


def state(path: AnyPath) -> os.stat_result | State:
    """Size and mtime (ns) of a file; equal as long as it is the same.

    Of an object see :class:`lorafind.files.remote.Facts`. Raises OSError.
    """
    if not is_remote(path):
        return os.stat(path)
    from lorafind.files import remote

    return remote.facts(os.fsdecode(path)).state

"""Objects in stores (``s3://``, ``hf://``, ``memory://`` …) through fsspec, which is imported here
alone and first when a URL is used.

fsspec's own configuration holds: environment, ``~/.config/fsspec``, and what a store's library
reads (``AWS_PROFILE``, ``HF_TOKEN``). Whatever a library raises becomes an OSError whose
``strerror`` is a sentence; a file that is not there is a FileNotFoundError.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from typing import Any

from lorafind.files.outcome import one_line
from lorafind.files.place import State, scheme_of

#: An object up to this many bytes comes in one request; of a larger one so much comes first, for
#: its header, and then BLOCK at a time.
WHOLE, FIRST, BLOCK = 16 * 2**20, 4 * 2**20, 32 * 2**20

#: What stores call the version of an object: it changes with the bytes. In order of preference,
#: and each the same in a listing and for a single object.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "xet_hash", "generation", "ino")
#: What they call the time of the last change.
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
#: Libraries that are missing → our extra.
_EXTRAS = {"s3": "s3"}

_MAX = 2**63 - 1
_SECRETS = re.compile(r"//[^/@\s]*:[^/@\s]*@")


@dataclass(frozen=True)
class Facts:
    """What a store says of an object.

    url: full. size: bytes. mtime: seconds since 1970, 0 where the store does not say. mark: 63 bits
    of a digest of URL, size, time and the store's version tag (ETag, blob id, …), never 0: it
    changes whenever one of them does, and differs between objects. tagged: there is such a tag, so
    that no change hides behind a coarse time.
    """

    url: str
    size: int
    mtime: int
    mark: int
    tagged: bool

    @property
    def state(self) -> State:
        """Size and mtime (ns), whose part below a second is of ``mark``.

        Stores give the time to the second, if at all; so the tag decides wherever states are
        compared.
        """
        return State(self.size, self.mtime * 10**9 + self.mark % 10**9)


@dataclass(frozen=True)
class Entry:
    """One line of a listing: a folder, or an object with its facts. name: the last part."""

    name: str
    url: str
    facts: Facts | None


def listing(url: str) -> list[Entry]:
    """What is directly below a URL, by name; one request where the store's pages allow.

    Raises FileNotFoundError where nothing is: stores know no empty folder.
    """
    with _explained(url):
        fs, path = _open(url)
        start = path.rstrip("/")
        found: dict[tuple[str, bool], Entry] = {}
        for info in fs.ls(path, detail=True, **_fresh(url)):
            name = str(info["name"]).rstrip("/")
            if not name.startswith(start + "/" if start else ""):
                if name == start and info.get("type") != "directory":
                    raise NotADirectoryError(errno.ENOTDIR, "it is a single file", url)
                continue
            below = name[len(start) :].lstrip("/")
            if not below:
                continue
            full = url + below if url.endswith("/") else f"{url}/{below}"
            folder = info.get("type") == "directory"
            if not folder and info.get("size") is None:
                info = fs.info(info["name"], **_fresh(url))
            found[below, folder] = Entry(below, full, None if folder else _facts(full, info))
        return [found[key] for key in sorted(found)]


def many_at_once(url: str) -> bool:
    """True where several threads may list at the same time."""
    with _explained(url):
        fs, _ = _open(url)
        return bool(fs.async_impl)


def facts(url: str) -> Facts:
    """The facts of one object, from the store; raises IsADirectoryError for a folder."""
    with _explained(url):
        fs, path = _open(url)
        info = fs.info(path, **_fresh(url))
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "it is a folder", url)
        if info.get("size") is None:
            raise OSError(errno.EIO, "its size is not told by the server", url)
        return _facts(url, info)


def read(url: str, begin: int, end: int) -> bytes:
    """The bytes from ``begin`` to ``end``, fewer where the object ends before; one request."""
    if end <= begin:
        return b""
    with _explained(url):
        fs, path = _open(url)
        data = bytes(fs.cat_file(path, start=begin, end=end))
        if len(data) > end - begin:
            # A web server that knows no ranges sends all of a file.
            if begin:
                raise OSError(errno.EIO, "its server gives no parts of files", url)
            data = data[: end - begin]
        return data


class RemoteFile(io.RawIOBase):
    """An object opened to be read from its beginning on, in few and large requests."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self._before = facts(url)
        self._position = 0
        self._block = b""
        self._start = 0
        self._used = False
        self._until = self._before.size
        self._ahead = WHOLE if self._before.size <= WHOLE else FIRST

    def state(self) -> State:
        """The state of the object when it was opened, as it is now at each later call."""
        return (facts(self.url) if self._used else self._before).state

    def expect(self, end: int) -> None:
        """Nothing beyond byte ``end`` will be asked for."""
        self._until = min(end, self._before.size)
        self._ahead = BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("only from the beginning")
        self._position = position
        return position

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        if not len(view):
            return 0
        offset = self._position - self._start
        if not 0 <= offset < len(self._block):
            self._fetch(len(view))
            offset = 0
        piece = memoryview(self._block)[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch(self, wanted: int) -> None:
        self._used = True
        # The old block is let go first: two of them need not be held.
        self._block, self._start = b"", self._position
        stop = max(self._until, self._position + min(wanted, BLOCK))
        stop = min(stop, self._position + self._ahead, self._before.size)
        try:
            self._block = read(self.url, self._position, stop)
        except FileNotFoundError:
            raise
        except OSError:
            # A range beyond the end of what is there now is an error to some stores.
            if facts(self.url).state == self._before.state:
                raise
        self._ahead = BLOCK


# ---------------------------------------------------------------------------- fsspec


def _open(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and the path in it; fsspec keeps one instance for each."""
    import fsspec
    from fsspec.asyn import AsyncFileSystem

    scheme = scheme_of(url)
    kind = fsspec.get_filesystem_class(scheme)
    options = kind._get_kwargs_from_urls(url)
    if issubclass(kind, AsyncFileSystem) or scheme == "ftp":
        # A listing from before would hide that an object has changed.
        options["use_listings_cache"] = False
    return fsspec.filesystem(scheme, **options), str(kind._strip_protocol(url))


def _fresh(url: str) -> dict[str, bool]:
    """The Hub's filesystem has a cache of its own."""
    return {"refresh": True} if scheme_of(url) == "hf" else {}


def _facts(url: str, info: dict[str, Any]) -> Facts:
    size = min(int(info["size"]), _MAX)
    tag = _tag(info)
    # The Hub tells the time of the last commit in some answers and not in others.
    moment = 0 if scheme_of(url) == "hf" else _time(info)
    text = f"{url}\0{size}\0{moment!r}\0{tag}".encode(errors="surrogateescape")
    mark = int.from_bytes(blake2b(text, digest_size=8).digest(), "big") & _MAX
    return Facts(url, size, math.floor(moment), mark or 1, bool(tag))


def _tag(info: dict[str, Any]) -> str:
    lfs = info.get("lfs")
    if lfs is not None:
        known = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        if known:
            return str(known)
    return next((str(info[name]).strip('"') for name in _TAGS if info.get(name)), "")


def _time(info: dict[str, Any]) -> float:
    """Seconds since 1970; to the second where there is a tag: listings give more digits."""
    value = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 <= value < 2**33:
        return 0
    return math.floor(value) if _tag(info) else float(value)


def _parsed(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text)
    except ValueError:
        return None


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a store's library raises into an OSError with a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "it is not there", url) from error
    except PermissionError as error:
        why = f"access is denied ({_said(error)}): are the credentials of the store in place?"
        raise PermissionError(errno.EACCES, why, url) from error
    except ImportError as error:
        raise OSError(errno.ENOSYS, _missing(url, error), url) from error
    except OSError as error:
        if error.filename == url and error.strerror:
            raise
        raise OSError(error.errno or errno.EIO, _said(error), url) from error
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # The libraries of stores raise classes of their own: botocore's, aiohttp's, requests'.
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            why = f"no filesystem for {scheme_of(url)}:// is known to fsspec"
            raise OSError(errno.ENOSYS, why, url) from error
        raise OSError(errno.EIO, _said(error), url) from error


def _missing(url: str, error: ImportError) -> str:
    extra = _EXTRAS.get(scheme_of(url))
    if extra:
        return f'{scheme_of(url)}:// needs the extra "{extra}": pip install "lorafind[{extra}]"'
    return f"{scheme_of(url)}:// needs another package: {_said(error)}"


def _said(error: BaseException) -> str:
    """The first line of what a library says, without what may be a secret in it."""
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return one_line(_SECRETS.sub("//", text.splitlines()[0]))

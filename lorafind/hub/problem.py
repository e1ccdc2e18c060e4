"""What goes wrong between here and the Hub, in one sentence each.

The HTTP library is the one that huggingface_hub stands on: httpx in its version 1, httpx2 later.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from lorafind.bases.problem import BasisProblem
from lorafind.hub.address import Address

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_TOKEN = "set HF_TOKEN or run `hf auth login`"


@cache
def http() -> Any:
    """The module of the HTTP library, for its exceptions."""
    from huggingface_hub.errors import HfHubHTTPError

    home = next(c.__module__ for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    return import_module(home.partition(".")[0])


@contextmanager
def explained(
    host: str, address: Address, *, token: bool, writing: bool = False, cached: str = ""
) -> Iterator[None]:
    """Turns errors of the Hub, the network and the disk inside the block into a BasisProblem.

    token: whether one was sent; writing: whether the block changes the repository; cached: the
    basis of the cache that would do, if the Hub is out of reach.
    """
    try:
        yield
    except BasisProblem:
        raise
    except Exception as error:
        cause = _root(error)
        sentence = _answer(cause, host, address, token, writing) or _connection(cause, host)
        if sentence and cached and _out_of_reach(cause):
            sentence += f" Or use what the cache has, {cached}."
        sentence = sentence or _local(cause, writing)
        if not sentence:
            raise
        raise BasisProblem(sentence) from error


def _root(error: BaseException) -> BaseException:
    """The error that huggingface_hub has wrapped into another of its own, or the error itself."""
    while isinstance(error, RuntimeError | FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _answer(error: BaseException, host: str, address: Address, token: bool, writing: bool) -> str:
    """What the Hub has answered; empty where it has not."""
    from huggingface_hub import errors

    repository = address.repository
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is open only to whom its owner admits: ask for access at "
            f"{host}/{repository}, then {_TOKEN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repository} on {host} has no revision {address.revision or 'main'}: check the part "
            "after @."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repository} on {host} no longer holds a file that it lists: try again."
    if isinstance(error, errors.HFValidationError):
        return f"{repository} cannot be the name of a repository: write owner/name."
    if not isinstance(error, errors.HfHubHTTPError):
        return ""
    status = error.response.status_code
    said = f" ({error.server_message.splitlines()[0]})" if error.server_message else ""
    if status == 401 and token:
        return f"{host} does not accept the token for {repository}{said}: make a new one."
    if status == 401 and writing:
        return f"{host} lets nobody write to {repository} without a token: {_TOKEN}."
    if status == 401:
        return (
            f"{host} shows no repository {repository}: the name is wrong, or it is private; for a "
            f"private one {_TOKEN}."
        )
    if status == 403:
        right = "write to" if writing else "read"
        return f"{host} does not let you {right} {repository}{said}: use a token with that right."
    if status == 404:
        hidden = "it is private and the token may not see it"
        hidden = hidden if token else f"it is private; then {_TOKEN}"
        return f"There is no repository {repository} on {host} (or {hidden}): check the name."
    if status == 429:
        return (
            f"{host} has had too many requests from here (429): try again "
            f"{_when(error.response.headers)}."
        )
    if status >= 500:
        return f"{host} is out of order ({status}): try again in a while."
    return f"{host} refuses what was asked of {repository} ({status}){said}."


def _when(headers: Mapping[str, str]) -> str:
    """When a request may be made again, as the answer says (RFC 9110 10.2.3, RateLimit draft)."""
    after = headers.get("Retry-After", "").strip()
    if not after and (reset := re.search(r"\bt\s*=\s*(\d+)", headers.get("RateLimit", ""))):
        after = reset[1]
    if after.isdigit():
        return f"in {after} seconds"
    return f"after {after}" if after else "in a few minutes"


def _out_of_reach(error: BaseException) -> bool:
    """Whether the Hub gave no answer of its own, so that an older copy is better than none."""
    answer = getattr(error, "response", None)
    return answer is None or answer.status_code == 429 or answer.status_code >= 500


def _connection(error: BaseException, host: str) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return f"{host} was not asked, because HF_HUB_OFFLINE is set: unset it to go online."
    if not isinstance(error, http().HTTPError):
        return ""
    said = f" ({error})" if str(error) else ""
    if isinstance(error, http().TimeoutException):
        return f"{host} does not answer{said}: check the connection and try again."
    if isinstance(error, http().ConnectError | http().ProxyError | http().UnsupportedProtocol):
        return f"{host} cannot be reached{said}: check the connection and HF_ENDPOINT."
    return f"The connection to {host} was cut{said}: run the same command again."


def _local(error: BaseException, writing: bool) -> str:
    """What the disk, or an answer that is none of the Hub's, has brought about."""
    from huggingface_hub.errors import FileMetadataError

    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        return (
            f"The disk is full{where}: free some space and run the same command again, it goes on "
            "where it was."
        )
    if isinstance(error, PermissionError) and error.filename:
        return (
            f"{os.fsdecode(error.filename)} may not be written: set HF_HOME to a folder of yours."
        )
    if isinstance(error, json.JSONDecodeError | FileMetadataError):
        return (
            "What answered is not the Hub, or a proxy stands in between: check the connection and "
            "HF_ENDPOINT."
        )
    if writing and isinstance(error, ValueError):
        return f"The Hub refuses this basis: {' '.join(str(error).split())}"
    return ""

"""Bases by name, fetched from the Hugging Face Hub where they are not here, and published there.

A repository holds ``basis.safetensors``, ``config.json`` (the facts of the basis without its long
lists), the card ``README.md`` and its plots. Only the first two are ever downloaded. A branch or a
tag is pinned to its commit before anything is; the SHA-256 that the Hub states for the file is
checked, and the test vector inside it recomputed, before it enters huggingface_hub's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafind.bases.problem import BasisProblem
from lorafind.hub import folder, registry
from lorafind.hub.address import PREFIX, Address, Found, parse
from lorafind.hub.client import Hub, Pushed
from lorafind.index.progress import Progress


def resolve(
    name: str,
    *,
    offline: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    watch: Progress | None = None,
) -> Found:
    """The basis file that a name stands for.

    name: a path; name or id of a basis in the user's folder (:mod:`lorafind.hub.folder`);
    ``hf:owner/name[@revision]``; a basis of lorafind's registry. offline: only what is here; token:
    None for HF_TOKEN or the one that ``hf auth login`` has saved; endpoint: None for HF_ENDPOINT or
    https://huggingface.co.

    Raises BasisProblem.
    """
    found, sha256 = locate(name)
    if isinstance(found, Found):
        return found
    return Hub(endpoint, token, offline).fetch(found, sha256, watch)


def locate(name: str) -> tuple[Found | Address, str]:
    """What a name stands for, without any connection: a file, or where to fetch one.

    The second is the SHA-256 that the file has to have (hex), empty where only the Hub knows it.
    Raises BasisProblem.
    """
    if name.startswith(PREFIX):
        return parse(name), ""
    if (path := folder.local(name)) is not None:
        return Found(path, str(path)), ""
    if (entry := registry.named(name)) is not None:
        return Address(entry.repository, entry.revision), entry.sha256
    raise BasisProblem(folder.unknown(name, [entry.repository for entry in registry.entries()]))


def push(
    path: Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "",
    pictures: Sequence[Path] = (),
    endpoint: str | None = None,
    bars: bool = False,
) -> Pushed:
    """Publish a basis file with its card, in one commit; the repository is made if need be.

    repository: ``owner/name``; revision: a branch, made if need be, None for main; message: of the
    commit, empty for one that names the basis; pictures: PNG files that the card shows; bars: let
    huggingface_hub show its progress; token and endpoint as in :func:`resolve`.

    Raises BasisProblem, also for a file that is no whole basis.
    """
    hub = Hub(endpoint, token)
    return hub.push(path, parse(repository).at(revision or ""), private, message, pictures, bars)

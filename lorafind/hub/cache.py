"""Bases in the cache of huggingface_hub.

Its layout (huggingface.co/docs/huggingface_hub/guides/manage-cache): ``models--owner--name`` with
``blobs/<digest>``, ``snapshots/<commit>/<file>`` (links to blobs, copies where links cannot be
made) and ``refs/<branch or tag>``, which hold a commit each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lorafind.hub.address import Address

FILE = "basis.safetensors"
CONFIG = "config.json"
_SHORTENED = re.compile("[0-9a-f]{7,39}")
SHA256 = re.compile("[0-9a-f]{64}")


def root() -> Path:
    """The folder of the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def storage(repository: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub.file_download import repo_folder_name

    return root() / repo_folder_name(repo_id=repository, repo_type="model")


def held(address: Address, file: str = FILE) -> Path | None:
    """A file in the cache; of a branch or tag, as it was when it was last fetched."""
    from huggingface_hub import try_to_load_from_cache

    revision = address.revision or None
    path = try_to_load_from_cache(address.repository, file, cache_dir=root(), revision=revision)
    if isinstance(path, str):
        return Path(path)
    if _SHORTENED.fullmatch(address.revision):
        found = [c for c in commits(address, file) if c.startswith(address.revision)]
        if len(found) == 1:
            return storage(address.repository) / "snapshots" / found[0] / file
    return None


def commits(address: Address, file: str = FILE) -> list[str]:
    """The commits at which the cache has a file of a repository."""
    places = storage(address.repository).glob(f"snapshots/*/{file}")
    return sorted(path.parent.name for path in places if path.is_file())


def everything() -> Iterator[tuple[Address, Path]]:
    """Every basis in the cache, pinned."""
    for path in sorted(root().glob(f"models--*/snapshots/*/{FILE}")):
        owner, _, name = path.parents[2].name.removeprefix("models--").partition("--")
        if name and path.is_file():
            yield Address(f"{owner}/{name}", path.parent.name), path


def stated(path: Path) -> str:
    """The SHA-256 (hex) by which the cache calls a large file; empty where it has no links."""
    name = path.resolve().name
    return name if SHA256.fullmatch(name) else ""


def drop(path: Path) -> None:
    """Take a file out of the cache, with its blob."""
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)


def remember(address: Address, commit: str) -> None:
    """Note what a branch or tag is, for when there is no connection."""
    if address.pinned:
        return
    place = storage(address.repository) / "refs" / (address.revision or "main")
    # Others may have filled a cache that this user may only read.
    if place.is_file() and place.read_text() == commit:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    fresh.write_text(commit)
    fresh.replace(place)

"""Which files beside a weight file belong to it alone, and so go where it goes."""

from __future__ import annotations

import os
from pathlib import Path

from lorafind.files.scan import PICKLED, SAFETENSORS
from lorafind.files.sidecars import CONFIG, PREVIEWS, READERS

_ENDINGS = tuple(os.fsdecode(ending) for ending in (*SAFETENSORS, *PICKLED))


def beside(path: str) -> tuple[list[str], list[str]]:
    """Sidecars and previews of a weight file: those that are its own, and names of those that stay.

    What another weight file of the folder has a claim on stays, and so does a link, whose target
    may be given relative to its folder. Raises OSError where the folder cannot be listed.
    """
    folder, name = os.path.split(path)
    names = set(os.listdir(folder))
    others = {
        claimed
        for other in names
        if other != name and other.lower().endswith(_ENDINGS)
        for claimed in _claimed(other)
    }
    own: list[str] = []
    stay: list[str] = []
    for claimed in sorted(_claimed(name) & names - {name}):
        place = os.path.join(folder, claimed)
        if claimed in others or os.path.islink(place) or not os.path.isfile(place):
            stay.append(claimed)
        else:
            own.append(place)
    return own, stay


def _claimed(name: str) -> set[str]:
    """Names that the sidecars of a weight file of this name have."""
    stem = Path(name).stem
    found = {stem + suffix for suffix, _ in READERS} | {stem + ending for ending in PREVIEWS}
    return found | {CONFIG} if stem == "adapter_model" else found

"""What a file name says of its place in a training run: which run, which epoch or step."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from lorafind.files.sidecars import GENERIC

#: Endings of trainers and of people, the clear ones first: sd-scripts ``-step00000500``, people's
#: ``_epoch10`` and ``-e10``, ai-toolkit's nine digits, sd-scripts' six, any number.
ENDINGS = (
    ("step", re.compile(r"^(?P<stem>.*?)[-_. ]*(?:steps?|checkpoint)[-_ ]*(?P<n>\d{1,12})$", re.I)),
    ("step", re.compile(r"^(?P<stem>.*?)[-_. ]+(?P<n>\d{1,12})[-_ ]*steps?$", re.I)),
    ("epoch", re.compile(r"^(?P<stem>.*?)[-_. ]*epochs?[-_ ]*(?P<n>\d{1,12})$", re.I)),
    ("epoch", re.compile(r"^(?P<stem>.*?)[-_. ]+ep?[-_ ]*(?P<n>\d{1,12})$", re.I)),
    ("epoch", re.compile(r"^(?P<stem>.*?)[-_. ]+(?P<n>\d{1,12})[-_ ]*epochs?$", re.I)),
)
BARE = (
    ("step", re.compile(r"^(?P<stem>.*?)_(?P<n>\d{9})$")),
    ("epoch", re.compile(r"^(?P<stem>.*?)-(?P<n>\d{6})$")),
    ("number", re.compile(r"^(?P<stem>.*?)(?:^|[-_. ]+)(?P<n>\d{1,12})$")),
)


@dataclass(frozen=True, slots=True)
class Spot:
    """title: what files of one run share. epoch, step: where the name says so; number: at its end,
    of unknown meaning. All three None: the last file of a run, or no series at all."""

    title: str
    epoch: int | None = None
    step: int | None = None
    number: int | None = None

    @property
    def run(self) -> str:
        """The title in one case."""
        return self.title.casefold()

    @property
    def numbered(self) -> bool:
        """True where the name holds a number of any kind."""
        return (self.epoch, self.step, self.number) != (None, None, None)


def spot(path: str) -> Spot:
    """The Spot of a file by its name, or by its folders' where the name says nothing.

    ``run/checkpoint-500/pytorch_lora_weights.safetensors`` belongs with
    ``run/pytorch_lora_weights.safetensors``, ``run/epoch10.safetensors`` with others in ``run``.
    """
    folder, name = os.path.split(path)
    found = _parse(os.path.splitext(name)[0])
    if found.title not in (*GENERIC, ""):
        return found
    if found.numbered:
        return replace(found, title=folder)
    above, last = os.path.split(folder)
    inner = _parse(last)
    if inner.step is None and inner.epoch is None:
        return Spot(folder)
    return replace(inner, title=os.path.join(above, inner.title) if inner.title else above)


def _parse(stem: str) -> Spot:
    found: dict[str, int] = {}
    rest = stem
    for kinds in (ENDINGS, ENDINGS, BARE):
        if kinds is BARE and found:
            break
        for kind, pattern in kinds:
            match = pattern.match(rest)
            if match and kind not in found:
                found[kind], rest = int(match["n"]), match["stem"]
                break
    return Spot(rest, found.get("epoch"), found.get("step"), found.get("number"))

"""What differs between two adapters, and whether one holds all that the other does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorafind.files.tensors import DTYPES, NAMES
from lorafind.formats.adapter import Adapter, Place
from lorafind.formats.delta import F64, ROUNDING
from lorafind.relations.bits import equal_bits
from lorafind.relations.core import MOST_ALLOWED, Match

#: Rounding this coarse is no noise any more: such files are proved by their bits alone.
COARSE = 2.0**-5


def coarse(dtype: str) -> bool:
    """True for the 8-bit floats."""
    return ROUNDING[dtype].u > COARSE


class Extras:
    """What acts on the picture beside ΔW, compared (DoRA magnitudes, embeddings, saved modules).

    x_only, y_only: canonical names that one adapter alone has. clash: names whose tensors differ by
    more than rounding. x_unread, y_unread: keys of one file alone that are not understood.
    """

    def __init__(self, x: Adapter, y: Adapter) -> None:
        ours, theirs = _acting(x), _acting(y)
        self.x_only = [name for name in ours if name not in theirs]
        self.y_only = [name for name in theirs if name not in ours]
        self.clash = [
            name
            for name in ours
            if name in theirs and not _agree(ours[name](), theirs[name](), x, y)
        ]
        self.x_unread, self.y_unread = _unread(x, y), _unread(y, x)


def _acting(adapter: Adapter) -> dict[str, Callable[[], Tensor]]:
    """What acts beside ΔW, by name; the second writing of a layer, which programs may add, too."""
    named: dict[str, Callable[[], Tensor]] = {
        name: partial(adapter.extra, name) for name in adapter.plan.extras
    }
    twice = set(adapter.plan.unread_keys) - set(adapter.plan.unknown_keys)
    return named | {key: partial(adapter.fetch, key) for key in twice}


def _unread(x: Adapter, y: Adapter) -> list[str]:
    """Keys of x that nobody understands and that y does not hold bit for bit."""
    theirs = set(y.plan.unknown_keys)
    return [
        key
        for key in x.plan.unknown_keys
        if key not in theirs or not equal_bits(x.fetch(key), y.fetch(key))
    ]


def _agree(a: Tensor, b: Tensor, x: Adapter, y: Adapter) -> bool:
    """True where two stored extras are one tensor, up to the rounding of their files."""
    if a.numel() != b.numel():
        return False
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        return torch.equal(a.reshape(-1), b.reshape(-1))
    first, second = a.reshape(-1).to(F64), b.reshape(-1).to(F64)
    if torch.equal(first, second):
        return True
    dtypes = [
        max(adapter.effective_dtype, NAMES[t.dtype], key=lambda name: ROUNDING[name].u)
        for adapter, t in ((x, a), (y, b))
    ]
    if any(map(coarse, dtypes)):
        return any(
            torch.equal(one.to(DTYPES[dtype]).to(F64), two)
            for one, two, dtype in ((first, second, dtypes[1]), (second, first, dtypes[0]))
        )
    expected = sum(
        float(ROUNDING[dtype].variance(t).sum())
        for dtype, t in zip(dtypes, (first, second), strict=True)
    )
    return float((first - second).square().sum()) <= MOST_ALLOWED * expected


def at_least_as_fine(matches: dict[str, Match]) -> bool:
    """True where X's rank and precision are at least Y's in every module that Y has.

    Between F16 and BF16 the significand alone does not decide: F16 runs out of range for small
    numbers, so the predicted errors of all modules together must agree with it.
    """
    x_error = y_error = 0.0
    mixed = False
    for m in matches.values():
        if not m.yy:
            continue
        if m.x_rank < m.y_rank or ROUNDING[m.x_dtype].u > ROUNDING[m.y_dtype].u:
            return False
        mixed = mixed or m.x_dtype != m.y_dtype
        scale = m.yy / m.xx if m.xx else 1.0
        x_error, y_error = x_error + m.x_error * scale, y_error + m.y_error
    return not mixed or x_error <= y_error


def dropped_words(dropped: list[Place], everything: list[Place]) -> str:
    """What is gone, e.g. ``text encoder dropped`` or ``96 of 192 modules dropped``.

    dropped: places that the smaller adapter lacks; everything: all of the larger one's.
    """
    rest = {place.name for place in dropped}
    whole, left = [], len(everything)
    for words, belongs in _KINDS:
        members = {place.name for place in everything if belongs(place)}
        if members and members <= rest:
            whole.append(words)
            rest -= members
            left -= len(members)
    if len(whole) > 2:
        return f"{len(dropped)} of {len(everything)} modules dropped"
    if rest:
        whole.append(f"{len(rest)} of {left} {'other ' if whole else ''}modules")
    return " and ".join(whole) + " dropped"


_KINDS = (
    ("text encoder", lambda p: p.group == "text"),
    ("text encoder 1", lambda p: p.component == "te1"),
    ("text encoder 2", lambda p: p.component == "te2"),
    ("U-Net", lambda p: p.component == "unet"),
    ("biases and norms", lambda p: p.vector),
    ("convolutions", lambda p: p.group == "conv"),
    ("self-attention", lambda p: p.group == "self_attn"),
    ("cross-attention", lambda p: p.group == "cross_attn"),
    ("feed-forward", lambda p: p.group == "ff"),
)


def extras_words(names: list[str]) -> str:
    """Extras that are gone, e.g. ``12 extra tensors dropped``."""
    return "1 extra tensor dropped" if len(names) == 1 else f"{len(names)} extra tensors dropped"


def spread(values: Iterable[int]) -> int | str | None:
    """One number, a range as ``2–8``, or None of nothing."""
    found = sorted(set(values))
    if not found:
        return None
    return found[0] if len(found) == 1 else f"{found[0]}–{found[-1]}"


def differences(
    x: Adapter,
    y: Adapter,
    active: tuple[set[str], set[str]],
    ranks: tuple[set[int], set[int]],
    extras: Extras | None,
) -> dict[str, list[Any]]:
    """Facts that are not the same, as [of x, of y] (see Relation.differs).

    active: names of the modules of each whose ΔW is not zero; ranks: of all modules of each.
    """
    facts: dict[str, list[Any]] = {
        "dtype": [x.dtype, y.dtype],
        "effective dtype": [x.effective_dtype, y.effective_dtype],
        "spelling": [x.plan.spelling, y.plan.spelling],
        "family": [x.plan.family, y.plan.family],
        "architecture": [x.plan.architecture, y.plan.architecture],
        "rank": [spread(of) for of in ranks],
        "modules": [len(names) for names in active],
        "text encoder": [
            any(m.name in names and m.place.group == "text" for m in a.plan.modules)
            for a, names in zip((x, y), active, strict=True)
        ],
    }
    if extras is not None:
        facts["extras"] = [
            sorted(extras.x_only + extras.clash),
            sorted(extras.y_only + extras.clash),
        ]
        if extras.clash:
            facts["extras"] = [sorted(x.plan.extras), sorted(y.plan.extras)]
        facts["unknown keys"] = [len(extras.x_unread), len(extras.y_unread)]
    return {
        name: pair
        for name, pair in facts.items()
        if pair[0] != pair[1] or (name == "extras" and extras is not None and extras.clash)
    }

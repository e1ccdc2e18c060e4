"""What a user names → a LoRA of the index, or a file to look at first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorafind.files.place import absolute, is_remote, state
from lorafind.files.place import below as below_url
from lorafind.files.scan import join
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION


class NoSuchTarget(IndexProblem):
    """A target that is neither a file nor a name in the index."""


@dataclass(frozen=True)
class Hit:
    """A target in the index: a LoRA with one of its paths, or a refused file.

    lora: None for a refused one, whose status and reason then tell why. sha256: of the bytes that
    were read; presence: ``here``, ``gone`` or ``offline``.
    """

    path: str
    lora: int | None
    status: str
    reason: str
    sha256: str | None = None
    presence: str = "here"


def find(store: Store, target: str) -> Hit | None:
    """The indexed file that ``target`` is: a path, a display name, or a unique part of a path.

    None for an existing file that the index does not hold, or holds in another state. Raises
    NoSuchTarget where nothing fits, or too much does.
    """
    path = absolute(target)
    if is_remote(path):
        # Whether an object that the index lacks exists is told by who reads it.
        try:
            return _by_path(store, path)
        except OSError:
            if (known := _by_path(store, path, anyway=True)) is None:
                raise
            return known
    if os.path.lexists(path):
        return _by_path(store, path)
    known = _by_path(store, path, anyway=True)
    if known is not None:
        return known
    named = _by_name(store, target)
    return _by_path(store, named.path, anyway=True) or named


def _by_path(store: Store, path: str, anyway: bool = False) -> Hit | None:
    wanted = os.fsencode(path)
    places = (wanted,) if is_remote(wanted) else (wanted, os.path.realpath(wanted))
    for place in dict.fromkeys(places):
        for root_id, root in store.conn.execute("SELECT id, path FROM roots"):
            if place == root:
                below = b""
            elif is_remote(place) and (inside := below_url(place, root)):
                below = inside
            elif place.startswith(root.rstrip(b"/\\") + os.sep.encode()):
                below = place[len(root.rstrip(b"/\\")) + 1 :].replace(os.sep.encode(), b"/")
            else:
                continue
            row = store.conn.execute(
                "SELECT f.lora, f.status, f.reason, f.sha256, f.presence, f.size, f.mtime_ns, "
                "s.version FROM files f LEFT JOIN signatures s ON s.lora = f.lora "
                "WHERE f.root = ? AND f.path = ?",
                (root_id, below),
            ).fetchone()
            if row is None:
                continue
            stale = row[0] is not None and row[7] != SIGNATURE_VERSION
            if not anyway:
                facts = state(place)
                stale = stale or (facts.st_size, facts.st_mtime_ns) != (row[5], row[6])
            return None if stale else Hit(path, *row[:5])
    return None


def _by_name(store: Store, target: str) -> Hit:
    exact: list[Hit] = []
    part: list[Hit] = []
    folded = target.casefold()
    for root, below, lora, status, reason, name in _rows_with(store, target):
        full = os.fsdecode(join(root, below))
        stem = os.path.splitext(os.path.basename(full))[0]
        if folded in (stem.casefold(), os.path.basename(full).casefold(), (name or "").casefold()):
            exact.append(Hit(full, lora, status, reason))
        elif folded in full.casefold() or folded in (name or "").casefold():
            part.append(Hit(full, lora, status, reason))
    for hits in (exact, part):
        if len({hit.lora if hit.lora is not None else hit.path for hit in hits}) == 1:
            return hits[0]
        if hits:
            some = ", ".join(os.path.basename(hit.path) for hit in hits[:3])
            raise NoSuchTarget(
                f"{target!r} fits {len(hits)} indexed files ({some}, …): give more of the name."
            )
    raise NoSuchTarget(
        f"{target!r} is neither a file nor a name in the index at {store.path}: check the path, or "
        "run `lorafind ls` to see the names."
    )


def _rows_with(store: Store, target: str) -> Iterator[Any]:
    """Files whose path or display name may hold the target."""
    query = (
        "SELECT r.path, f.path, f.lora, f.status, f.reason, json_extract(l.facts, '$.name') "
        "FROM files f JOIN roots r ON r.id = f.root LEFT JOIN loras l ON l.id = f.lora"
    )
    if not target.isascii():
        # SQLite folds the case of ASCII only: everything is looked at here.
        yield from store.conn.execute(query)
        return
    like = "%" + target.replace("!", "!!").replace("%", "!%").replace("_", "!_") + "%"
    whole = "CAST(r.path AS TEXT) || '/' || CAST(f.path AS TEXT) LIKE ?1 ESCAPE '!'"
    yield from store.conn.execute(f"{query} WHERE {whole} OR l.facts LIKE ?1 ESCAPE '!'", (like,))


@dataclass(frozen=True)
class Card:
    """What is shown of a LoRA."""

    lora: int
    paths: tuple[str, ...]
    name: str
    architecture: str
    family: str
    rank: str
    dtype: str
    base_model: str
    trigger_words: tuple[str, ...]
    facts: dict[str, Any]


def cards(store: Store, loras: list[int]) -> dict[int, Card]:
    """Cards of some LoRAs; paths that are there come first."""
    wanted = json.dumps(loras)
    paths: dict[int, list[str]] = {}
    for lora, root, below in store.conn.execute(
        "SELECT f.lora, r.path, f.path FROM json_each(?) j JOIN files f ON f.lora = j.value "
        "JOIN roots r ON r.id = f.root ORDER BY f.presence != 'here', f.is_link, f.id",
        (wanted,),
    ):
        paths.setdefault(lora, []).append(os.fsdecode(join(root, below)))
    found = {}
    for lora, architecture, family, ranks, dtype, facts in store.conn.execute(
        "SELECT l.id, architecture, l.family, ranks, effective_dtype, facts FROM json_each(?) j "
        "JOIN loras l ON l.id = j.value",
        (wanted,),
    ):
        told = json.loads(facts)
        found[lora] = Card(
            lora,
            tuple(paths.get(lora, ())),
            told.get("name") or "",
            architecture,
            family,
            rank_text(json.loads(ranks)),
            dtype,
            told.get("base_model_name") or told.get("base_model") or "",
            tuple(told.get("trigger_words", ())),
            told,
        )
    return found


def rank_text(ranks: dict[str, int]) -> str:
    """``16``, or ``4–32`` where the modules differ."""
    if not ranks:
        return ""
    numbers = sorted(int(rank) for rank in ranks)
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"

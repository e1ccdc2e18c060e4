"""``ls``: the index as a list, one row per path, streamed in the order of roots and paths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorafind.files.scan import join
from lorafind.formats.architectures import candidates
from lorafind.index.rows import readable
from lorafind.index.store import Store
from lorafind.search.targets import rank_text

#: States of a path that say more than what it held when it was read.
AWAY = ("gone", "offline")
#: For ``--status``: everything that is there and holds no LoRA, and every row at all.
REFUSED, ALL = "refused", "all"

_QUERY = """
SELECT f.path, f.size, f.status, f.reason, f.presence, f.sha256, f.is_link, l.content,
    l.architecture, l.family, l.spelling, l.ranks, l.dtype, l.effective_dtype,
    json_extract(l.facts, '$.name', '$.base_model_name', '$.base_model', '$.trigger_words')
FROM files f LEFT JOIN loras l ON l.id = f.lora
WHERE f.root = ? ORDER BY f.path
"""


@dataclass(frozen=True)
class Filters:
    """Which rows are wanted; what is empty does not filter.

    architectures, families: words of the index, any of them (``other`` stands for all unknown
    models); ranks: (least, most), fits a LoRA with any module in between; status: words of the
    column ``status``, REFUSED or ALL; texts: each must occur in the name, the path below its root
    or the trigger words, whatever the case.
    """

    architectures: Sequence[str] = ()
    families: Sequence[str] = ()
    ranks: tuple[int, int] | None = None
    status: Sequence[str] = ("lora",)
    texts: Sequence[str] = ()


def parse_ranks(text: str) -> tuple[int, int]:
    """``16``, ``8-32``, ``64-`` or ``-8`` as (least, most). Raises ValueError for anything else."""
    low, dash, high = text.partition("-")
    if not (low or high) or not all(part.isdecimal() for part in (low, high) if part):
        raise ValueError(f"{text!r} is no rank: write 16, 8-32, 64- or -8")
    least = int(low or 0)
    most = int(high) if high else 2**31 if dash else least
    if least > most:
        raise ValueError(f"{text!r} is no range of ranks: {least} is more than {most}")
    return least, most


def listing(store: Store, filters: Filters) -> Iterator[dict[str, Any]]:
    """Rows of the index as they are read; see :func:`_row` for the fields."""
    architectures = {word.casefold() for word in filters.architectures}
    families = {word.casefold() for word in filters.families}
    texts = [text.casefold() for text in filters.texts]
    status = set(filters.status)
    for root in store.roots():
        for row in store.conn.execute(_QUERY, (root.id,)):
            word = row[4] if row[4] in AWAY else row[2]
            wanted = ALL in status or word in status
            if not (wanted or (REFUSED in status and word != "lora" and word not in AWAY)):
                continue
            if architectures and not architectures & _names(row[8]):
                continue
            if families and (row[9] or "").casefold() not in families:
                continue
            if filters.ranks and not _within(row[11], filters.ranks):
                continue
            found = _row(root.path, word, row)
            if all(text in _searched(found, row[0]) for text in texts):
                yield found


def words(store: Store) -> dict[str, list[str]]:
    """The words that filters can name here: ``architecture``, ``family`` and ``status``."""
    kinds = {
        "architecture": "SELECT DISTINCT architecture FROM loras ORDER BY 1",
        "family": "SELECT DISTINCT family FROM loras ORDER BY 1",
        "status": "SELECT DISTINCT CASE presence WHEN 'here' THEN status ELSE presence END "
        "FROM files ORDER BY 1",
    }
    return {kind: [word for (word,) in store.conn.execute(query)] for kind, query in kinds.items()}


def _names(architecture: str | None) -> set[str]:
    """The words that mean an architecture: ``other`` too for other:1a2b3c4d, and each candidate."""
    name = (architecture or "").casefold()
    return {name, name.partition(":")[0], *candidates(name)}


def _within(ranks: str | None, wanted: tuple[int, int]) -> bool:
    return ranks is not None and any(wanted[0] <= int(r) <= wanted[1] for r in json.loads(ranks))


def _row(root: bytes, word: str, row: tuple[Any, ...]) -> dict[str, Any]:
    """One path.

    status: ``gone`` or ``offline`` for a file that is not there at present, else its outcome:
    ``lora``, or what kept it out. outcome, reason: what the reading of it gave. dtype: as stored.
    """
    (path, size, outcome, reason, _, sha256, is_link, content) = row[:8]
    (architecture, family, spelling, ranks, dtype, effective, told) = row[8:]
    name, model, base, triggers = json.loads(told) if told else (None, None, None, None)
    return {
        "path": os.fsdecode(join(root, path)),
        "architecture": architecture,
        "family": family,
        "rank": None if ranks is None else rank_text(json.loads(ranks)),
        "dtype": dtype,
        "size": size,
        "name": name,
        "trigger_words": triggers or [],
        "base_model": model or base,
        "status": word,
        "outcome": outcome,
        "reason": reason,
        "effective_dtype": effective,
        "spelling": spelling,
        "sha256": sha256,
        "content": content,
        "link": bool(is_link),
    }


def _searched(found: dict[str, Any], below: bytes) -> str:
    """The text that is searched for words, in one case."""
    place = os.fsdecode(below) or os.path.basename(found["path"])
    parts = (found["name"] or "", readable(place), *found["trigger_words"])
    return "\n".join(parts).casefold()

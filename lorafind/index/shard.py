"""One of n parts of a collection, so that n machines index it without talking to each other.

A file belongs to the part that its path below its root gives (a single file's name): whatever the
machine, the mount point, the order or the other files, every file is in exactly one part and stays
there. Each part makes an index of its own, and ``lorafind merge`` unites them. Every path to a
linked file is looked at where it belongs; the merge brings them together by their content.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Self

from lorafind.files.scan import Found
from lorafind.index.problem import IndexProblem
from lorafind.index.rows import Known
from lorafind.index.store import Store

#: The key of ``meta`` that holds [number, parts] in the index of a part.
META = "shard"


class Shard(NamedTuple):
    """Part ``number`` (from 1) of ``parts``."""

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """``i/n`` → a part. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no shard: write i/n, such as 1/8")
        return cls(int(match[1]), int(match[2])).checked()

    def checked(self) -> Self:
        """The same. Raises ValueError where the number is not from 1 to parts."""
        if not 1 <= self.number <= self.parts:
            raise ValueError(f"there is no shard {self}: the first is 1/n, the last n/n")
        return self

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    def has(self, item: Found | Known) -> bool:
        """True where a path belongs to this part."""
        return _draw(item.path or _name(item.root)) % self.parts == self.number - 1


def _draw(path: bytes) -> int:
    """64 bits of BLAKE2b over a path below its root."""
    return int.from_bytes(blake2b(path, digest_size=8).digest(), "little")


def _name(root: bytes) -> bytes:
    return os.path.basename(root.rstrip(b"/"))


def claim(store: Store, shard: Shard | None) -> None:
    """Make an index without files one of this part, or of none; others must be so already.

    Raises IndexProblem where the index is of another part, of one where none is asked for, or of
    none: files of other parts would be taken for gone, or this part for the whole.
    """
    made = of(store)
    if made == shard:
        return
    if store.roots():
        raise IndexProblem(_refusal(store, made, shard))
    with store.batch():
        if shard is None:
            store.conn.execute("DELETE FROM meta WHERE key = ?", (META,))
        else:
            store.set_meta(META, list(shard))


def of(store: Store) -> Shard | None:
    """The part that an index holds, None for an index of all files."""
    made: Sequence[int] | None = store.get_meta(META)
    return None if made is None else Shard(*made)


def _refusal(store: Store, made: Shard | None, shard: Shard | None) -> str:
    if made is None:
        return (
            f"The index {store.path} holds all files, not those of shard {shard}: name another "
            "place for the shard with --db."
        )
    wanted = f"shard {shard}" if shard else "all files"
    return (
        f"The index {store.path} holds shard {made}, not {wanted}: run it with --shard {made}, or "
        "name another place with --db."
    )

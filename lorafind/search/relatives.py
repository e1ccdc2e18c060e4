"""The relatives of one LoRA: from the index where it is in there, else proved now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorafind.files.outcome import NotAnAdapter
from lorafind.index.classes import series_of
from lorafind.index.relate import LIKELY, identities, mark_of, open_as_read, place_of
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION, candidates, estimate
from lorafind.relations.grades import GRADES, Relation
from lorafind.search.likely import likely

if TYPE_CHECKING:
    from lorafind.index.examine import Lora

#: How many candidates of a file that is not indexed are proved; the others stay likely.
PROVED = 32


@dataclass(frozen=True)
class Relative:
    """An indexed LoRA and its relation to the one in question, which is x.

    relation: None where nothing is proved; guess: the cosine that the sketches then suggest.
    """

    lora: int
    relation: Relation | None
    guess: float = 0.0

    @property
    def order(self) -> tuple[int, int, float, int]:
        """The strongest grade first, fewer steps before more; what is not proved comes last."""
        if self.relation is None:
            return len(GRADES), 0, -abs(self.guess), self.lora
        found = self.relation
        return GRADES.index(found.grade), len(found.steps), -abs(found.cosine), self.lora


def of_indexed(store: Store, lora: int) -> list[Relative]:
    """What the index knows, and candidates that it has not looked at yet; no file is read."""
    found = []
    for row in store.relations(RELATION_VERSION, lora):
        other = row.y if row.x == lora else row.x
        if row.grade == LIKELY:
            found.append(Relative(other, None, float(row.numbers["estimate"])))
            continue
        relation = Relation.from_json(row.numbers)
        found.append(Relative(other, relation if row.x == lora else relation.swapped()))
    return found + _unchecked(store, lora)


def _unchecked(store: Store, lora: int) -> list[Relative]:
    """Candidates among what was indexed without relations."""
    (architecture,) = store.conn.execute(
        "SELECT architecture FROM loras WHERE id = ?", (lora,)
    ).fetchone()
    key = series_of(architecture)
    mark = int(store.get_meta(mark_of(key), 0))
    if mark >= store.chunks.ids("identity", key).max(initial=0):
        return []
    known, layouts = identities(store, key)
    own = int(np.flatnonzero(known.ids == lora)[0])
    done = {
        x + y - lora
        for x, y in store.conn.execute(
            "SELECT x, y FROM relations WHERE version = ?1 AND (x = ?2 OR y = ?2)",
            (RELATION_VERSION, lora),
        )
    }
    pairs = [p for block in candidates(known, layouts, np.array([own])) for p in block.tolist()]
    found = []
    for position in {i + j - own for i, j in pairs}:
        other = int(known.ids[position])
        # Two LoRAs below the mark were compared.
        if other not in done and max(other, lora) > mark:
            found.append(Relative(other, None, estimate(known, layouts, position, own)))
    return found


def of_file(store: Store, path: str, lora: Lora, allow_pickle: bool = False) -> list[Relative]:
    """Relatives of a LoRA that the index lacks; the likeliest PROVED candidates are proved.

    Raises OSError and NotAnAdapter where ``path`` cannot be read any more.
    """
    guesses = sorted(likely(store, lora).items(), key=lambda item: (-abs(item[1]), item[0]))
    if not guesses:
        return []
    from lorafind.formats.read import open_adapter
    from lorafind.relations.verify import prove

    mine = open_adapter(path, allow_pickle)
    found = []
    for number, (other, guess) in enumerate(guesses):
        theirs = open_as_read(place_of(store, other)) if number < PROVED else None
        if theirs is None:
            found.append(Relative(other, None, guess))
            continue
        try:
            relation = prove(mine, theirs)
        except (OSError, NotAnAdapter):
            found.append(Relative(other, None, guess))
            continue
        if relation is not None:
            found.append(Relative(other, relation))
    return found

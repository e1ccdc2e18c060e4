"""Which LoRA holds which, so that thousands of copies are not proved each against each.

Where one LoRA, the holder, is proved to hold more than CROWD others (same ΔW, at least as fine), a
pair of these others says nothing new: both may go because of the holder. Such pairs are not proved.
"""

from __future__ import annotations

import json

import numpy as np

from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.signatures.constants import SIGNATURE_VERSION

#: The grade of a candidate that waits for its proof.
LIKELY = "likely"
#: Within a family of more LoRAs than this, pairs that cannot be copies are not proved one by one.
CROWD = 16
#: Holders that are remembered of one LoRA.
_HOLDERS = 4


class Stars:
    """Holders of the n LoRAs of a series.

    ids: int64, ascending; held: n × 4 int64, positions of holders, −1 for none; used: ids of
    holders by which pairs were left out → whether all that they hold is proved.
    """

    def __init__(self, store: Store, key: str, ids: np.ndarray) -> None:
        self.ids = ids
        self.held = np.full((len(ids), _HOLDERS), -1)
        self.size = np.zeros(len(ids), np.int64)
        self._waiting = np.zeros(len(ids), bool)
        self.used: dict[int, bool] = load(store, key)
        rows = store.conn.execute(
            "SELECT x, y, json_extract(numbers, '$.dominates[0]'), "
            "json_extract(numbers, '$.dominates[1]') FROM relations WHERE version = ? "
            "AND grade IN ('file', 'tensors', 'weights') ORDER BY x, y",
            (RELATION_VERSION,),
        )
        for x, y, first, second in rows:
            self.add(x, y, bool(first), bool(second))

    def position(self, lora: int) -> int:
        """Where a LoRA stands in ``ids``; −1 for one of another series."""
        k = int(np.searchsorted(self.ids, lora))
        return k if k < len(self.ids) and self.ids[k] == lora else -1

    def add(self, x: int, y: int, first: bool, second: bool, waits: bool = False) -> None:
        """Two LoRAs (ids) hold one ΔW; first: x holds all of y; second: y all of x."""
        a, b = self.position(x), self.position(y)
        if a < 0 or b < 0:
            return
        if first:
            self._hold(a, b, waits)
        elif second:
            self._hold(b, a, waits)

    def _hold(self, a: int, b: int, waits: bool) -> None:
        for k in (a, b):
            row = self.held[k]
            if a in row:
                continue
            # A free place, or that of a holder which is held itself, or which holds fewer.
            worth = [
                -1 if h < 0 else 0 if a in self.held[h] else int(self.size[h]) for h in row.tolist()
            ]
            slot = int(np.argmin(worth))
            if worth[slot] <= self.size[a]:
                row[slot] = a
                self.size[a] += 1
        self._waiting[a] |= waits

    def leads(self, others: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Those of some positions that hold the most; the lowest of ``near`` where none does."""
        holders = others[(self.held[others] == others[:, None]).any(1) & (self.size[others] > 1)]
        order = np.argsort(-self.size[holders], kind="stable")
        return holders[order][:_HOLDERS] if len(holders) else near.min(keepdims=True)

    def settled(self, others: np.ndarray, one: int) -> np.ndarray:
        """Which of some positions have a holder in common with another one: no proof is needed."""
        mine = self.labels(np.array([one]))[0]
        mine = mine[mine >= 0]
        found = np.asarray(np.isin(self.labels(others), mine).any(1))
        if found.any():
            self.used.update({int(self.ids[h]): not self._waiting[h] for h in mine.tolist()})
        return found

    def all_labels(self, ids: np.ndarray) -> np.ndarray | None:
        """Holders of LoRAs (ids of the series), for candidates; None where nobody has one."""
        found = self.labels(np.searchsorted(self.ids, ids))
        used = np.unique(found[found >= 0]).tolist()
        self.used.update({int(self.ids[h]): not self._waiting[h] for h in used})
        return found if used else None

    def labels(self, which: np.ndarray) -> np.ndarray:
        """Holders of some positions that hold a crowd, m × 4, −1 for none."""
        found = self.held[which]
        return np.where((found >= 0) & (self.size[found] > CROWD), found, -1)


def name_of(key: str) -> str:
    """The entry of ``meta`` that tells by which holders pairs of a series were left out."""
    return f"stars/{RELATION_VERSION}.{SIGNATURE_VERSION}/{key}"


def load(store: Store, key: str) -> dict[int, bool]:
    """Id of a holder → whether all that it holds is proved."""
    return {int(i): proved for i, proved in store.get_meta(name_of(key), {}).items()}


def save(store: Store, key: str, stars: Stars) -> None:
    """Remember the holders that were used. Inside a batch."""
    if stars.used or store.get_meta(name_of(key)):
        store.set_meta(name_of(key), {str(i): proved for i, proved in stars.used.items()})


def fallen(store: Store, key: str) -> bool:
    """True where a holder is gone: what it held has to be compared again."""
    used = load(store, key)
    (left,) = store.conn.execute(
        "SELECT count(*) FROM loras WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(list(used)),),
    ).fetchone()
    return int(left) < len(used)

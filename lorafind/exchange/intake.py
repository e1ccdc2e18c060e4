"""From the rows of a source to an index: the one way in for ``merge`` and ``import``.

Rules, by which the outcome depends on the rows and not on the order in which they come:

- A path that the source does not hold says nothing: nothing is ever taken out of the index. What
  was pruned in a source after it was merged stays, until ``index --prune`` runs on the whole.
- A file is known by its path. The newer reading (``read_ns``) holds, its presence with it. Of one
  reading, the row of the index that looked at the root last (``seen_ns``) holds.
- A LoRA is known by its content. The newer version holds; of one version, where only what a file
  says about itself can differ (two files may hold one content), the one that sorts last.
- A relation is known by its two contents. The newer version holds, a proof before ``likely``.

Stages, each of short transactions: LoRAs (their version negative while something of them is still
to come, so that nothing counts them as known), signatures, identity records, versions, files,
relations, bases. What a killed run took is found and not taken again.
"""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from lorafind.exchange.places import Homes, look, unite
from lorafind.exchange.source import (
    SERIES,
    FileRow,
    LayoutRow,
    LoraRow,
    RelationRow,
    Source,
    blocks,
)
from lorafind.files.scan import join
from lorafind.index import classes, stars
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress
from lorafind.index.relate import LIKELY, Families, copies_mark, mark_of
from lorafind.index.rows import to_text
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.relations.grades import Relation

#: Rows that are written in one transaction.
ROWS = 2000
_COLUMNS = LoraRow._fields[1:]
#: What of a LoRA is compared: settled names of unknown models and ids of layouts say nothing.
_COMPARED = [i for i, name in enumerate(_COLUMNS) if name not in ("architecture", "layout")]
_KNOWN = FileRow._fields[2:-2]


@dataclass
class Taken:
    """What a source brought.

    files, loras, relations, bases: new ones; changed: files of which the source knew more;
    renewed: LoRAs in place of an older or other record of theirs; conflicts: bases in use that are
    not the ones in use here, which stay.
    """

    source: str
    files: int = 0
    changed: int = 0
    loras: int = 0
    renewed: int = 0
    relations: int = 0
    bases: int = 0
    conflicts: list[str] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        """False where the index held everything already."""
        counts = (self.files, self.changed, self.loras, self.renewed, self.relations, self.bases)
        return any(counts)


def take(store: Store, source: Source, seen: Mapping[bytes, int], watch: Progress) -> Taken:
    """Take a source into an index that is open for writing.

    seen: path → ``seen_ns`` of the index's roots when the command began. Raises IndexProblem for
    rows that cannot be an index's; what was taken before them stays, and is whole.
    """
    with _sensible(source):
        taken = _Intake(store, source, seen, watch).run()
    return taken


def close(store: Store) -> None:
    """What holds over the whole index after the last source: no orphans, names, families."""
    store.drop_orphans()
    classes.settle(store)
    pairs = store.conn.execute(
        "SELECT x, y FROM relations WHERE version = ? AND grade NOT IN ('', ?)",
        (RELATION_VERSION, LIKELY),
    )
    families = Families((x, y) for x, y in pairs)
    with store.batch():
        store.conn.execute("DELETE FROM families")
        store.conn.executemany("INSERT INTO families VALUES (?, ?)", families.items())


class _Ids:
    """A source's LoRA ids, in the order in which they came, and what they are in the index."""

    def __init__(self) -> None:
        self._pairs = array("q")
        self._sorted = np.empty((0, 2), np.int64)

    def __len__(self) -> int:
        return len(self._pairs) // 2

    def add(self, old: int, new: int) -> None:
        self._pairs.extend((old, new))

    def pairs(self) -> np.ndarray:
        """n × 2 int64: (old, new)."""
        return np.array(self._pairs, np.int64).reshape(-1, 2)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """int64 → int64; −1 for what was not taken."""
        if len(self._sorted) != len(self):
            pairs = self.pairs()
            self._sorted = pairs[np.argsort(pairs[:, 0])]
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        old, new = self._sorted.T
        at = np.minimum(np.searchsorted(old, ids), len(old) - 1)
        return np.where(old[at] == ids, new[at], -1)


class _Intake:
    """One source on its way into a store."""

    def __init__(
        self, store: Store, source: Source, seen: Mapping[bytes, int], watch: Progress
    ) -> None:
        self.store, self.source, self.watch = store, source, watch
        self.taken = Taken(source.label)
        self.ids, self.fresh = _Ids(), _Ids()
        self.versions = array("q")
        self.layouts: dict[int, int] = {}
        self.first = store.conn.execute("SELECT 1 FROM loras LIMIT 1").fetchone() is None
        self.roots, self.seen = source.roots(), seen
        self.later: dict[int, bool] = {}

    def run(self) -> Taken:
        homes = unite(self.store, self.roots)
        paths = {root.id: root.path for root in self.store.roots()}
        # A row of this source holds against one of the same reading where it looked later.
        self.later = {
            root.id: root.seen_ns > self.seen.get(paths[homes[root.id][0]], 0)
            for root in self.roots
        }
        self._stage("Comparing files", "files")
        wanted = self._wanted(homes)
        self._stage("Taking LoRAs", "loras")
        self._loras(wanted)
        self.watch.stage("Taking signatures", len(self.fresh), 0)
        self._signatures()
        self._identities()
        self._versions()
        self._stage("Taking files", "files")
        self._files(homes)
        self._stage("Taking relations", "relations")
        self._relations()
        self._bases()
        with self.store.batch():
            look(self.store, self.roots)
            if self.first:
                self._marks()
        return self.taken

    def _stage(self, title: str, table: str) -> None:
        self.watch.stage(f"{title} of {self.source.label}", self.source.count(table), 0)

    # Files

    def _known(self, row: FileRow, home: tuple[int, bytes]) -> tuple[object, ...] | None:
        """What the index holds of a path: the columns of _KNOWN, and the content."""
        known: tuple[object, ...] | None = self.store.conn.execute(
            f"SELECT {', '.join(f'f.{name}' for name in _KNOWN)}, l.content FROM files f "
            "LEFT JOIN loras l ON l.id = f.lora WHERE f.root = ? AND f.path = ?",
            (home[0], _path(row, home)),
        ).fetchone()
        return known

    def _judge(self, row: FileRow, homes: Homes) -> str:
        """``new``, ``newer`` or ``same``; empty where the index knows more."""
        known = self._known(row, homes[row.root])
        if known is None:
            return "new"
        if known == (*row[2:-2], row.content):
            return "same"
        mine = known[_KNOWN.index("read_ns")]
        assert isinstance(mine, int)
        if row.read_ns != mine:
            return "newer" if row.read_ns > mine else ""
        return "newer" if self.later[row.root] else ""

    def _wanted(self, homes: Homes) -> np.ndarray:
        """The source's LoRAs that the index will have a file of, ascending."""
        wanted = array("q")
        for block in blocks(self.source.files(), ROWS):
            wanted.extend(r.lora for r in block if r.lora is not None and self._judge(r, homes))
            self.watch.advance(len(block), 0)
        return np.unique(np.frombuffer(wanted, np.int64)) if wanted else np.empty(0, np.int64)

    def _files(self, homes: Homes) -> None:
        columns = ("root", "path", *_KNOWN, "lora")
        upsert = (
            f"INSERT INTO files ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
            "ON CONFLICT (root, path) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in columns[2:])
        )
        for block in blocks(self.source.files(), ROWS):
            loras = self.ids.find(np.array([r.lora or 0 for r in block], np.int64)).tolist()
            with self.store.batch():
                for row, lora in zip(block, loras, strict=True):
                    verdict = self._judge(row, homes)
                    if verdict not in ("new", "newer"):
                        continue
                    if row.lora is not None and lora < 0:
                        raise ValueError(f"a file refers to LoRA {row.lora}, which is not there")
                    home = homes[row.root]
                    known = (row[2:-2], None if row.lora is None else lora)
                    self.store.conn.execute(
                        upsert, (home[0], _path(row, home), *known[0], known[1])
                    )
                    self.taken.files += verdict == "new"
                    self.taken.changed += verdict == "newer"
            self.watch.advance(len(block), 0)

    # LoRAs

    def _loras(self, wanted: np.ndarray) -> None:
        layouts = {row.id: row for row in self.source.layouts()}
        for block in blocks(self.source.loras(), ROWS):
            asked = np.isin(np.array([row.id for row in block], np.int64), wanted).tolist()
            with self.store.batch():
                for row, is_wanted in zip(block, asked, strict=True):
                    known = self.store.conn.execute(
                        f"SELECT id, {', '.join(_COLUMNS)} FROM loras WHERE content = ?",
                        (row.content,),
                    ).fetchone()
                    if known is not None:
                        self._renew(row, known, layouts[row.layout])
                    elif is_wanted:
                        self._add(row, layouts[row.layout])
            self.watch.advance(len(block), 0)

    def _add(self, row: LoraRow, layout: LayoutRow) -> None:
        made = self.store.conn.execute(
            f"INSERT INTO loras ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})",
            self._values(row, layout, -row.version),
        ).lastrowid
        assert made is not None
        self.taken.loras += 1
        self._unfinished(row, made)

    def _renew(self, row: LoraRow, known: tuple[object, ...], layout: LayoutRow) -> None:
        """Bring a LoRA that the index has up to what the source knows, if that is more."""
        number, version = known[0], known[-1]
        assert isinstance(number, int) and isinstance(version, int)
        if version == row.version:
            self.ids.add(row.id, number)
            if _sortable(row[1:]) > _sortable(known[1:]):
                self._update(number, self._values(row, layout, version))
                self.taken.renewed += 1
        elif version < row.version:
            if version != -row.version:
                # What stands beside the row is of another version.
                self.store.conn.execute("DELETE FROM signatures WHERE lora = ?", (number,))
                self.store.chunks.delete([number])
            self._update(number, self._values(row, layout, -row.version))
            self.taken.renewed += 1
            self._unfinished(row, number)
        else:
            self.ids.add(row.id, number)

    def _update(self, number: int, values: tuple[object, ...]) -> None:
        self.store.conn.execute(
            f"UPDATE loras SET ({', '.join(_COLUMNS)}) = ({', '.join('?' * len(_COLUMNS))}) "
            "WHERE id = ?",
            (*values, number),
        )

    def _values(self, row: LoraRow, layout: LayoutRow, version: int) -> tuple[object, ...]:
        if row.layout not in self.layouts:
            self.store.conn.execute(
                "INSERT INTO layouts (digest, architecture, modules) VALUES (?, ?, ?) "
                "ON CONFLICT (digest) DO NOTHING",
                layout[1:],
            )
            (self.layouts[row.layout],) = self.store.conn.execute(
                "SELECT id FROM layouts WHERE digest = ?", (layout.digest,)
            ).fetchone()
        return row._replace(layout=self.layouts[row.layout], version=version)[1:]

    def _unfinished(self, row: LoraRow, number: int) -> None:
        self.ids.add(row.id, number)
        self.fresh.add(row.id, number)
        self.versions.append(row.version)

    def _signatures(self) -> None:
        conn = self.store.conn
        pairs = self.fresh.pairs()
        # A run that was killed may have taken some of them.
        there = [
            conn.execute("SELECT 1 FROM signatures WHERE lora = ?", (number,)).fetchone()
            for number in pairs[:, 1].tolist()
        ]
        lacking = np.sort(pairs[[row is None for row in there], 0])
        self.watch.advance(len(pairs) - len(lacking), 0)
        for block in self.source.signatures(lacking):
            numbers = self.ids.find(np.array([row.lora for row in block], np.int64)).tolist()
            with self.store.batch():
                conn.executemany(
                    "INSERT INTO signatures (lora, version, groups, scales, votes, style) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    ((number, *row[1:]) for number, row in zip(numbers, block, strict=True)),
                )
            self.watch.advance(len(block), 0)

    def _identities(self) -> None:
        if not len(self.fresh):
            return
        there = {key: self.store.chunks.ids("identity", key) for key in SERIES}
        for key, block, records in self.source.identities():
            numbers = self.fresh.find(block)
            keep = (numbers >= 0) & ~np.isin(numbers, there[key])
            if keep.any():
                with self.store.batch():
                    self.store.chunks.append_many(
                        "identity", key, numbers[keep], np.ascontiguousarray(records[keep])
                    )

    def _versions(self) -> None:
        """The LoRAs are whole: from now on they count as known."""
        done = zip(self.versions, self.fresh.pairs()[:, 1].tolist(), strict=True)
        for block in blocks(done, ROWS):
            with self.store.batch():
                self.store.conn.executemany("UPDATE loras SET version = ? WHERE id = ?", block)

    # Relations, bases

    def _relations(self) -> None:
        for block in blocks(self.source.relations(), ROWS):
            sides = [self.ids.find(np.array([getattr(r, s) for r in block])) for s in ("x", "y")]
            with self.store.batch():
                for row, x, y in zip(block, *(side.tolist() for side in sides), strict=True):
                    # One of the two may be a LoRA whose every file is another one by now.
                    if x >= 0 and y >= 0:
                        self._relation(oriented(row, x, y))
            self.watch.advance(len(block), 0)

    def _relation(self, row: RelationRow) -> None:
        known = self.store.conn.execute(
            "SELECT x, y, version, grade, direction, steps, numbers FROM relations "
            "WHERE x = ? AND y = ?",
            row[:2],
        ).fetchone()
        if known is None or _weight(row) > _weight(RelationRow(*known)):
            self.store.conn.execute(
                "INSERT OR REPLACE INTO relations (x, y, version, grade, direction, steps, "
                "numbers) VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            self.taken.relations += 1

    def _bases(self) -> None:
        from lorafind.bases.basis import OWN
        from lorafind.bases.stored import in_use

        here = set(self.store.basis_ids())
        for basis in self.source.bases():
            if basis.id not in here:
                with self.store.batch():
                    self.store.put_basis(basis)
                self.taken.bases += 1
        here = {OWN, *self.store.basis_ids()}
        for architecture, name in self.source.in_use.items():
            mine = self.store.get_meta(in_use(architecture))
            if name not in here or name == mine:
                continue
            if mine is None:
                with self.store.batch():
                    self.store.set_meta(in_use(architecture), name)
            else:
                self.taken.conflicts.append(
                    f"{self.source.label} compares {architecture} in the basis {name}, this index "
                    f"in {mine}, which stays: `lorafind basis use {name}` takes the other."
                )

    def _marks(self) -> None:
        """Pairs of the first source need not be looked for again; those with later ones must."""
        old, new = self.ids.pairs()[np.argsort(self.ids.pairs()[:, 0])].T
        if not (np.diff(new) > 0).all():
            return
        for key, done in self.source.compared.items():
            holders = self.ids.find(np.array(list(done.holders), np.int64)).tolist()
            if -1 in holders:
                # What it held has to be compared again.
                continue
            for name, mark in ((mark_of(key), done.full), (copies_mark(key), done.copies)):
                if below := int(np.searchsorted(old, mark, "right")):
                    self.store.set_meta(name, int(new[below - 1]))
            if holders:
                proved = done.holders.values()
                used = {str(i): p for i, p in zip(holders, proved, strict=True)}
                self.store.set_meta(stars.name_of(key), used)


def oriented(row: RelationRow, x: int, y: int) -> RelationRow:
    """The relation between LoRAs that are called x and y here, in the order of the index."""
    if x < y:
        return row._replace(x=x, y=y)
    numbers = row.numbers
    if row.grade not in ("", LIKELY):
        numbers = to_text(Relation.from_json(json.loads(numbers)).swapped().to_json())
    return row._replace(x=y, y=x, direction=-row.direction, numbers=numbers)


def _weight(row: RelationRow) -> tuple[object, ...]:
    return (row.version, row.grade != LIKELY, *row[3:])


def _sortable(values: Sequence[object]) -> tuple[object, ...]:
    return tuple(values[i] for i in _COMPARED)


def _path(row: FileRow, home: tuple[int, bytes]) -> bytes:
    return join(home[1], row.path) if home[1] else row.path


@contextmanager
def _sensible(source: Source) -> Iterator[None]:
    """Rows that break the rules of the index become a sentence about their source."""
    try:
        yield
    except (sqlite3.IntegrityError, KeyError, ValueError, OverflowError) as error:
        raise IndexProblem(
            f"{source.label} holds what no index can ({error}): it is damaged, and nothing more "
            "was taken from it."
        ) from error

"""``dupes``: groups of files that hold the same LoRA, and which of them may go.

A file may go only if its relation to the keeper itself is proved and the keeper holds all that it
does. The keeper always stays, so that no group can lose all of its copies. Nothing is read but the
index, and the state of the files right before they are named as removable.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

from lorafind.clean.trash import in_trash
from lorafind.files.place import absolute, below, is_remote
from lorafind.files.scan import join
from lorafind.index.reconcile import UNREAD
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.relations.grades import GRADES, Relation, Side, removal

#: Grades that are shown unless others are asked for: all that are proved.
PROVED = GRADES[: GRADES.index("near")]
KEEP = ("newest", "oldest", "largest", "smallest", "highest-rank", "shortest-path")


@dataclass(frozen=True)
class File:
    """One path to a LoRA. doubtful: perhaps one file with another, on two mounts. alpha_off: some
    alpha is 0, which trainers mean as alpha = rank and some programs read as off."""

    path: str
    lora: int
    bytes: int
    mtime_ns: int
    sha256: str
    identity: tuple[int, int]
    is_link: bool
    here: bool
    rank: int
    doubtful: bool
    alpha_off: bool


@dataclass(frozen=True)
class Choice:
    """How groups are made. grades: which relations join files; named: those the user asked for by
    name; keep: a word of KEEP or a pattern for paths; protect: folders whose files always stay;
    within: paths that the answer is restricted to (only they may go)."""

    grades: Sequence[str] = PROVED
    named: Sequence[str] = ()
    keep: str = "oldest"
    protect: Sequence[str] = ()
    within: Sequence[str] = ()


@dataclass(frozen=True)
class Member:
    """A file of a group. grade: its relation to the keeper, ``keeper``, or ``link`` for another
    path to a file of the group (no bytes would be freed). steps: what was done to the larger of the
    two. differs: what is not the same, as [of the keeper, of this file]. removable: may go.
    stays: why it may not."""

    path: str
    bytes: int
    grade: str
    cosine: float
    factor: float
    share: float
    steps: tuple[str, ...]
    differs: dict[str, list[Any]]
    removable: bool
    stays: str = ""


@dataclass(frozen=True)
class Group:
    """Files that belong together. grade: the weakest of its members'."""

    grade: str
    keeper: str
    freed_bytes: int
    files: tuple[Member, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def dupes(store: Store, choice: Choice) -> Iterator[Group]:
    """The groups, those that free the most bytes first."""
    relations = _relations(store, choice.grades)
    files = _files(store, relations, choice.grades)
    groups = [
        group
        for component in _components(files, relations)
        for group in _stars(component, relations, choice)
    ]
    if choice.within:
        groups = [g for g in groups if any(_below(m.path, choice.within) for m in g.files)]
    yield from sorted(groups, key=lambda g: (-g.freed_bytes, g.keeper))


Relations = dict[int, dict[int, Relation]]


def _relations(store: Store, grades: Sequence[str]) -> Relations:
    """LoRA → other LoRA → relation with the first as x."""
    found: Relations = defaultdict(dict)
    for row in store.relations(RELATION_VERSION):
        if row.grade in grades:
            relation = Relation.from_json(row.numbers)
            found[row.x][row.y] = relation
            found[row.y][row.x] = relation.swapped()
    return found


def _files(store: Store, relations: Relations, grades: Sequence[str]) -> list[File]:
    """Every path to a LoRA that has a relation, or several paths."""
    wanted = set(relations)
    if {"file", "tensors"} & set(grades):
        wanted |= {
            lora
            for (lora,) in store.conn.execute(
                "SELECT lora FROM files WHERE lora IS NOT NULL AND presence != 'gone' "
                "GROUP BY lora HAVING count(*) > 1"
            )
        }
    doubtful = _doubtful(store)
    rows = store.conn.execute(
        "SELECT f.id, r.path, f.path, f.lora, f.size, f.mtime_ns, f.sha256, f.device, f.inode, "
        "f.is_link, f.presence, l.ranks, instr(l.notes, 'alpha is 0') "
        "FROM json_each(?) j JOIN files f ON f.lora = j.value "
        "JOIN roots r ON r.id = f.root JOIN loras l ON l.id = f.lora WHERE f.presence != 'gone'",
        (json.dumps(sorted(wanted)),),
    )
    return [
        File(
            os.fsdecode(join(root, path)),
            lora,
            size,
            mtime,
            sha256 or "",
            (device, inode) if inode else (-1, number),
            bool(is_link),
            presence == "here",
            max((int(rank) for rank in json.loads(ranks)), default=0),
            number in doubtful,
            bool(alpha_off),
        )
        for (
            number,
            root,
            path,
            lora,
            size,
            mtime,
            sha256,
            device,
            inode,
            is_link,
            presence,
            ranks,
            alpha_off,
        ) in rows
    ]


def _doubtful(store: Store) -> set[int]:
    """Files that are perhaps one with another, on two mounts.

    Those of :func:`lorafind.index.reconcile.maybe_two_mounts`, without an object for every file.
    """
    kept = f"presence = 'here' AND status NOT IN ({', '.join('?' * len(UNREAD))})"
    rows = store.conn.execute(
        "SELECT f.id FROM files f JOIN (SELECT size, mtime_ns, ctime_ns FROM files "
        f"WHERE {kept} GROUP BY 1, 2, 3 HAVING min(device) < max(device)) "
        f"USING (size, mtime_ns, ctime_ns) WHERE {kept}",
        (*UNREAD, *UNREAD),
    )
    return {number for (number,) in rows}


def _components(files: list[File], relations: Relations) -> Iterator[list[File]]:
    by_lora: dict[int, list[File]] = defaultdict(list)
    for file in files:
        by_lora[file.lora].append(file)
    seen: set[int] = set()
    for start in sorted(by_lora):
        if start in seen:
            continue
        stack, members = [start], []
        seen.add(start)
        while stack:
            lora = stack.pop()
            members += by_lora[lora]
            for other in relations.get(lora, {}):
                if other not in seen and other in by_lora:
                    seen.add(other)
                    stack.append(other)
        if len(members) > 1:
            yield members


def relation_of(keeper: File, file: File, relations: Relations) -> Relation | None:
    """What the keeper (x) and a file (y) are to each other, as far as it is proved."""
    if keeper.lora == file.lora:
        if keeper.sha256 == file.sha256:
            return Relation("file", None, dominates=(True, True))
        differs = {"metadata": ["as stored", "other metadata"]}
        return Relation("tensors", None, differs=differs, dominates=(True, True))
    return relations.get(keeper.lora, {}).get(file.lora)


def _stars(component: list[File], relations: Relations, choice: Choice) -> Iterator[Group]:
    """Groups around keepers: every member's relation is to the keeper itself."""
    rest = sorted(component, key=lambda file: file.path)
    while len(rest) > 1:
        keeper = _keeper(rest, relations, choice)
        members = [
            (file, relation)
            for file in rest
            if file is not keeper
            and (relation := relation_of(keeper, file, relations)) is not None
            and relation.grade in (*choice.grades, "file", "tensors")
        ]
        taken = {file.path for file, _ in members} | {keeper.path}
        rest = [file for file in rest if file.path not in taken]
        if members:
            yield _group(keeper, members, choice)


def _keeper(files: list[File], relations: Relations, choice: Choice) -> File:
    """The file that holds most of the others; among equals the protected, then the wanted one."""
    counts = Counter(file.lora for file in files)

    def reach(lora: int) -> tuple[int, int]:
        """How many of the files one of this LoRA holds, and to how many its relation is known."""
        # Files of one LoRA hold one another.
        held = known = counts[lora] - 1
        for other, relation in relations.get(lora, {}).items():
            if other in counts:
                known += counts[other]
                held += counts[other] * relation.dominates[0]
        return held, known

    # A link could lose its file, what is offline cannot be looked at, and a trash is emptied.
    present = [f for f in files if f.here and not f.is_link] or files
    # What is in a store can serve no file of this machine as its keeper.
    present = [f for f in present if not is_remote(f.path)] or present
    solid = [f for f in present if not in_trash(f.path)] or present
    reaches = {lora: reach(lora) for lora in {file.lora for file in solid}}
    best = max(reaches.values())
    equal = [file for file in solid if reaches[file.lora] == best]
    return min(equal, key=lambda file: (*_preference(file, choice), file.path))


def _preference(file: File, choice: Choice) -> tuple[Any, ...]:
    stays = not (_below(file.path, choice.protect) or _outside(file, choice))
    if choice.keep not in KEEP:
        name = file.path.replace(os.sep, "/")
        return stays, file.alpha_off, not fnmatch(name, choice.keep), file.mtime_ns
    order: dict[str, tuple[Any, ...]] = {
        "newest": (-file.mtime_ns,),
        "oldest": (file.mtime_ns,),
        "largest": (-file.bytes,),
        "smallest": (file.bytes,),
        "highest-rank": (-file.rank,),
        "shortest-path": (len(file.path),),
    }
    return (stays, file.alpha_off, *order[choice.keep], file.mtime_ns)


def _outside(file: File, choice: Choice) -> bool:
    return bool(choice.within) and not _below(file.path, choice.within)


def _group(keeper: File, members: list[tuple[File, Relation]], choice: Choice) -> Group:
    kept = {keeper.identity}
    paths = Counter(file.identity for file, _ in members)
    rows = [Member(keeper.path, keeper.bytes, "keeper", 1.0, 1.0, 1.0, (), {}, False)]
    grades = []
    intact = _intact(keeper)
    for file, relation in sorted(members, key=lambda m: (GRADES.index(m[1].grade), m[0].path)):
        if file.identity in kept:
            rows.append(Member(file.path, 0, "link", 1.0, 1.0, 1.0, (), {}, False, "a second path"))
            continue
        kept.add(file.identity)
        grades.append(relation.grade)
        stays = _stays(keeper, file, relation, choice, intact)
        if not stays and paths[file.identity] > 1:
            stays = "it has another path, so that nothing would be freed"
        rows.append(
            Member(
                file.path,
                file.bytes,
                relation.grade,
                round(relation.cosine, 6),
                round(relation.factor, 6),
                round(relation.share, 6),
                _words(relation),
                relation.differs,
                not stays,
                stays,
            )
        )
    freed = sum(row.bytes for row in rows if row.removable)
    grade = max(grades, key=GRADES.index) if grades else "link"
    return Group(grade, keeper.path, freed, tuple(rows))


class Judge:
    """Says of any two files of the index whether one may go because the other stays.

    Reads the relations and the files that have some once.
    """

    def __init__(self, store: Store, choice: Choice) -> None:
        self._choice = choice
        self._relations = _relations(store, choice.grades)
        files = _files(store, self._relations, choice.grades)
        self._files = {file.path: file for file in files}
        self._paths = Counter(file.identity for file in files)

    def file(self, path: str) -> File | None:
        """What the index knows of a path to a LoRA that has a relative or a second path."""
        return self._files.get(path)

    def verdict(self, keeper: str, path: str) -> tuple[str, str]:
        """(grade, why the file at ``path`` may not go while ``keeper`` stays; empty: it may)."""
        stays, goes = self._files.get(keeper), self._files.get(path)
        if stays is None or goes is None:
            return "", "the index knows no relation of it to a file that stays"
        if stays.identity == goes.identity:
            return "link", "a second path to a file that stays"
        relation = relation_of(stays, goes, self._relations)
        if relation is None:
            return "", "no relation of it to a file that stays is proved"
        why = _stays(stays, goes, relation, self._choice, _intact(stays))
        if not why and self._paths[goes.identity] > 1:
            why = "it has another path, so that nothing would be freed"
        return relation.grade, why


def _words(relation: Relation) -> tuple[str, ...]:
    """The steps from the keeper (x) to the file, or back, and then so said."""
    words = tuple(step.words for step in relation.steps)
    return tuple(f"keeper is this {word}" for word in words) if relation.larger == "y" else words


def _stays(keeper: File, file: File, relation: Relation, choice: Choice, intact: bool) -> str:
    """Why a file may not go; empty where it may."""
    side: Side = "y"
    allowed = removal(relation.grade)
    if allowed == "never":
        return f"{relation.grade} is no copy"
    if relation.removable(side) == "never":
        return "it holds something that the keeper lacks"
    steps = (relation.grade, *(step.grade for step in relation.steps))
    unnamed = dict.fromkeys(
        grade for grade in steps if removal(grade) == "named" and grade not in choice.named
    )
    if unnamed:
        return f"only with --grade {','.join(unnamed)}"
    if is_remote(file.path):
        return "in a store, where nothing is removed"
    if is_remote(keeper.path):
        return "the keeper is in a store, where it cannot be watched"
    if _below(file.path, choice.protect):
        return "protected"
    if _outside(file, choice):
        return "not among the files asked for"
    if not file.here or not keeper.here:
        return "offline"
    if file.is_link or keeper.is_link:
        return "a link"
    if in_trash(keeper.path):
        return "the keeper is in a trash folder"
    if file.doubtful and keeper.doubtful:
        return "perhaps the same file on two mounts"
    if keeper.alpha_off and not file.alpha_off:
        return "the keeper's alpha is 0, which some programs read as off"
    if not intact or not _intact(file):
        return "changed since it was indexed"
    return ""


def _intact(file: File) -> bool:
    """True where the file on disk is still the one that was read."""
    try:
        facts = os.stat(file.path)
    except OSError:
        return False
    return (facts.st_size, facts.st_mtime_ns) == (file.bytes, file.mtime_ns)


def _below(path: str, folders: Iterable[str]) -> bool:
    """True for a path that is one of these, or in one of these folders."""
    for folder in folders:
        if is_remote(path) or is_remote(folder):
            place = absolute(folder)
            if path == place or below(os.fsencode(path), os.fsencode(place)):
                return True
            continue
        place = os.path.abspath(os.path.expanduser(folder))
        if path == place or path.startswith(place.rstrip(os.sep) + os.sep):
            return True
        real = os.path.realpath(place)
        if os.path.realpath(path).startswith(real.rstrip(os.sep) + os.sep) or (
            os.path.realpath(path) == real
        ):
            return True
    return False

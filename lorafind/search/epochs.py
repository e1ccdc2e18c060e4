"""``epochs``: LoRAs of one training run in their order, and which of them are worth keeping.

A series is what carries one session id (and is for one architecture), or, where metadata does not
say, what has one name up to an epoch or step number and is related by its weights. What is proposed
is a proposal by the direction of ΔW alone, and nothing is ever deleted: the last file, and going
back from it every one whose cosine to all that are already proposed is below a threshold.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorafind.files.scan import join
from lorafind.index.classes import series_of
from lorafind.index.relate import LIKELY, Families, identities
from lorafind.index.store import Store
from lorafind.relations.candidates import LEAST_COSINE, RELATION_VERSION, estimate
from lorafind.relations.grades import GRADES
from lorafind.search.names import Spot, spot

#: An earlier file is really different when its cosine to every one that is kept is below this.
THRESHOLD = 0.9
#: Files of one name belong to one run from this |cosine| on.
ONE_RUN = 0.5
_ROWS = 1024
#: From the coarsest on: of two files at one step the finer one comes last.
PRECISION = ("F8_E5M2", "F8_E4M3", "BF16", "F16", "F32")

KEEP, PASS = "keep", "—"
#: Grades by which one follows from the other: two versions of one epoch, not two epochs.
VERSIONS = frozenset(GRADES[: GRADES.index("near")])


@dataclass(frozen=True)
class Epoch:
    """One file of a series, in order.

    at: epoch and step in words, ``last`` for the one without a number. norm: ‖ΔW‖. cosine: of ΔW
    to that of the last; change: 1 − cosine to the one before, None for the first. estimated: which
    of the two come from the identity sketches (standard deviation up to 0.09), because the pair was
    not proved. proposal: KEEP or PASS, with the reason. by: ``session`` where the session id alone
    makes the series, ``name`` where names and weights do.
    """

    path: str
    series: str
    position: int
    of: int
    at: str
    epoch: int | None
    step: int | None
    norm: float
    cosine: float | None
    change: float | None
    proposal: str
    reason: str
    estimated: tuple[str, ...]
    presence: str
    name: str
    architecture: str
    by: str
    session: str | None
    other_paths: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Member:
    """One LoRA with what orders it."""

    lora: int
    paths: tuple[str, ...]
    presence: str
    spot: Spot
    name: str
    architecture: str
    norm: float
    rank: int
    dtype: str
    session: str | None
    output_name: str | None
    steps: int | None
    epochs: int | None
    seconds: float

    @property
    def epoch(self) -> int | None:
        """The epoch: the trainer's, else the file name's."""
        return self.spot.epoch if self.epochs is None else self.epochs

    @property
    def step(self) -> int | None:
        """The optimiser step: the trainer's, else the file name's."""
        return self.spot.step if self.steps is None else self.steps


@dataclass(frozen=True)
class _Known:
    """A pair in the index: grade, exact cosine (None where there is none), steps."""

    grade: str
    cosine: float | None
    steps: tuple[str, ...]


Pairs = dict[tuple[int, int], _Known]


def epochs(
    store: Store, threshold: float = THRESHOLD, only: Collection[int] | None = None
) -> Iterator[list[Epoch]]:
    """Every series of two or more, by the path of its last file. only: those with one of these."""
    members = _members(store)
    pairs = _pairs(store, members)
    cosines = _Cosines(store, members, pairs)
    found = []
    for group in _groups(members, pairs, cosines):
        if only is not None and not any(lora in only for lora in group):
            continue
        series = _ordered([members[lora] for lora in group])
        if not _one_version(series, pairs):
            found.append(series)
    found.sort(key=lambda series: series[-1].paths[0])
    taken: dict[str, int] = defaultdict(int)
    for series in found:
        last = series[-1]
        name = last.output_name or os.path.basename(last.spot.title) or last.name
        taken[name] += 1
        yield _judged(
            series, name if taken[name] == 1 else f"{name} ({taken[name]})", cosines, threshold
        )


# ---------------------------------------------------------------------------- what the index has


def _members(store: Store) -> dict[int, _Member]:
    """Every LoRA that still has a file."""
    places: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
    for lora, root, below, presence, mtime_ns in store.conn.execute(
        "SELECT f.lora, r.path, f.path, f.presence, f.mtime_ns FROM files f JOIN roots r "
        "ON r.id = f.root WHERE f.lora IS NOT NULL AND f.presence != 'gone' "
        "ORDER BY f.presence != 'here', f.is_link, f.id"
    ):
        places[lora].append((os.fsdecode(join(root, below)), presence, mtime_ns))
    found = {}
    for lora, architecture, norm, ranks, dtype, facts in store.conn.execute(
        "SELECT id, architecture, norm, ranks, effective_dtype, json_extract(facts, '$.name', "
        "'$.session_id', '$.output_name', '$.steps', '$.epoch', '$.finished_at') FROM loras"
    ):
        if lora not in places:
            continue
        name, session, output_name, steps, epoch, finished = json.loads(facts)
        path, presence, mtime_ns = places[lora][0]
        found[lora] = _Member(
            lora,
            tuple(place[0] for place in places[lora]),
            presence,
            spot(path),
            name or "",
            architecture,
            norm,
            max(map(int, json.loads(ranks)), default=0),
            dtype,
            session,
            output_name,
            steps,
            epoch,
            finished if finished is not None else mtime_ns / 1e9,
        )
    return found


def _pairs(store: Store, members: Collection[int]) -> Pairs:
    """Pairs of members that were looked at; an empty grade: nothing was found."""
    return {
        (x, y): _Known(grade, cosine, tuple(json.loads(steps)))
        for x, y, grade, cosine, steps in store.conn.execute(
            "SELECT x, y, grade, json_extract(numbers, '$.cosine'), steps FROM relations "
            "WHERE version = ?",
            (RELATION_VERSION,),
        )
        if x in members and y in members
    }


class _Cosines:
    """Cosines of pairs: exact where they were proved, else estimates from the sketches."""

    def __init__(self, store: Store, members: dict[int, _Member], pairs: Pairs) -> None:
        self._store = store
        self._members = members
        self._pairs = pairs
        self._loaded: dict[int, tuple[Any, dict[int, list[str]], dict[int, int]]] = {}

    def known(self, a: int, b: int) -> _Known | None:
        """What was proved of a pair."""
        return self._pairs.get((min(a, b), max(a, b)))

    def load(self, group: Collection[int]) -> None:
        """Read the sketches of LoRAs of one architecture in one sweep."""
        key = series_of(self._members[next(iter(group))].architecture)
        known, layouts = identities(self._store, key, group)
        loaded = (known, layouts, {int(lora): k for k, lora in enumerate(known.ids)})
        self._loaded.update(dict.fromkeys(group, loaded))

    def between(self, a: int, b: int) -> tuple[float | None, bool]:
        """(cosine over the modules in common, whether it is an estimate); None: no sketch."""
        if a == b:
            return 1.0, False
        found = self.known(a, b)
        if found is not None and found.cosine is not None:
            return found.cosine, False
        known, layouts, where = self._loaded[a]
        if a not in where or b not in where:
            return None, True
        return estimate(known, layouts, where[a], where[b]), True

    def above(self, group: Sequence[int], least: float) -> Iterator[tuple[int, int]]:
        """Pairs of LoRAs of one architecture whose |cosine| is at least this."""
        known, _, where = self._loaded[group[0]]
        ids = [lora for lora in group if lora in where]
        if not ids:
            return
        rows = [where[lora] for lora in ids]
        total = np.linalg.norm(known.norms[rows], axis=1, keepdims=True)
        units = known.sketch[rows] * (known.norms[rows] / total)[:, :, None]
        flat = units.astype(np.float32).reshape(len(rows), -1)
        layouts = known.layouts[rows]
        for start in range(0, len(ids), _ROWS):
            block = slice(start, start + _ROWS)
            size = np.abs(flat[block] @ flat.T)
            # Over the modules in common alone the cosine of two layouts is larger.
            size[layouts[block][:, None] != layouts[None]] /= LEAST_COSINE / least
            for i, j in np.argwhere(size >= least).tolist():
                a, b = ids[start + i], ids[j]
                if a < b and abs(self.between(a, b)[0] or 0.0) >= least:
                    yield a, b


# ---------------------------------------------------------------------------- which belong together


def _groups(members: dict[int, _Member], pairs: Pairs, cosines: _Cosines) -> Iterator[list[int]]:
    """LoRAs that make a series, two or more each."""
    joined = Families()
    sessions: dict[tuple[str, str], list[int]] = defaultdict(list)
    names: dict[tuple[str, str], list[int]] = defaultdict(list)
    for lora, member in members.items():
        if member.session:
            sessions[member.session, member.architecture].append(lora)
        names[member.spot.run, member.architecture].append(lora)
    for group in sessions.values():
        for other in group[1:]:
            joined.join(group[0], other)
    alike = {key: group for key, group in names.items() if _differ([members[i] for i in group])}
    near = [
        ids
        for ids, known in pairs.items()
        if known.grade not in ("", LIKELY) and abs(known.cosine or 0.0) >= ONE_RUN
    ]
    for x, y in near:
        pair = [members[x], members[y]]
        named = pair[0].spot.run == pair[1].spot.run and _differ(pair)
        if _may_join(*pair) and (named or _told_apart(*pair)):
            joined.join(x, y)
    wanted: dict[str, set[int]] = defaultdict(set)
    for (_, architecture), group in alike.items():
        wanted[series_of(architecture)].update(group)
    for group in sessions.values():
        if len(group) > 1:
            wanted[series_of(members[group[0]].architecture)].update(group)
    for lora, _ in joined.items():
        wanted[series_of(members[lora].architecture)].add(lora)
    for loras in wanted.values():
        cosines.load(loras)
    for group in alike.values():
        for a, b in cosines.above(group, ONE_RUN):
            known = cosines.known(a, b)
            checked = known is not None and known.grade == ""
            if not checked and _may_join(members[a], members[b]):
                joined.join(a, b)
    found: dict[int, list[int]] = defaultdict(list)
    for lora, head in joined.items():
        found[head].append(lora)
    yield from found.values()


def _differ(group: Sequence[_Member]) -> bool:
    """True for one name with different numbers, at least one of them given."""
    spots = {member.spot for member in group}
    return len(spots) > 1 and any(place.numbered for place in spots)


def _may_join(a: _Member, b: _Member) -> bool:
    """False where metadata says that they are of two runs, or nothing can be compared."""
    if a.architecture != b.architecture:
        return False
    return not (a.session and b.session and a.session != b.session)


def _told_apart(a: _Member, b: _Member) -> bool:
    """True where the trainer's own counts are given for both, and differ, within one output name
    (where it is said)."""
    if a.output_name and b.output_name and a.output_name != b.output_name:
        return False
    return any(
        one is not None and two is not None and one != two
        for one, two in ((a.steps, b.steps), (a.epochs, b.epochs))
    )


def _one_version(series: Sequence[_Member], pairs: Pairs) -> bool:
    """True where all are casts, parts or resizes of each other: one epoch, no series."""
    ids = {member.lora for member in series}
    same = Families(
        pair for pair, known in pairs.items() if ids.issuperset(pair) and known.grade in VERSIONS
    )
    return len({same.head(lora) for lora in ids}) == 1


# ---------------------------------------------------------------------------- order and proposal


def _ordered(group: list[_Member]) -> list[_Member]:
    """By step, else epoch, else number in the name, else time; what lacks the number comes last."""
    numbers = {
        "step": [m.step for m in group],
        "epoch": [m.epoch for m in group],
        "number": [m.spot.number for m in group],
    }
    # Files without any number in their name may lack it: the last one, which trainers write so.
    usable = [
        values
        for values in numbers.values()
        if any(v is not None for v in values)
        and not any(v is None and m.spot.numbered for v, m in zip(values, group, strict=True))
    ]
    if not usable:
        return sorted(group, key=lambda m: (not m.spot.numbered, m.seconds, m.paths[0]))
    by = min(usable, key=lambda values: values.count(None))

    def key(at: int) -> tuple[Any, ...]:
        member, number = group[at], by[at]
        return (
            (number is None, number or 0),
            not member.spot.numbered,
            PRECISION.index(member.dtype) if member.dtype in PRECISION else len(PRECISION),
            member.rank,
            member.seconds,
            member.paths[0],
        )

    return [group[at] for at in sorted(range(len(group)), key=key)]


def _judged(series: list[_Member], name: str, cosines: _Cosines, threshold: float) -> list[Epoch]:
    last = series[-1]
    proposals = _proposals(series, cosines, threshold)
    by_session = last.session is not None and all(m.session == last.session for m in series)
    rows = []
    for position, member in enumerate(series):
        cosine, guessed = cosines.between(member.lora, last.lora)
        change, unsure = None, False
        if position:
            before, unsure = cosines.between(member.lora, series[position - 1].lora)
            # 1 − 1 with rounding is no negative change.
            change = None if before is None else max(0.0, 1.0 - before)
        rows.append(
            Epoch(
                path=member.paths[0],
                series=name,
                position=position + 1,
                of=len(series),
                at=_at(member),
                epoch=member.epoch,
                step=member.step,
                norm=member.norm,
                cosine=cosine,
                change=change,
                proposal=proposals[position][0],
                reason=proposals[position][1],
                estimated=tuple(
                    field for field, is_one in (("cosine", guessed), ("change", unsure)) if is_one
                ),
                presence=member.presence,
                name=member.name,
                architecture=member.architecture,
                by="session" if by_session else "name",
                session=member.session,
                other_paths=member.paths[1:],
            )
        )
    return rows


def _proposals(series: list[_Member], cosines: _Cosines, threshold: float) -> list[tuple[str, str]]:
    """(proposal, reason) of every member, found from the last one back."""
    kept = [series[-1]]
    found = [(KEEP, "the last of the series")]
    for member in reversed(series[:-1]):
        scores = [(cosines.between(member.lora, other.lora), other) for other in kept]
        known = [(c, guess, other) for (c, guess), other in scores if c is not None]
        if not known:
            kept.append(member)
            found.append((KEEP, "it cannot be compared with those that are kept"))
            continue
        cosine, guess, other = max(known, key=lambda item: item[0])
        to = os.path.basename(other.paths[0])
        if os.path.basename(member.paths[0]) == to:
            to = os.path.join(os.path.basename(os.path.dirname(other.paths[0])), to)
        about = f"{'~' if guess else ''}{cosine:.3f}"
        relation = cosines.known(member.lora, other.lora)
        if relation is not None and relation.grade in VERSIONS:
            words = ", ".join(relation.steps)
            how = f"{relation.grade}: {words}" if words else relation.grade
            found.append((PASS, f"another version of {to} ({how})"))
        elif cosine < threshold:
            kept.append(member)
            found.append(
                (KEEP, f"really different: cosine {about} to {to}, the most like it of those kept")
            )
        else:
            found.append((PASS, f"much like {to}: cosine {about}"))
    return found[::-1]


def _at(member: _Member) -> str:
    """Epoch and step in words."""
    said = []
    if member.epoch is not None:
        said.append(f"epoch {member.epoch}")
    if member.step is not None:
        said.append(f"step {member.step}")
    if not said and member.spot.number is not None:
        said.append(f"no. {member.spot.number}")
    return ", ".join(said) or "last"

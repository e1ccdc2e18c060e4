"""``whatis``: what a file is, what it comes from, what it is like, and what that makes likely.

An indexed file, and one whose bytes the index holds under another path, are answered from the index
alone. Any other file is read, and its likely relatives are proved against their files.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorafind.files import sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import absolute, exists, is_remote, state
from lorafind.files.scan import join
from lorafind.index.relate import LIKELY
from lorafind.index.store import Store
from lorafind.relations.grades import Relation
from lorafind.search.query import Asked, ask, stored_query
from lorafind.search.relatives import Relative, of_file, of_indexed
from lorafind.search.similar import Wishes, similar
from lorafind.search.targets import Card, Hit, cards, find, rank_text
from lorafind.signatures.constants import SIGNATURE_VERSION

#: A neighbour in style says something of a file from this z on, or from this score where there are
#: too few strangers for one.
LEAST_Z, LEAST_SCORE = 3.0, 0.5
#: The grade of a relation that is not proved.
UNPROVED = f"~{LIKELY}"


@dataclass(frozen=True)
class Related:
    """A relation of the file in question to an indexed LoRA.

    larger: ``this`` or ``other``, whichever the steps start from, None where neither holds more.
    cosine: over the modules in common, exact but for ``~likely``, where it is an estimate. factor:
    c of smaller = c · larger where one was proved. share: the part of the larger one's ‖ΔW‖² that
    lies in the common modules. same_run: both carry one session id. text: grade and steps.
    """

    path: str
    name: str
    grade: str
    larger: str | None
    steps: tuple[str, ...]
    cosine: float
    factor: float | None
    share: float | None
    same_run: bool
    text: str


@dataclass(frozen=True)
class Guess:
    """A guess, the file that says so of itself, and how that is related."""

    value: Any
    path: str
    because: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; the path is ``from``."""
        return {"value": self.value, "from": self.path, "because": self.because}


@dataclass(frozen=True)
class Answer:
    """What is known of one file.

    outcome: ``lora`` or what it is instead, with the reason. indexed: the index holds this path.
    presence: ``here``, or ``gone`` or ``offline`` for an indexed path. copies: other paths with the
    same bytes. nearest: its nearest in style that are no relatives, as ``similar`` gives them.
    base_model, trigger_words: what the file says itself; the likely ones are guessed where it says
    nothing. missing: paths named here that are not there at present.
    """

    path: str
    outcome: str
    reason: str = ""
    indexed: bool = False
    presence: str = "here"
    architecture: str | None = None
    family: str | None = None
    rank: str | None = None
    dtype: str | None = None
    effective_dtype: str | None = None
    modules: int | None = None
    size: int | None = None
    name: str | None = None
    base_model: str | None = None
    trigger_words: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    relations: tuple[Related, ...] = ()
    nearest: tuple[dict[str, Any], ...] = ()
    likely_base: Guess | None = None
    likely_trigger_words: Guess | None = None
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        row["relations"] = [asdict(relation) for relation in self.relations]
        for name in ("likely_base", "likely_trigger_words"):
            row[name] = row[name] and row[name].to_json()
        return row


def whatis(store: Store, target: str, count: int = 3, allow_pickle: bool = False) -> Answer:
    """Everything that can be said of a target. count: how many neighbours in style.

    Raises NoSuchTarget for what is neither a file nor a name; a file that is no LoRA, or cannot be
    read, is an answer like any other.
    """
    hit = find(store, target)
    if hit is not None and not (hit.status == "pickle" and allow_pickle):
        answer = replace(_begun(store, hit), indexed=True, presence=hit.presence)
        return (
            answer if hit.lora is None else _of_content(store, answer, hit.lora, hit.sha256, count)
        )
    path = hit.path if hit else absolute(target)
    name = os.path.basename(path)
    try:
        if os.path.isdir(path):
            return Answer(path, "not-a-file", f"{name} is a folder: name the files in it")
        # An object in a store is loaded once, by who reads it.
        sha256 = None if is_remote(path) else _sha256(store, path, os.stat(path))
    except OSError as error:
        return Answer(path, "inaccessible", f"{name} cannot be read: {error.strerror or error}")
    twin = _twin(store, path, sha256)
    if twin is not None:
        begun = _begun(store, Hit(path, twin, "lora", "", sha256))
        answer = _of_content(store, begun, twin, sha256, count)
        told = cards(store, [twin])[twin].facts
        inside = sidecars.Facts(told.get("title"), told.get("output_name"))
        called = sidecars.display_name(path, sidecars.read_sidecars(path), inside)
        return replace(answer, name=called)
    return _of_file(store, Hit(path, None, "", "", sha256), count, allow_pickle)


def _begun(store: Store, hit: Hit) -> Answer:
    """Outcome, size and copies."""
    try:
        size = state(hit.path).st_size
    except OSError:
        size = None
    return Answer(
        hit.path, hit.status, hit.reason, size=size, copies=_copies(store, hit.path, hit.sha256)
    )


def _copies(store: Store, path: str, sha256: str | None) -> tuple[str, ...]:
    """Other files with the same bytes that were not deleted; links to this one are not others."""
    rows = store.conn.execute(
        "SELECT r.path, f.path FROM files f JOIN roots r ON r.id = f.root "
        "WHERE sha256 = ? AND presence != 'gone' ORDER BY presence != 'here', f.id",
        (sha256,),
    )
    found = (os.fsdecode(join(root, below)) for root, below in rows)
    return tuple(other for other in found if other != path and not _one_file(other, path))


def _one_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


# ---------------------------------------------------------------------------- which content it is


def _sha256(store: Store, path: str, facts: os.stat_result) -> str | None:
    """The digest of a file of which the index may hold the bytes, None where no size agrees."""
    if not stat.S_ISREG(facts.st_mode):
        return None
    alike = store.conn.execute(
        "SELECT 1 FROM files WHERE size = ? AND sha256 IS NOT NULL LIMIT 1", (facts.st_size,)
    ).fetchone()
    if not alike:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _twin(store: Store, path: str, sha256: str | None) -> int | None:
    """The indexed LoRA that a file with these bytes is."""
    row = store.conn.execute(
        "SELECT f.lora, f.path FROM files f JOIN signatures s ON s.lora = f.lora "
        "WHERE f.sha256 = ? AND s.version = ? LIMIT 1",
        (sha256, SIGNATURE_VERSION),
    ).fetchone()
    if row is None:
        return None
    # The same bytes mean another ΔW where adapter_config.json beside them says another alpha.
    stems = (os.path.splitext(os.path.basename(name))[0] for name in (path, os.fsdecode(row[1])))
    return None if "adapter_model" in stems else int(row[0])


def _of_file(store: Store, hit: Hit, count: int, allow_pickle: bool) -> Answer:
    """The answer for a file that has to be read."""
    path = hit.path
    begun = _begun(store, hit)
    try:
        asked = ask(store, path, allow_pickle)
        assert asked.lora is not None
        if asked.query.lora is not None:
            begun = replace(begun, outcome="lora")
            return _of_content(store, begun, asked.query.lora, hit.sha256, count, asked)
        found = of_file(store, path, asked.lora, allow_pickle)
    except NotAnAdapter as error:
        return replace(begun, outcome=error.outcome, reason=error.reason)
    except OSError as error:
        why = f"{os.path.basename(path)} cannot be read: {error.strerror or error}"
        return replace(begun, outcome="inaccessible", reason=why)
    lora = asked.lora
    assert lora.modules is not None
    answer = replace(
        begun,
        outcome="lora",
        architecture=asked.query.architecture,
        family=lora.family,
        rank=rank_text(lora.ranks),
        dtype=lora.dtype,
        effective_dtype=lora.effective_dtype,
        modules=len(lora.modules),
        **_told(lora.facts),
    )
    return _finished(store, answer, asked, found, lora.facts.get("session_id"), count)


def _of_content(
    store: Store,
    begun: Answer,
    lora: int,
    sha256: str | None,
    count: int,
    asked: Asked | None = None,
) -> Answer:
    """The answer for a LoRA that the index holds. asked: the file, where it was read for this."""
    card = cards(store, [lora])[lora]
    dtype, size = store.conn.execute(
        "SELECT dtype, length(norms) FROM loras WHERE id = ?", (lora,)
    ).fetchone()
    facts = asked.lora.facts if asked and asked.lora else card.facts
    answer = replace(
        begun,
        architecture=card.architecture,
        family=card.family,
        rank=card.rank,
        dtype=dtype,
        effective_dtype=card.dtype,
        modules=size // 4,
        **_told(facts),
    )
    found = of_indexed(store, lora)
    same = [
        os.fsdecode(join(root, below))
        for root, below in store.conn.execute(
            "SELECT r.path, f.path FROM files f JOIN roots r ON r.id = f.root WHERE f.lora = ? "
            "AND presence != 'gone' AND sha256 IS NOT ? ORDER BY presence != 'here', f.id",
            (lora, sha256),
        )
    ]
    asked = Asked(begun.path, begun.path, stored_query(store, lora))
    return _finished(
        store, answer, asked, found, facts.get("session_id"), count, tensors=(card, same)
    )


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    """What the file and its sidecars say."""
    return {
        "name": facts.get("name") or "",
        "base_model": facts.get("base_model_name") or facts.get("base_model"),
        "trigger_words": tuple(facts.get("trigger_words", ())),
    }


# ---------------------------------------------------------------------------- what follows from it


def _finished(
    store: Store,
    answer: Answer,
    asked: Asked,
    found: Sequence[Relative],
    session: str | None,
    count: int,
    tensors: tuple[Card, Sequence[str]] | None = None,
) -> Answer:
    """With relations, neighbours and guesses. tensors: paths to the same content in other bytes."""
    known = cards(store, [relative.lora for relative in found])
    related: list[tuple[Card, Related]] = []
    if tensors is not None:
        same = Relation("tensors", None)
        related += [
            (tensors[0], _related(tensors[0], path, same, 1.0, session)) for path in tensors[1]
        ]
    for relative in sorted(found, key=lambda relative: relative.order):
        card = known[relative.lora]
        shown = _related(card, card.paths[0], relative.relation, relative.guess, session)
        related.append((card, shown))
    named = {path for card in known.values() for path in card.paths}
    nearest = list(_nearest(store, asked, named, len(found), count))
    sources = [(r.path, r.text, card.base_model, card.trigger_words) for card, r in related]
    sources += [
        (n["path"], "nearest in style", n["base_model"], n["trigger_words"])
        for n in nearest
        if stands_out(n)
    ]
    bases = (Guess(base, path, why) for path, why, base, _ in sources if base)
    words = (Guess(words, path, why) for path, why, _, words in sources if words)
    paths = (*answer.copies, *(r.path for _, r in related), *(n["path"] for n in nearest))
    return replace(
        answer,
        relations=tuple(r for _, r in related),
        nearest=tuple(nearest),
        likely_base=None if answer.base_model else next(bases, None),
        likely_trigger_words=None if answer.trigger_words else next(words, None),
        missing=tuple(path for path in dict.fromkeys(paths) if not exists(path)),
    )


def _related(
    card: Card, path: str, relation: Relation | None, guess: float, session: str | None
) -> Related:
    same_run = session is not None and card.facts.get("session_id") == session
    if relation is None:
        return Related(
            path, card.name, UNPROVED, None, (), round(guess, 4), None, None, same_run, UNPROVED
        )
    return Related(
        path=path,
        name=card.name,
        grade=relation.grade,
        larger={"x": "this", "y": "other", None: None}[relation.larger],
        steps=tuple(step.words for step in relation.steps),
        cosine=relation.cosine,
        factor=relation.factor if relation.proved else None,
        share=relation.share,
        same_run=same_run,
        text=relation.text(),
    )


def stands_out(row: dict[str, Any]) -> bool:
    """True for a neighbour in style that says something of the file."""
    return bool(row["score"] >= LEAST_SCORE if row["z"] is None else row["z"] >= LEAST_Z)


def _nearest(
    store: Store, asked: Asked, relatives: Collection[str], number: int, count: int
) -> Iterable[dict[str, Any]]:
    """Rows of ``similar`` that are no relatives; one row stands for a family."""
    left = count
    if not left:
        return
    for row in similar(store, asked, Wishes(count=count + number)):
        if relatives and not {row.path, *row.other_paths}.isdisjoint(relatives):
            continue
        keep = ("path", "score", "z", "chance", "name", "base_model", "trigger_words", "variants")
        yield {key: getattr(row, key) for key in (*keep, "basis")}
        left -= 1
        if not left:
            return

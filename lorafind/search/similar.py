"""``similar``: the LoRAs nearest in style to a target, with what chance would give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lorafind.bases.basis import OWN, Basis
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import current
from lorafind.index.classes import kinds
from lorafind.index.opening import snapshot
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.search.query import Asked
from lorafind.search.scores import Query, Scored, by_basis, default_groups, plain
from lorafind.search.targets import Card, cards

#: Strangers that the mean and spread of a layout must rest on.
STRANGERS = 30
#: Degrees of freedom of the distribution that ``chance`` takes strangers to have.
TAIL = 10
#: What is said in place of a basis where there is none.
PLAIN = "plain"
_CARDS = 256
#: How many of the highest scores are sorted at first (a multiple of _CARDS).
_SORTED = 4096

#: What a user may write for a group → groups.
GROUP_WORDS = {
    "self": ("self_attn",),
    "cross": ("cross_attn",),
    "attn": ("self_attn", "cross_attn"),
    "ff": ("ff",),
    "conv": ("conv",),
    "other": ("other",),
    "text": ("text",),
    "unet": ("self_attn", "cross_attn", "ff", "conv", "other"),
    "all": ("self_attn", "cross_attn", "ff", "conv", "other", "text"),
}


@dataclass(frozen=True)
class Wishes:
    """What of the answers is wanted.

    by: words of GROUP_WORDS; none: U-Net or transformer. basis: one that was opened, or id or name
    of one of the index, ``own``, or ``plain`` for none; empty: the one in use.
    """

    count: int = 10
    by: Sequence[str] = ()
    min_score: float | None = None
    min_z: float | None = None
    every: bool = False
    same_base: bool = False
    basis: Basis | str = ""

    def groups(self, bits: int) -> tuple[str, ...]:
        """The groups to compare by. Raises ValueError for a word that is none."""
        if not self.by:
            return default_groups(bits)
        unknown = [word for word in self.by if word not in GROUP_WORDS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no group; choose from {', '.join(GROUP_WORDS)}")
        return tuple(dict.fromkeys(g for word in self.by for g in GROUP_WORDS[word]))


@dataclass(frozen=True)
class Neighbour:
    """One answer.

    score: cosine of style (an estimate from signatures); z: its distance from strangers of the
    same layouts in their standard deviations, chance: how many strangers of this collection would
    score as high (see :func:`tail`); both None with fewer than 30 strangers. relation:
    a proved one in words, ``~likely`` where the sketches suggest one that is not proved, else
    empty. variants: how many kin of it are not shown. basis: id of the basis, ``plain`` without.
    rank: of the LoRA.
    """

    query: str
    position: int
    path: str
    score: float
    z: float | None
    chance: float | None
    relation: str
    variants: int
    name: str
    architecture: str
    family: str
    rank: str
    base_model: str
    trigger_words: tuple[str, ...]
    groups: tuple[str, ...]
    basis: str
    other_paths: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def similar(store: Store, asked: Asked, wishes: Wishes) -> Iterator[Neighbour]:
    """The nearest first. Raises IndexProblem where nothing can be compared."""
    query = asked.query
    wanted = wishes.groups(query.signature.groups)
    # A writer may fit the basis again between two of the many statements.
    with snapshot(store.conn):
        scored, basis = _score(store, query, wanted, wishes.basis)
        relations = _relations(store, asked)
        own = _own_family(store, query)
    if query.lora is not None:
        keep = scored.ids != query.lora
        scored = Scored(
            scored.ids[keep],
            scored.layouts[keep],
            scored.families[keep],
            scored.scores[keep],
            scored.groups,
        )
    if not len(scored.ids):
        return
    z, strangers = _significance(scored, own | relations.keys())
    order = nearest(scored.scores, scored.ids, _CARDS)
    base = _base(store, query) if wishes.same_base else None
    yield from _rows(store, asked, scored, order, z, strangers, relations, wishes, base, basis)


def nearest(scores: np.ndarray, ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Positions of n scores, the highest first, equal ones by id, ``size`` at a time.

    The same as one sort of everything, of which the first answers need only a part.
    """
    keys = np.where(np.isnan(scores), -np.inf, scores)
    left = np.arange(len(keys))
    taken = _SORTED
    while len(left):
        mine = keys[left]
        if taken < len(left):
            # All that equal the last one come along, so that ids decide among them.
            least = np.partition(mine, len(mine) - taken)[len(mine) - taken]
            now, left, mine = left[mine >= least], left[mine < least], mine[mine >= least]
        else:
            now, left = left, left[:0]
        now = now[np.lexsort((ids[now], -mine))]
        yield from (now[start : start + size] for start in range(0, len(now), size))
        taken *= 16


def _score(
    store: Store, query: Query, wanted: Sequence[str], chosen: Basis | str
) -> tuple[Scored, str]:
    """Scores against every LoRA that may be of the same architecture, and what they rest on."""
    found, used = [], []
    named = isinstance(chosen, str) and chosen not in ("", OWN, PLAIN)
    for architecture in kinds(query.architecture):
        if isinstance(chosen, str):
            basis, stored = _of_index(store, architecture, chosen), True
            if basis is None and named:
                continue
        else:
            basis, stored = chosen, False
            if basis.architecture != architecture:
                continue
        if basis is not None and set(wanted) & set(basis.groups):
            found.append(by_basis(store, basis, query, wanted, stored))
            used.append(basis.id)
        else:
            found.append(plain(store, architecture, query, wanted))
            used.append(PLAIN)
    if not found:
        if isinstance(chosen, str):
            raise BasisProblem(f"The index has no basis {chosen!r} for {query.architecture}.")
        raise BasisProblem(
            f"The basis {chosen.facts['name']} is for {chosen.architecture}, "
            f"{query.path} is for {query.architecture}."
        )
    if len(found) == 1 and (np.diff(found[0].ids) > 0).all():
        return found[0], used[0]
    ids = np.concatenate([f.ids for f in found])
    # A LoRA that may be of several architectures is scored in each; its first score counts.
    _, first = np.unique(ids, return_index=True)
    columns = ([getattr(f, name) for f in found] for name in ("layouts", "families", "scores"))
    layouts, families, scores = (np.concatenate(column)[first] for column in columns)
    groups = tuple(dict.fromkeys(g for f in found for g in f.groups))
    return Scored(ids[first], layouts, families, scores, groups), " ".join(dict.fromkeys(used))


def _of_index(store: Store, architecture: str, name: str) -> Basis | None:
    """A basis of the index by id or name; the one in use without a name. None: plain scores."""
    if name == PLAIN:
        return None
    return current(store, architecture, light=True, wanted=name)


def _own_family(store: Store, query: Query) -> set[int]:
    if query.lora is None:
        return set()
    rows = store.conn.execute(
        "SELECT b.lora FROM families a JOIN families b ON b.family = a.family WHERE a.lora = ?",
        (query.lora,),
    )
    return {lora for (lora,) in rows}


def _relations(store: Store, asked: Asked) -> dict[int, str]:
    """LoRA id → relation to the query in words."""
    lora = asked.query.lora
    if lora is None:
        return _likely(store, asked)
    found = {}
    for row in store.relations(RELATION_VERSION, lora):
        other = row.y if row.x == lora else row.x
        if row.grade == "likely":
            found[other] = "~likely"
        elif row.grade:
            words = ", ".join(row.steps)
            found[other] = f"{row.grade}: {words}" if words else row.grade
    return found


def _likely(store: Store, asked: Asked) -> dict[int, str]:
    """Candidates for a relation of a LoRA that is not in the index."""
    from lorafind.search.likely import likely

    assert asked.lora is not None
    return {k: f"~likely {guess:.2f}" for k, guess in likely(store, asked.lora).items()}


def _significance(scored: Scored, kin: set[int]) -> tuple[np.ndarray, dict[int, int]]:
    """z of every score, NaN where there are too few strangers of its layout, whose number is told.

    Layout → number of strangers.
    """
    z = np.full(len(scored.ids), np.nan)
    strangers: dict[int, int] = {}
    stranger = ~np.isin(scored.ids, np.fromiter(kin, np.int64, len(kin)))
    alone = bool((scored.families == scored.ids).all())
    for layout in np.unique(scored.layouts).tolist():
        here = scored.layouts == layout
        sample = scored.scores[here & stranger]
        if not alone:
            # Every family speaks once.
            _, first = np.unique(scored.families[here & stranger], return_index=True)
            sample = sample[first]
        if len(sample) < STRANGERS:
            continue
        # LoRAs of one style are strangers by descent: the median and the quartiles hardly see them.
        low, middle, high = np.quantile(sample.astype(np.float64), [0.25, 0.5, 0.75])
        spread = (high - low) / 1.349
        if spread <= 0:
            continue
        z[here] = (scored.scores[here] - middle) / spread
        strangers[layout] = len(sample)
    return z, strangers


class _Variants:
    """How many LoRAs stand in a family beside one of it."""

    def __init__(self, scored: Scored) -> None:
        self._ids = scored.ids
        others = scored.families[scored.families != scored.ids]
        heads, sizes = np.unique(others, return_counts=True)
        self._sizes = dict(zip(heads.tolist(), sizes.tolist(), strict=True))

    def of(self, family: int) -> int:
        """The others of the family; its head may be out of reach."""
        if family not in self._sizes:
            return 0
        return int(self._sizes[family]) - (not (self._ids == family).any())


def tail(z: float) -> float:
    """P(T > z) for Student's t with TAIL degrees of freedom (an even number: a finite sum).

    Strangers of FontBench exceed z = 2 in 1 to 3 % of the pairs and z = 3 in 0.2 to 0.5 %; the
    normal distribution would say 2.3 and 0.13 %, this one says 3.7 and 0.7 %.
    """
    angle = math.atan2(z, math.sqrt(TAIL))
    term = total = 1.0
    for k in range(1, TAIL // 2):
        term *= (2 * k - 1) / (2 * k) * math.cos(angle) ** 2
        total += term
    return 0.5 * (1.0 - math.sin(angle) * total)


def _base(store: Store, query: Query) -> str:
    if query.lora is None:
        raise IndexProblem("--same-base needs a target that is in the index: index it first.")
    return _base_of(cards(store, [query.lora])[query.lora])


def _base_of(card: Card) -> str:
    facts = card.facts
    return str(facts.get("base_model_hash") or card.base_model).casefold()


def _rows(
    store: Store,
    asked: Asked,
    scored: Scored,
    order: Iterator[np.ndarray],
    z: np.ndarray,
    strangers: dict[int, int],
    relations: dict[int, str],
    wishes: Wishes,
    base: str | None,
    basis: str,
) -> Iterator[Neighbour]:
    variants = _Variants(scored)
    seen: set[int] = set()
    shown = 0
    for block in order:
        known = cards(store, scored.ids[block].tolist())
        # Copies score alike: their order must not hang on the order of indexing.
        ties = [
            (-round(float(scored.scores[k]), 5), known[number].paths, k)
            for k in block.tolist()
            # A writer may have taken a LoRA out meanwhile.
            if (number := int(scored.ids[k])) in known
        ]
        for _, _, k in sorted(ties):
            number, family = int(scored.ids[k]), int(scored.families[k])
            score, my_z = float(scored.scores[k]), _number(z[k])
            if shown >= wishes.count or (wishes.min_score is not None and score < wishes.min_score):
                return
            card = known[number]
            if not wishes.every and family in seen:
                continue
            if wishes.min_z is not None and (my_z is None or my_z < wishes.min_z):
                continue
            if base is not None and _base_of(card) != base:
                continue
            seen.add(family)
            shown += 1
            yield Neighbour(
                query=asked.path,
                position=shown,
                path=card.paths[0] if card.paths else "",
                score=round(score, 4),
                z=None if my_z is None else round(my_z, 2),
                chance=None
                if my_z is None
                else float(f"{strangers[int(scored.layouts[k])] * tail(my_z):.2g}"),
                relation=relations.get(number, ""),
                variants=0 if wishes.every else variants.of(family),
                name=card.name,
                architecture=card.architecture,
                family=card.family,
                rank=card.rank,
                base_model=card.base_model,
                trigger_words=card.trigger_words,
                groups=scored.groups,
                basis=basis,
                other_paths=card.paths[1:],
            )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

"""The combination of LoRAs of an index that comes near to a target in style.

The paper's outlook: instead of training a LoRA for a style, combine those that a collection has.
Three steps: a linear model over the embeddings chooses few LoRAs (:func:`combine`); the sum of
their ΔW is measured as a file would be (:func:`measure`), because style gives every module one vote
and is not linear in ΔW; the weights are refined by what was measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import by_group, current, embed, members
from lorafind.files.place import state
from lorafind.formats.read import open_adapter
from lorafind.index.classes import kinds
from lorafind.index.opening import snapshot
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.index.relate import place_of
from lorafind.index.store import Store
from lorafind.mix.measure import Goal, Measured, measure, weighted
from lorafind.mix.solve import combine, refine
from lorafind.mix.total import Term, check
from lorafind.search.query import Asked
from lorafind.search.scores import by_basis, default_groups
from lorafind.search.targets import cards

TERMS = 8
#: The nearest LoRAs among which terms are chosen (and, signed, as many of the farthest).
POOL = 256
#: Measurements of one mix.
EFFORT = 24
#: Digits after the point of a weight; what is printed is what is measured and merged.
DIGITS = 4


@dataclass(frozen=True)
class Wishes:
    """terms: at most so many LoRAs; signed: weights may be negative."""

    terms: int = TERMS
    signed: bool = False


@dataclass(frozen=True)
class Ingredient:
    """A LoRA of the mix: its file, its weight, and how near it is to the target by itself."""

    lora: int
    path: str
    weight: float
    score: float

    @property
    def name(self) -> str:
        """The file's name without its ending: what A1111 calls it."""
        return os.path.splitext(os.path.basename(self.path))[0]


@dataclass(frozen=True)
class Mix:
    """What was found.

    score: of the sum of ΔW to the target, measured on the sum; fresh: the same as `similar` will
    have it once the merged file is indexed, which the basis was not fitted to; model: as the linear
    model over the embeddings has it, before the weights were refined; nearest: score of the single
    nearest LoRA that could be used; norm: ‖Σ w·ΔW‖; skipped: nearer LoRAs that could not be used,
    and why; apart: how many have no layers in common with the target, such as text encoders alone.
    """

    target: str
    ingredients: tuple[Ingredient, ...]
    score: float
    fresh: float
    model: float
    nearest: float
    norm: float
    basis: str
    architecture: str
    terms: tuple[Term, ...] = field(repr=False)
    skipped: tuple[str, ...] = ()
    apart: int = 0

    @property
    def unsaid(self) -> list[str]:
        """Names that end a tag of A1111 too early."""
        return [one.name for one in self.ingredients if set(one.name) & set(":<>")]

    @property
    def a1111(self) -> str:
        """For the prompt of A1111 and Forge."""
        return " ".join(f"<lora:{one.name}:{text(one.weight)}>" for one in self.ingredients)

    @property
    def comfyui(self) -> list[dict[str, object]]:
        """The inputs of a chain of ComfyUI's LoraLoader nodes."""
        return [
            {
                "lora_name": os.path.basename(one.path),
                "strength_model": one.weight,
                "strength_clip": one.weight,
            }
            for one in self.ingredients
        ]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "target": self.target,
            "score": self.score,
            "fresh": self.fresh,
            "model": self.model,
            "nearest": self.nearest,
            "norm": self.norm,
            "architecture": self.architecture,
            "basis": self.basis,
            "ingredients": [{**asdict(one), "name": one.name} for one in self.ingredients],
            "a1111": self.a1111,
            "comfyui": self.comfyui,
            "skipped": list(self.skipped),
            "apart": self.apart,
        }


def text(weight: float) -> str:
    """A weight in decimals: never with an exponent, which A1111 would not read."""
    return f"{weight:.{DIGITS}f}".rstrip("0").rstrip(".")


def mix(
    store: Store, asked: Asked, wishes: Wishes | None = None, progress: Progress | None = None
) -> Mix:
    """The combination nearest to a target, which may be in the index or not.

    The target itself and its kin are left out. Raises IndexProblem where there is no basis over
    style, or nothing to combine.
    """
    wanted, watch = wishes or Wishes(), progress or Silent()
    with snapshot(store.conn):
        goal = _goal(store, asked)
        pool, skipped, apart = _pool(store, asked, goal, wanted)
    mine, terms, measured, model = _chosen(goal, pool, wanted, watch)
    ingredients = tuple(
        Ingredient(one.lora, one.path, term.weight, one.score)
        for one, term in sorted(zip(mine, terms, strict=True), key=lambda p: -abs(p[1].weight))
    )
    return Mix(
        asked.path,
        ingredients,
        measured.score,
        measured.fresh,
        model,
        pool[0].score,
        measured.norm,
        goal.basis.id,
        goal.basis.architecture,
        tuple(terms),
        tuple(skipped),
        apart,
    )


def score_of(store: Store, asked: Asked, path: str) -> float:
    """The score that ``similar`` will give a merged file to the target, once it is indexed.

    Raises what :func:`mix` raises.
    """
    with snapshot(store.conn):
        goal = _goal(store, asked)
    whole = Term(os.path.basename(path), open_adapter(path), 1.0)
    return measure(goal, [whole], False).fresh


@dataclass(frozen=True)
class _Candidate:
    lora: int
    path: str
    stat: tuple[int, int]
    score: float
    vector: np.ndarray
    norm: float
    seen: bool


def _goal(store: Store, asked: Asked) -> Goal:
    query = asked.query
    for architecture in kinds(query.architecture):
        basis = current(store, architecture)
        if basis is None:
            continue
        if basis.feature != "style":
            raise BasisProblem(
                f"The basis {basis.facts['name']} is over {basis.feature}; a mix is measured in a "
                "basis over style: `lorafind basis use own` takes the collection's."
            )
        wanted = set(default_groups(query.signature.groups))
        groups = frozenset(wanted & set(basis.groups))
        if not groups:
            continue
        styles = {g: row[None] for g, row in by_group(query.signature).items()}
        _, parts = embed(basis, styles, np.array([query.layout]))
        seen = bool(query.content) and bytes.fromhex(query.content) in basis.seen
        return Goal(store, basis, parts, groups, seen)
    raise IndexProblem(
        f"There is no basis for {query.architecture} to mix in: index 30 LoRAs or more of it, or "
        "take a basis with `lorafind basis use`."
    )


def _pool(
    store: Store, asked: Asked, goal: Goal, wishes: Wishes
) -> tuple[list[_Candidate], list[str], int]:
    """The nearest LoRAs that can be mixed, one of each family, why nearer ones cannot, and how many
    cannot be compared."""
    query, basis = asked.query, goal.basis
    scored = by_basis(store, basis, query, sorted(goal.groups))
    own = {query.lora} if query.lora is not None else set()
    own |= {
        lora
        for (lora,) in store.conn.execute(
            "SELECT b.lora FROM families a JOIN families b ON b.family = a.family WHERE a.lora = ?",
            (query.lora,),
        )
    }
    order = np.lexsort((scored.ids, -scored.scores))
    ends = [order, order[::-1]] if wishes.signed else [order]
    found: list[_Candidate] = []
    families: set[int] = set()
    skipped: list[str] = []
    for end in ends:
        left = POOL
        for at in end.tolist():
            lora, family = int(scored.ids[at]), int(scored.families[at])
            if lora in own or family in families:
                continue
            one = _candidate(store, goal, lora, float(scored.scores[at]))
            if isinstance(one, str):
                if not found:
                    skipped.append(one)
                continue
            families.add(family)
            found.append(one)
            left -= 1
            if not left:
                break
    if not found:
        why = f": {skipped[0]}" if skipped else ""
        raise IndexProblem(f"The index holds no other LoRA to mix for {asked.target}{why}")
    apart = np.setdiff1d(members(store, basis.architecture)[0], scored.ids)
    return found, skipped, len(set(apart.tolist()) - own)


def _candidate(store: Store, goal: Goal, lora: int, score: float) -> _Candidate | str:
    """A LoRA of the index, or why it cannot be mixed."""
    norm, content, extras = store.conn.execute(
        "SELECT norm, content, extras FROM loras WHERE id = ?", (lora,)
    ).fetchone()
    place = place_of(store, lora)
    if place is None:
        known = cards(store, [lora])[lora]
        return f"{known.name or lora}: none of its files is there now."
    name = os.path.basename(place[0])
    if extras not in ("{}", ""):
        return f"{name} does more than its ΔW."
    parts = store.chunks.get("parts", goal.basis.id, lora)
    assert parts is not None
    seen = bytes.fromhex(content) in goal.basis.seen
    vector = goal.basis.vectors(np.asarray(parts)[None], sorted(goal.groups), np.array([seen]))[0]
    return _Candidate(lora, place[0], place[1:], score, vector, norm, seen)


def _opened(one: _Candidate) -> Term:
    facts = state(one.path)
    if (facts.st_size, facts.st_mtime_ns) != one.stat:
        raise IndexProblem(f"{one.path} was changed since it was indexed: run `lorafind index`.")
    # It was read before, so that its owner has allowed it.
    term = Term(os.path.basename(one.path), open_adapter(one.path, allow_pickle=True), 1.0)
    check(term)
    return term


def _chosen(
    goal: Goal, pool: Sequence[_Candidate], wishes: Wishes, watch: Progress
) -> tuple[list[_Candidate], list[Term], Measured, float]:
    """The best of the mixes of 1, 2, … terms, as measured."""
    vectors = np.array([one.vector for one in pool])
    target = goal.vector(sorted(goal.groups))
    watch.stage("Measuring mixes", EFFORT + 3, 0)
    opened: dict[int, Term] = {}
    best: tuple[float, list[_Candidate], np.ndarray, float] | None = None

    def at(mine: Sequence[_Candidate], weights: np.ndarray) -> tuple[list[Term], Measured]:
        for one in mine:
            if one.lora not in opened:
                opened[one.lora] = _opened(one)
        terms = weighted([opened[one.lora] for one in mine], weights)
        watch.advance(1, 0)
        return terms, measure(goal, terms, all(one.seen for one in mine))

    which, strengths = combine(vectors, target, wishes.terms, wishes.signed)
    for chosen, shares in ((which, strengths), (np.array([0]), np.ones(1))):
        if not len(chosen):
            continue
        mine = [pool[i] for i in chosen.tolist()]
        # A share is of LoRAs as strong as one another.
        start = shares / np.array([one.norm for one in mine])
        score = at(mine, start)[1].score
        if best is None or score > best[0]:
            best = score, mine, start, _modelled(goal, shares @ vectors[chosen], target)
    assert best is not None
    _, mine, weights, model = best
    if len(mine) > 1:
        weights, _ = refine(lambda tried: at(mine, tried)[1].score, weights, EFFORT)
    terms, measured = at(mine, _usable(weights, mine))
    return mine, terms, measured, model


def _modelled(goal: Goal, sum_: np.ndarray, target: np.ndarray) -> float:
    """The score that a sum of embeddings would have, were style linear."""
    length = np.linalg.norm(sum_)
    if not goal.basis.euclidean and length:
        sum_ = sum_ / length
    return float(goal.basis.scores(sum_[None], target)[0])


def _usable(weights: np.ndarray, mine: Sequence[_Candidate]) -> np.ndarray:
    """Weights at which the mix is about as strong as its ingredients, in DIGITS decimals.

    Style leaves the strength open: the square of the mix's ‖ΔW‖ (its terms being nearly
    orthogonal) is made the weighted mean of theirs.
    """
    sizes = np.array([one.norm for one in mine])
    shares = (weights * sizes) ** 2
    usual = np.sqrt((shares * sizes**2).sum() / shares.sum())
    scaled = weights * usual / np.sqrt(shares.sum())
    rounded = np.round(scaled, DIGITS)
    # A LoRA that is very strong needs more digits than others.
    return np.where(rounded == 0, np.sign(scaled) * 10.0**-DIGITS, rounded)

"""Two LoRAs side by side: what one is to the other, in words and exact numbers, without an index.

Every number is a float64 inner product of ΔW through the factors, one module at a time. A module
whose ΔW is zero counts as absent. Two modules meet under their canonical name where their shapes
are equal, whatever the spelling, the rank and the family.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafind.bases.collection import SPACES, WEIGHTS
from lorafind.files import sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import handled
from lorafind.formats.adapter import Place
from lorafind.formats.architectures import candidates
from lorafind.formats.groups import GROUPS
from lorafind.search import words

if TYPE_CHECKING:
    from lorafind.formats.adapter import Adapter
    from lorafind.formats.delta import Delta
    from lorafind.formats.read import Reading

#: ‖ΔW‖² below this share of its terms is computed again without cancellation.
DOUBT = 1e-9
#: ‖K₀‖² below this share of (tr K)² is the noise of the trace that was taken off.
TRACE = 1e-14

_INTEGER = re.compile(r"(?<![^._])\d+(?![^._])")


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, allow_pickle: bool = False
) -> dict[str, Any]:
    """What B is to A. Raises NotAnAdapter where one of the two is no LoRA, or has no ΔW.

    Fields (None where there is nothing to say):
      a, b: the two files: path, name, architecture, family, spelling, ranks (rank → number of
        modules), dtype, effective_dtype, modules (those that are not zero), norm (‖ΔW‖), share (of
        its ‖ΔW‖² in common modules), only (names of the modules that it alone has), base_model,
        base_model_name, base_model_hash, session;
      comparable: False where the two are for different base models;
      relation: as :meth:`Relation.to_json` with a as x and b as y, None where none is proved;
      common: the number of modules that both have;
      cosine: of ΔW over them; cosine_all: over all modules, those of one alone as zero in the
        other;
      ratio: ‖B‖/‖A‖ over the common modules;
      components, groups, blocks: lists of name, common, cosine, cosine_all, norm_a, norm_b (over
        all modules there), ratio, only_a, only_b (numbers of modules);
      style: exact similarity of style without a basis: cosine over the groups of the U-Net or
        transformer (with their weights squared), and groups: group → cosine, modules. Of
        self-attention, feed-forward and convolutions the mean of the cosines of the modules; of
        cross-attention and text encoders that of K₀ = K − (tr K/o)·I, K = ΔW·ΔWᵀ. Modules with next
        to no energy count less;
      same_session: True or False where both name a training session; same_base: the same of the
        base model, by hash where both have one, else by name;
      words: the summary, topic → sentence.
    """
    first, second = _Side.read(a, allow_pickle), _Side.read(b, allow_pickle)
    from lorafind.relations.verify import prove

    pairs, only = _measure(first.adapter, second.adapter)
    same = first.sha256 is not None and first.sha256 == second.sha256
    relation = prove(first.adapter, second.adapter, same_file=same)
    everything = _part("all", pairs, *only)
    row: dict[str, Any] = {
        "a": first.to_json(pairs, only[0], lambda pair: pair.xx),
        "b": second.to_json(pairs, only[1], lambda pair: pair.yy),
        "comparable": _comparable(first.architecture, second.architecture, bool(pairs)),
        "relation": relation.to_json() if relation is not None else None,
        **{key: everything[key] for key in ("common", "cosine", "cosine_all", "ratio")},
        "components": _parts(pairs, only, lambda place: place.component),
        "groups": _parts(pairs, only, lambda place: place.group, GROUPS),
        "blocks": _parts(pairs, only, block),
        "style": _style(pairs, only),
        "same_session": _equal(first.facts.session_id, second.facts.session_id),
        "same_base": _same_base(first.facts, second.facts),
    }
    row["words"] = words.summary(row, relation)
    return row


def block(place: Place) -> str:
    """The block of a module: its name up to the first number, e.g. ``unet/down_blocks.0``."""
    component, _, path = place.name.partition("/")
    if path.startswith("mid_block"):
        return f"{component}/mid_block"
    number = _INTEGER.search(path)
    return f"{component}/{path[: number.end()] if number else path}"


# ---------------------------------------------------------------------------- the two files


@dataclass(frozen=True)
class _Side:
    path: Path | str
    adapter: Adapter
    sha256: str | None
    facts: sidecars.Facts
    beside: sidecars.Sidecar

    @classmethod
    def read(cls, path: str | os.PathLike[str], allow_pickle: bool) -> _Side:
        from lorafind.formats.read import read

        path = handled(path)
        reading = read(path, allow_pickle)
        if reading.outcome != "lora":
            raise NotAnAdapter(reading.outcome, _why(path, reading))
        assert reading.adapter is not None and reading.header is not None
        facts = sidecars.facts_from_metadata(reading.header.metadata)
        beside = sidecars.read_sidecars(path)
        return cls(path, reading.adapter, reading.sha256, facts, beside)

    @property
    def architecture(self) -> str:
        return self.adapter.plan.architecture

    def to_json(
        self, pairs: list[Pair], only: list[Alone], square: Callable[[Pair], float]
    ) -> dict[str, Any]:
        plan = self.adapter.plan
        shared = math.fsum(map(square, pairs))
        total = shared + math.fsum(alone.square for alone in only)
        active = {pair.place.name for pair in pairs} | {alone.place.name for alone in only}
        ranks: dict[int, int] = {}
        for module in plan.modules:
            if module.name in active and not module.place.vector:
                rank = module.bind(self.adapter.fetch).rank
                ranks[rank] = ranks.get(rank, 0) + 1
        return {
            "path": os.fspath(self.path),
            "name": sidecars.display_name(self.path, self.beside, self.facts),
            "architecture": plan.architecture,
            "family": plan.family,
            "spelling": plan.spelling,
            "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
            "dtype": self.adapter.dtype,
            "effective_dtype": self.adapter.effective_dtype,
            "modules": len(active),
            "norm": math.sqrt(total),
            "share": shared / total if total else None,
            "only": [alone.place.name for alone in only],
            "base_model": self.facts.base_model or self.beside.base_model,
            "base_model_name": self.facts.base_model_name,
            "base_model_hash": self.facts.base_model_hash,
            "session": self.facts.session_id,
        }


def _why(path: Path | str, reading: Reading) -> str:
    name = os.path.basename(path)
    return reading.reason if name in reading.reason else f"{name}: {reading.reason}"


def _comparable(one: str, two: str, meet: bool) -> bool:
    """Models without a table are one where modules meet."""
    if one.startswith("other:") and two.startswith("other:"):
        return meet or one == two
    return not set(candidates(one)).isdisjoint(candidates(two))


def _equal(one: str | None, two: str | None) -> bool | None:
    return one == two if one and two else None


def _same_base(one: sidecars.Facts, two: sidecars.Facts) -> bool | None:
    for name in ("base_model_hash", "base_model_name", "base_model"):
        # A short hash is the old kind and cannot be held against a long one.
        ours, theirs = getattr(one, name), getattr(two, name)
        if ours and theirs and (name != "base_model_hash" or len(ours) == len(theirs)):
            return bool(ours == theirs)
    return None


# ---------------------------------------------------------------------------- the numbers


@dataclass(frozen=True)
class Pair:
    """A module that both have and that is zero in neither.

    xx, yy, xy: ‖X‖², ‖Y‖², ⟨X, Y⟩; style: the cosine of its style features, None where one of the
    two is nothing.
    """

    place: Place
    xx: float
    yy: float
    xy: float
    style: float | None


@dataclass(frozen=True)
class Alone:
    """A module that one alone has: ‖ΔW‖²."""

    place: Place
    square: float


def _measure(x: Adapter, y: Adapter) -> tuple[list[Pair], tuple[list[Alone], list[Alone]]]:
    from lorafind.relations.core import squared_norm

    pairs: list[Pair] = []
    only: tuple[list[Alone], list[Alone]] = ([], [])
    ours, theirs = x.modules, y.modules
    shapes = {module.name: module.shape for module in y.plan.modules}
    common = {m.name for m in x.plan.modules if shapes.get(m.name) == m.shape}
    for module in x.plan.modules:
        if module.name in common:
            pair = _pair(module.place, ours[module.name], theirs[module.name])
            if pair.xx and pair.yy:
                pairs.append(pair)
            elif pair.xx or pair.yy:
                only[0 if pair.xx else 1].append(Alone(module.place, pair.xx or pair.yy))
    for bound, plan, found in ((ours, x.plan, only[0]), (theirs, y.plan, only[1])):
        for module in plan.modules:
            if module.name not in common and (square := squared_norm(bound[module.name])):
                found.append(Alone(module.place, square))
    return pairs, only


def _pair(place: Place, x: Delta, y: Delta) -> Pair:
    from lorafind.relations.core import squared_norm
    from lorafind.signatures.products import products
    from lorafind.signatures.sketch import grammed

    grams = grammed(place.group)
    p = products(x, y, grams)
    # Where nearly everything cancels, the Grams cannot tell a small ΔW from none.
    xx = p.xx if p.xx > DOUBT * p.x_size else squared_norm(x)
    yy = p.yy if p.yy > DOUBT * p.y_size else squared_norm(y)
    if not grams:
        style = _cosine(p.xy, xx, yy)
    elif p.k_xx > TRACE * xx * xx and p.k_yy > TRACE * yy * yy:
        style = _cosine(p.k_xy, p.k_xx, p.k_yy)
    else:
        style = None
    return Pair(place, xx, yy, p.xy, style)


def _parts(
    pairs: list[Pair],
    only: tuple[list[Alone], list[Alone]],
    of: Callable[[Place], str],
    order: Iterable[str] = (),
) -> list[dict[str, Any]]:
    found: dict[str, tuple[list[Pair], list[Alone], list[Alone]]] = {n: ([], [], []) for n in order}
    for pair in pairs:
        found.setdefault(of(pair.place), ([], [], []))[0].append(pair)
    for side, members in enumerate(only, 1):
        for alone in members:
            found.setdefault(of(alone.place), ([], [], []))[side].append(alone)  # type: ignore[arg-type]
    names = list(found) if order else sorted(found, key=_natural)
    return [_part(name, *found[name]) for name in names if any(found[name])]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Text encoders last, 2 before 10."""
    words = [(False, int(w), "") if w.isdigit() else (True, 0, w) for w in re.split(r"(\d+)", name)]
    return [(name.startswith("te"), 0, ""), *words]


def _part(name: str, pairs: list[Pair], only_a: list[Alone], only_b: list[Alone]) -> dict[str, Any]:
    xx, yy, xy = (math.fsum(getattr(pair, n) for pair in pairs) for n in ("xx", "yy", "xy"))
    a_all = xx + math.fsum(alone.square for alone in only_a)
    b_all = yy + math.fsum(alone.square for alone in only_b)
    return {
        "name": name,
        "common": len(pairs),
        "cosine": _cosine(xy, xx, yy),
        "cosine_all": _cosine(xy, a_all, b_all),
        "norm_a": math.sqrt(a_all),
        "norm_b": math.sqrt(b_all),
        "ratio": math.sqrt(yy / xx) if xx else None,
        "only_a": len(only_a),
        "only_b": len(only_b),
    }


def _cosine(xy: float, xx: float, yy: float) -> float | None:
    """Clamped, because rounding may leave it a hair beyond 1."""
    if not (xx and yy):
        return None
    return min(1.0, max(-1.0, xy / math.sqrt(xx) / math.sqrt(yy)))


def _style(pairs: list[Pair], only: tuple[list[Alone], list[Alone]]) -> dict[str, Any]:
    """The style features of both over their common modules, without sketches and basis."""
    groups: dict[str, Any] = {}
    total = weight = 0.0
    for group in GROUPS:
        here = [p for p in pairs if p.place.group == group and not p.place.vector]
        if not here:
            continue
        ours = _votes([p.xx for p in here], only[0], group)
        theirs = _votes([p.yy for p in here], only[1], group)
        counted = [
            (v, w, p.style)
            for v, w, p in zip(ours, theirs, here, strict=True)
            if p.style is not None
        ]
        if not counted:
            continue
        sizes = math.fsum(v * v for v, _, _ in counted), math.fsum(w * w for _, w, _ in counted)
        cosine = math.fsum(v * w * c for v, w, c in counted) / math.sqrt(sizes[0] * sizes[1])
        groups[group] = {"cosine": cosine, "modules": len(counted)}
        if group in SPACES["model"]:
            total += WEIGHTS[group] ** 2 * cosine
            weight += WEIGHTS[group] ** 2
    return {"cosine": total / weight if weight else None, "groups": groups}


def _votes(common: list[float], only: list[Alone], group: str) -> list[float]:
    """What each common module counts in its own LoRA (squared norms)."""
    import torch

    from lorafind.signatures.features import votes

    rest = [a.square for a in only if a.place.group == group and not a.place.vector]
    found = votes(torch.tensor([*common, *rest], dtype=torch.float64).sqrt())
    return [float(vote) for vote in found[: len(common)]]

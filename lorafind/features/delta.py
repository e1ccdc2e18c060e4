"""Exact features: ΔW as it is, and style, by their inner products, hardly ever building ΔW.

Feature ``delta exact``: ΔW of all modules end to end. ``style exact``: every module at unit
Frobenius norm times its vote; ΔW itself, but for cross-attention and text encoders the traceless
output-side Gram K₀ = K − (tr K/o)·I with K = ΔW·ΔWᵀ (see ``signatures/features.py``).

A module of a LoRA is a product L·R: B and A, or for K, which is E·Eᵀ with E = B·(A·Aᵀ)^½, the two
sides E and Eᵀ. The factors of n LoRAs stand side by side, and all inner products are sums over
blocks of (LᵀL') ∘ (R·R'ᵀ). Where ranks are so high that this is more work than the n products
themselves, those are made, a few output rows at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafind.features import matrix
from lorafind.features.matrix import Matrix, Saved, add_product
from lorafind.features.sources import Adapters, Source, one_thread
from lorafind.formats.groups import GROUPS
from lorafind.index.progress import Progress, Silent
from lorafind.signatures.features import votes
from lorafind.signatures.sketch import grammed

F32, F64 = torch.float32, torch.float64
#: Bytes of factors of one module that are kept between two blocks; what is beyond is read again.
HELD = 768 << 20
#: Columns of factors that are multiplied at a time.
COLUMNS = 2048
#: Numbers that a product sums in float32 before the sum goes on in float64.
LONGEST = 1 << 16


@dataclass(frozen=True)
class _Pair:
    """A module of one LoRA, left·right in float32, None standing for the identity.

    trace: Σ of the diagonal that is taken off a Gram in equal parts, 0 elsewhere.
    """

    left: Tensor | None
    right: Tensor | None
    trace: float = 0.0

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(4 * t.numel() for t in (self.left, self.right) if t is not None)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Both sides, the identity written out."""
        if self.left is None:
            assert self.right is not None
            return torch.eye(len(self.right)), self.right
        if self.right is None:
            return self.left, torch.eye(self.left.shape[1])
        return self.left, self.right


@dataclass(frozen=True)
class _Module:
    """A module that some LoRAs have. who: their rows; ranks: of their factors, about."""

    name: str
    height: int
    width: int
    who: list[int]
    ranks: list[int]

    @property
    def size(self) -> int:
        """Numbers in the product."""
        return self.height * self.width

    def dense(self) -> bool:
        """True where building the products is less work than the sums over factors."""
        return sum(self.ranks) ** 2 * (self.height + self.width) > len(self.who) ** 2 * self.size


class Exact(Matrix):
    """Exact features of n LoRAs, read from their files module by module.

    style: which of the two features (see above). The Gram reads every file once as long as the
    factors of a module fit in HELD bytes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        groups: Sequence[str],
        *,
        style: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self.feature = "style exact" if style else "delta exact"
        self.count = len(sources)
        self.style = style
        self.adapters = Adapters(sources, allow_pickle)
        self._votes = [_votes(source) for source in sources] if style else []
        self._modules = self._collect(groups)
        self.groups = tuple(g for g in GROUPS if g in self._modules)
        self.widths = {g: sum(m.size for m in self._modules[g]) for g in self.groups}
        self.present = {}
        for group in self.groups:
            has = np.zeros(self.count, bool)
            has[[k for module in self._modules[group] for k in module.who]] = True
            self.present[group] = has
        contents = [source.content for source in sources]
        told_of = json.dumps([self.feature, self.groups, contents])
        self.fingerprint = hashlib.sha256(told_of.encode()).hexdigest()

    def _collect(self, groups: Sequence[str]) -> dict[str, list[_Module]]:
        found: dict[str, dict[tuple[str, int, int], _Module]] = {}
        for k, source in enumerate(self.adapters.sources):
            for m in source.modules:
                # A bias or norm has no style.
                if m.group not in groups or (self.style and m.vector):
                    continue
                own = found.setdefault(m.group, {})
                width = m.o if self._is_gram(m.group) else m.n
                module = own.setdefault(
                    (m.name, m.o, m.n), _Module(m.name, m.o, width, who=[], ranks=[])
                )
                plan = self.adapters.plan(k, m.name)
                assert plan is not None
                module.who.append(k)
                module.ranks.append(plan.rank if plan.family == "lora" else min(m.o, m.n))
        return {group: [own[key] for key in sorted(own)] for group, own in found.items()}

    def _is_gram(self, group: str) -> bool:
        return self.style and grammed(group)

    # -- columns

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """Raises BasisProblem where a file is gone or has changed since it was opened."""
        out = np.zeros((self.count, tile.stop - tile.start), np.float32)
        start = 0
        for module in self._modules[group]:
            first, last = max(tile.start, start), min(tile.stop, start + module.size)
            if first < last:
                top, end = (first - start) // module.width, -(-(last - start) // module.width)
                skip = first - start - top * module.width
                at = slice(first - tile.start, last - tile.start)
                for block in _blocks(module.ranks):
                    who = [module.who[p] for p in block]
                    with one_thread():
                        pairs = [self._pair(group, module, k) for k in who]
                    made = _products(pairs, top, end, module.width)
                    out[who, at] = made[:, skip : skip + last - first]
            start += module.size
        return out

    # -- the Gram

    def gram(
        self,
        group: str,
        device: str = "cpu",
        watch: Progress | None = None,
        saved: Saved | None = None,
    ) -> np.ndarray:
        """Exact inner products of a group, n × n float64: float32 products, float64 sums.

        saved: counts modules where that of other features counts tiles.
        """
        # Apple's GPUs lack float64, which the sums are made in.
        device = "cpu" if device == "mps" else device
        watch = watch or Silent()
        kept = saved.load(group) if saved else None
        done, total = kept or (0, np.zeros((self.count, self.count)))
        modules = self._modules[group]
        ends = np.cumsum([module.size for module in modules])
        # Progress is told in tiles, as by any other feature.
        stops = np.array([tile.stop for tile in self.tiles(group)])
        told = int((stops <= ends[done - 1]).sum()) if done else 0
        watch.advance(told, 0)
        for module in modules[done:]:
            before = self.adapters.read_bytes
            cache = _Cache(self, group, module)
            if module.dense():
                part = self._by_rows(cache, module, device)
            else:
                part = self._by_factors(cache, module, device, self._is_gram(group))
            total[np.ix_(module.who, module.who)] += part
            done += 1
            now = int((stops <= ends[done - 1]).sum())
            watch.advance(now - told, self.adapters.read_bytes - before)
            told = now
            if saved:
                saved.save(group, done, total, done == len(modules))
        return total

    def _by_factors(self, cache: _Cache, module: _Module, device: str, square: bool) -> np.ndarray:
        """Σ over blocks of (LᵀL') ∘ (R·R'ᵀ). square: R is Lᵀ, so that both are the same."""
        blocks = _blocks(module.ranks)
        out = np.zeros((len(module.who), len(module.who)))
        for i, block in enumerate(blocks):
            left, right, owner = self._stack(cache, module, block, device, square)
            for j in range(i + 1):
                other = blocks[j]
                left_j, right_j, owner_j = (
                    (left, right, owner)
                    if i == j
                    else self._stack(cache, module, other, device, square)
                )
                product = (left.T @ left_j).double()
                product *= product if square else (right @ right_j.T).double()
                rows = torch.zeros(len(block), product.shape[1], dtype=F64, device=device)
                rows.index_add_(0, owner, product)
                sums = torch.zeros(len(block), len(other), dtype=F64, device=device)
                part = sums.index_add_(1, owner_j, rows).cpu().numpy()
                out[block.start : block.stop, other.start : other.stop] = part
                out[other.start : other.stop, block.start : block.stop] = part.T
        if square:
            traces = np.array([cache.traces[k] for k in module.who])
            out -= np.outer(traces, traces) / module.height
        return out

    def _stack(
        self, cache: _Cache, module: _Module, block: range, device: str, square: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L, R, position in the block of every column of L) of some LoRAs."""
        sides = [pair.sides() for pair in cache.of([module.who[p] for p in block])]
        left = torch.cat([one for one, _ in sides], 1)
        right = left if square else torch.cat([two for _, two in sides])
        counts = torch.tensor([one.shape[1] for one, _ in sides])
        owner = torch.arange(len(sides)).repeat_interleave(counts)
        return left.to(device), right.to(device), owner.to(device)

    def _by_rows(self, cache: _Cache, module: _Module, device: str) -> np.ndarray:
        """The products themselves, a few output rows of all LoRAs at a time."""
        n = len(module.who)
        step = max(1, min(matrix.TILE // (4 * n), LONGEST) // module.width)
        out = np.zeros((n, n))
        present = np.ones(n, bool)
        for start in range(0, module.height, step):
            stop = min(start + step, module.height)
            rows = np.empty((n, (stop - start) * module.width), np.float32)
            for block in _blocks(module.ranks):
                pairs = cache.of([module.who[p] for p in block])
                rows[block.start : block.stop] = _products(pairs, start, stop, module.width)
            add_product(out, rows, present, device)
        return out

    # -- one module of one LoRA

    def _pair(self, group: str, module: _Module, k: int) -> _Pair:
        delta = self.adapters.delta(k, module.name)
        dtype = F64 if self.style else F32
        left: Tensor | None
        right: Tensor | None
        if (factors := delta.factors(dtype)) is not None:
            left, right = factors
        else:
            x = delta.dense(dtype)
            left, right = (None, x) if x.shape[0] <= x.shape[1] else (x, None)
        if not self.style:
            return _Pair(left, right)
        vote = self._votes[k][module.name]
        if self._is_gram(group):
            return _unit_gram(left, right, vote)
        return _unit(left, right, vote)


def _products(pairs: Sequence[_Pair], start: int, stop: int, width: int) -> np.ndarray:
    """Output rows start … stop − 1 of left·right of some LoRAs, without trace parts: n × numbers.

    Pairs of one rank are multiplied in one go, which costs a fraction of many small products.
    """
    out = torch.empty(len(pairs), stop - start, width)
    by_rank: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.left is not None and pair.right is not None:
            by_rank.setdefault(len(pair.right), []).append(i)
        else:
            whole = pair.right if pair.left is None else pair.left
            assert whole is not None
            out[i] = whole[start:stop]
    for same in by_rank.values():
        left = torch.stack([pairs[i].left[start:stop] for i in same])  # type: ignore[index]
        right = torch.stack([pairs[i].right for i in same])  # type: ignore[misc]
        with one_thread():
            out[same] = left @ right
    traces = torch.tensor([pair.trace for pair in pairs])
    if traces.any():
        index = torch.arange(stop - start)
        out[:, index, start + index] -= traces[:, None] / width
    return out.flatten(1).numpy()


def _unit(left: Tensor | None, right: Tensor | None, vote: float) -> _Pair:
    """left·right (float64) at norm ``vote``."""
    if left is None or right is None:
        one = left if left is not None else right
        assert one is not None
        norm = float(one.norm())
    else:
        norm = float(((left.T @ left) * (right @ right.T)).sum()) ** 0.5
    scale = vote / norm if norm > 0 else 0.0
    if left is None:
        assert right is not None
        return _Pair(None, (right * scale).to(F32))
    return _Pair((left * scale).to(F32), None if right is None else right.to(F32))


def _unit_gram(left: Tensor | None, right: Tensor | None, vote: float) -> _Pair:
    """K of left·right (float64) as E·Eᵀ, scaled so that K₀ has norm ``vote``."""
    if right is None:
        assert left is not None
        e = left
    else:
        values, vectors = torch.linalg.eigh(right @ right.T)
        root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
        e = root if left is None else left @ root
    small = e.T @ e
    trace, square = float(small.trace()), float(small.square().sum())
    rest = square - trace * trace / len(e)
    # What is left of a multiple of the identity is rounding.
    weight = vote / rest**0.5 if rest > 1e-12 * square else 0.0
    scaled = (e * weight**0.5).to(F32)
    return _Pair(scaled, scaled.T, trace * weight)


def _votes(source: Source) -> dict[str, float]:
    """Module name → its vote (see :func:`lorafind.signatures.features.votes`)."""
    found: dict[str, float] = {}
    for group in GROUPS:
        own = [i for i, m in enumerate(source.modules) if m.group == group and not m.vector]
        if own:
            norms = torch.from_numpy(source.norms[own]).double().sqrt()
            names = [source.modules[i].name for i in own]
            found.update(zip(names, votes(norms).tolist(), strict=True))
    return found


class _Cache:
    """The pairs of one module by row; those beyond HELD bytes are made again when asked for.

    traces: of the Grams, by row, of all pairs made so far.
    """

    def __init__(self, owner: Exact, group: str, module: _Module) -> None:
        self._make = lambda k: owner._pair(group, module, k)
        self._kept: dict[int, _Pair] = {}
        self._free = HELD
        self.traces: dict[int, float] = {}

    def of(self, rows: Sequence[int]) -> list[_Pair]:
        """The pairs of some rows."""
        with one_thread():
            return [self._kept.get(k) or self._new(k) for k in rows]

    def _new(self, k: int) -> _Pair:
        pair = self._make(k)
        self.traces[k] = pair.trace
        if pair.bytes <= self._free:
            self._free -= pair.bytes
            self._kept[k] = pair
        return pair


def _blocks(ranks: Sequence[int]) -> list[range]:
    """Runs of neighbours with at most COLUMNS columns of factors together (or one alone)."""
    found, start, size = [], 0, 0
    for i, rank in enumerate(ranks):
        if i > start and size + rank > COLUMNS:
            found.append(range(start, i))
            start, size = i, 0
        size += rank
    return [*found, range(start, len(ranks))]

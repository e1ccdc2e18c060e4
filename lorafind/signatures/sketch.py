"""Linear sketches of modules: from ΔW to a 256 × 256 grid per group, without building ΔW.

For a module with ΔW = B·A the grid is (e_m∘S·B)·(f_m∘S'·Aᵀ)ᵀ/256 with the sides S of
``signs.py``; since the sign mask is e_m·f_mᵀ, the grids of a whole group add up in one matrix
product over the ranks of all its modules. The Gram matrix K = ΔW·ΔWᵀ has the factors B·(AAᵀ) and
B. What has no factors is dense, one module at a time.

E over the signs of ⟨grid(X), grid(Y)⟩ is Σ_m ⟨X_m, Y_m⟩.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lorafind.formats.adapter import Place
from lorafind.formats.delta import Delta, Kronecker, KroneckerRows, LowRank
from lorafind.signatures import signs
from lorafind.signatures.constants import DIMENSIONS, SEGMENTS

F32 = torch.float32
#: Modules of a higher rank are kept as grids.
RANK = 128
#: A ΔW without factors and of more numbers is never made as a whole.
LARGE = 2**24


@lru_cache(maxsize=384)
def _sign_block(matrix: str, names: tuple[str, ...], width: int, device: torch.device) -> Tensor:
    """Signs of several modules, len(names) × width, float32."""
    rows = np.stack([signs.stream(matrix, name, width) for name in names])
    return torch.from_numpy(rows).to(device=device, dtype=F32)


@lru_cache(maxsize=8)
def _hadamard16(device: torch.device) -> Tensor:
    return torch.from_numpy(signs.hadamard()[:16, :16] / 4.0).contiguous().to(device)


@lru_cache(maxsize=256)
def _trace_grid(width: int, device: torch.device) -> Tensor:
    return torch.from_numpy(signs.trace_grid(width)).to(device)


def fold(x: Tensor, stride: int, dim: int) -> Tensor:
    """Add up the coordinates of ``dim`` that are equal modulo ``stride``."""
    width = x.shape[dim]
    if width <= stride:
        return x
    whole = width // stride * stride
    head = x.narrow(dim, 0, whole).unflatten(dim, (whole // stride, stride)).sum(dim)
    if whole < width:
        head.narrow(dim, 0, width - whole).add_(x.narrow(dim, whole, width - whole))
    return head


def rotate(x: Tensor) -> Tensor:
    """H·x / 16 for 256 × N; H₂₅₆ = H₁₆ ⊗ H₁₆ needs an eighth of the products."""
    h = _hadamard16(x.device)
    half = h @ x.view(16, -1)
    return (h @ half.view(16, 16, -1)).view(signs.ROWS, -1)


@dataclass
class Part:
    """Modules of one group and shape, sketched: what style needs of them.

    left, right: the sides whose product is the grid of the modules (of ΔW, or of K where style
    looks at K), 256 × (modules·rank) float32, masks applied. Above RANK the grids themselves are
    fewer numbers: modules × 65,536 float16, each over its ``sizes``.
    norms: ‖ΔW‖; sizes: norm of what style looks at (‖ΔW‖ or ‖K₀‖); traces: tr K; one per module,
    float64. width: o.
    """

    places: list[Place]
    left: Tensor | None
    right: Tensor | None
    grids: Tensor | None
    norms: Tensor
    sizes: Tensor
    traces: Tensor
    width: int

    def add_to(self, grid: Tensor, factors: Tensor) -> None:
        """grid += Σ_m factor_m · grid_m."""
        if self.grids is not None:
            weights = (factors * self.sizes).to(F32)
            for weight, unit in zip(weights, self.grids, strict=True):
                grid += weight * unit.to(F32).view_as(grid)
            return
        assert self.left is not None and self.right is not None
        rank = self.left.shape[1] // len(self.places)
        wide = factors.to(F32).repeat_interleave(rank)
        grid.addmm_(self.left * wide, self.right.T)


def grammed(group: str) -> bool:
    """True where style looks at the output side alone: cross-attention and text encoders."""
    return group in ("cross_attn", "text")


def segment(place: Place) -> int:
    """Index into SEGMENTS of a module."""
    if place.group == "text":
        return {"te1": 8, "te2": 9}.get(place.component, 10)
    return _FAMILY[place.group] + int(place.late)


_FAMILY = {"self_attn": 0, "cross_attn": 2, "ff": 4, "conv": 6, "other": 6}

#: Place, up, down, scale.
_Factors = tuple[Place, Tensor, Tensor, float]


class Sketcher:
    """Collects modules, a batch at a time; per module at most 512 numbers per rank are kept.

    parts: group → what style needs. spectrum: the identity sketches of all segments in the Fourier
    domain, 65 × 11 complex64. The grid of a module, folded along a + b modulo 128, is a circular
    convolution of its two sides (a tensor sketch), which is a product there, summed over ranks.
    linear: the parts are of ΔW in every group, for the sketch of ΔW itself.
    """

    def __init__(self, device: torch.device, linear: bool = False) -> None:
        self.device = device
        self.linear = linear
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Norms are added up in float64, which Apple's GPUs lack.
        self._exact = torch.float32 if device.type == "mps" else torch.float64
        self.parts: dict[str, list[Part]] = defaultdict(list)
        self.spectrum = torch.zeros(
            DIMENSIONS // 2 + 1, len(SEGMENTS), dtype=torch.complex64, device=device
        )

    def add(self, modules: Iterable[tuple[Place, Delta]]) -> None:
        """Take modules in; matrices of one shape and group are worked on together."""
        low: dict[tuple[str, int, int, int], list[_Factors]] = defaultdict(list)
        for place, delta in modules:
            if type(delta) is LowRank and delta.mid is None:
                b, a, scale = delta.up.flatten(1), delta.down.flatten(1), delta.scale
            else:
                pair = delta.factors(F32)
                if pair is None:
                    self._add_dense(place, delta)
                    continue
                if type(delta) is Kronecker:
                    self._add_batch([(place, *pair, 1.0)], delta.grams(F32))
                    continue
                (b, a), scale = pair, 1.0
            key = (place.group, b.shape[0], a.shape[1], a.shape[0])
            low[key].append((place, b, a, scale))
        for (_, o, n, rank), items in low.items():
            # A stack of one shape stays below 64 MB.
            step = max(1, 16_000_000 // (rank * (o + n)))
            for start in range(0, len(items), step):
                self._add_batch(items[start : start + step])

    def _add_batch(self, items: list[_Factors], grams: tuple[Tensor, Tensor] | None = None) -> None:
        places = [place for place, *_ in items]
        names = tuple(place.name for place in places)
        b, a = self._stack([i[1] for i in items]), self._stack([i[2] for i in items])
        scale = torch.tensor([i[3] for i in items], dtype=F32, device=self.device)
        rank, (o, n) = a.shape[1], (b.shape[1], a.shape[2])
        if grams is None:
            gram_b, gram_a = b.mT @ b, a @ a.mT
        else:
            gram_b, gram_a = (g.to(self.device).unsqueeze(0) for g in grams)
        square = scale.square()
        norms = (gram_b * gram_a).sum((1, 2)).to(self._exact) * square.to(self._exact)
        b *= self._signs("d", names, o).unsqueeze(2)
        a *= self._signs("d'", names, n).unsqueeze(1)
        left = self._side(_columns(fold(b, signs.STRIDE, 1)), "e", names, scale)
        right = self._side(fold(a, signs.STRIDE, 2).flatten(0, 1).T, "f", names)
        self._add_identity(places, left, right)
        if not self._grammed(places[0]):
            self._keep(places, left, right, norms, norms, torch.zeros_like(norms), o)
            return
        columns = left.view(signs.ROWS, len(items), rank).permute(1, 0, 2)
        left = (columns @ gram_a).permute(1, 0, 2).reshape(signs.ROWS, -1)
        right = self._side(_columns(fold(b, signs.GRAM_STRIDE, 1)), "f", names, scale)
        product = (gram_b @ gram_a) * square[:, None, None]
        squares = (product * product.mT).sum((1, 2)).to(self._exact) - norms.square() / o
        self._keep(places, left, right, norms, squares, norms, o)

    def _add_dense(self, place: Place, delta: Delta) -> None:
        name, (o, n) = (place.name,), delta.shape
        grams = self._grammed(place)
        structured = isinstance(delta, Kronecker | KroneckerRows)
        if not grams and (structured or o * n > LARGE):
            norms, grid = self._folded(name, delta)
        else:
            x = delta.dense(F32).to(self.device)
            norms = x.square().sum(dtype=self._exact).reshape(1)
            x = x * self._signs("d", name, o).mT
            x *= self._signs("d'", name, n)
            folded = fold(x, signs.STRIDE, 0)
            grid = fold(folded, signs.STRIDE, 1)
        left = self._side(grid, "e", name)
        right = self._side(torch.eye(grid.shape[1], device=self.device), "f", name)
        self._add_identity([place], left, right)
        if not grams:
            self._keep([place], left, right, norms, norms, torch.zeros_like(norms), o)
            return
        product = folded @ fold(x, signs.GRAM_STRIDE, 0).T
        left = self._side(product, "e", name)
        right = self._side(torch.eye(product.shape[1], device=self.device), "f", name)
        small = x @ x.T if o <= n else x.T @ x
        squares = small.square().sum(dtype=self._exact).reshape(1) - norms.square() / o
        self._keep([place], left, right, norms, squares, norms, o)

    def _folded(self, name: tuple[str], delta: Delta) -> tuple[Tensor, Tensor]:
        """‖ΔW‖² and F·diag(d)·ΔW·diag(d')·F'ᵀ of a ΔW that is never dense as a whole."""
        o, n = delta.shape
        outer, inner = self._signs("d", name, o).mT, self._signs("d'", name, n)
        if isinstance(delta, Kronecker | KroneckerRows):
            norms = torch.full((1,), delta.squared_norm(), dtype=self._exact, device=self.device)
            return norms, _folded_product(delta, outer.flatten(), inner.flatten())
        norms = torch.zeros(1, dtype=self._exact, device=self.device)
        folded = torch.zeros(min(o, signs.STRIDE), n, device=self.device)
        step = max(1, LARGE // (4 * n * signs.STRIDE)) * signs.STRIDE
        for start in range(0, o, step):
            x = delta.rows(start, min(o, start + step)).dense(F32).to(self.device)
            norms += x.square().sum(dtype=self._exact)
            part = fold(x * outer[start : start + step], signs.STRIDE, 0)
            folded[: len(part)] += part
        return norms, fold(folded * inner, signs.STRIDE, 1)

    def _add_identity(self, places: list[Place], left: Tensor, right: Tensor) -> None:
        which = torch.tensor([segment(place) for place in places], device=self.device)
        rows = left.view(2, DIMENSIONS, -1).sum(0), right.view(2, DIMENSIONS, -1).sum(0)
        product = torch.fft.rfft(rows[0], dim=0).mul_(torch.fft.rfft(rows[1], dim=0))
        columns = which.repeat_interleave(left.shape[1] // len(places))
        self.spectrum.index_add_(1, columns, product)

    def _keep(
        self,
        places: list[Place],
        left: Tensor,
        right: Tensor,
        norms: Tensor,
        squares: Tensor,
        traces: Tensor,
        width: int,
    ) -> None:
        sizes = squares.clamp(min=0.0).sqrt()
        part = Part(places, left, right, None, norms.sqrt(), sizes, traces, width)
        if left.shape[1] > RANK * len(places):
            count = len(places)
            sides = (x.view(signs.ROWS, count, -1).permute(1, 0, 2) for x in (left, right))
            one, two = sides
            grids = one @ two.mT
            if self._grammed(places[0]):
                # float16 would drown K₀ in the roundoff of the trace part.
                names = tuple(place.name for place in places)
                e, f = self._signs("e", names, signs.ROWS), self._signs("f", names, signs.ROWS)
                shares = (traces / width).to(F32)[:, None, None]
                grids -= shares * e[:, :, None] * f[:, None] * _trace_grid(width, self.device)
                part.traces = torch.zeros_like(traces)
            grids /= torch.where(sizes > 0, sizes, torch.ones_like(sizes)).to(F32)[:, None, None]
            part.left, part.right, part.grids = None, None, grids.flatten(1).to(torch.float16)
        self.parts[places[0].group].append(part)

    def _signs(self, matrix: str, names: tuple[str, ...], width: int) -> Tensor:
        return _sign_block(matrix, names, width, self.device)

    def _grammed(self, place: Place) -> bool:
        return grammed(place.group) and not self.linear

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        if len({t.dtype for t in tensors}) > 1:
            tensors = [t.to(F32) for t in tensors]
        stacked = torch.stack(tensors)
        if self._copies is None:
            return stacked.to(device=self.device, dtype=F32)
        # On a stream of its own a copy does not wait for the arithmetic that was asked for before.
        with torch.cuda.stream(self._copies):
            moved = stacked.pin_memory().to(self.device, non_blocking=True)
        working = torch.cuda.current_stream(self.device)
        working.wait_stream(self._copies)
        moved.record_stream(working)
        return moved.to(F32)

    def _side(
        self, folded: Tensor, matrix: str, names: tuple[str, ...], scale: Tensor | None = None
    ) -> Tensor:
        """Rotate and mask rows × (modules·rank); returns 256 × (modules·rank)."""
        rows, columns = folded.shape
        padded = torch.empty(signs.ROWS, columns, device=self.device)
        padded[:rows] = folded
        padded[rows:] = 0.0
        mask = self._signs(matrix, names, signs.ROWS)
        if scale is not None:
            mask = mask * scale[:, None]
        rotated = rotate(padded)
        rotated.view(signs.ROWS, len(names), -1).mul_(mask.T.unsqueeze(2))
        return rotated


def _folded_product(delta: Kronecker | KroneckerRows, outer: Tensor, inner: Tensor) -> Tensor:
    """F·diag(d)·ΔW·diag(d')·F'ᵀ of a Kronecker product without the product, STRIDE × STRIDE.

    outer, inner: d, [o], and d', [n]. A row of w1 weighs the c copies of a row of w2, each under
    its own part of the signs.
    """
    whole = delta.whole if isinstance(delta, KroneckerRows) else delta
    first = delta.start if isinstance(delta, KroneckerRows) else 0
    device, stride = inner.device, signs.STRIDE
    w, v = whole.left(F32).to(device), whole.right(F32).to(device)
    (a, c), (b, d) = w.shape, v.shape
    column = torch.arange(c * d, device=device).view(c, d) % stride
    folded = torch.zeros(stride, stride, device=device)
    step = max(1, LARGE // (stride * c))
    for start in range(0, b, step):
        rows = v[start : start + step]
        copies = torch.zeros(c, len(rows), stride, device=device)
        for j, own in enumerate(inner.view(c, d)):
            copies[j].index_add_(1, column[j], rows * own)
        inside = torch.arange(start, start + len(rows), device=device) - first
        for some in torch.arange(a, device=device).split(max(1, LARGE // copies[0].numel())):
            part = (w[some] @ copies.view(c, -1)).view(-1, stride)
            row = (some[:, None] * b + inside).flatten()
            known = (row >= 0) & (row < len(outer))
            if not known.all():
                row, part = row[known], part[known]
            folded.index_add_(0, row % stride, part.mul_(outer[row, None]))
    return folded.mul_(whole.scale)


def _columns(x: Tensor) -> Tensor:
    """modules × rows × rank → rows × (modules·rank)."""
    return x.permute(1, 0, 2).flatten(1)


def trace_part(parts: list[Part], shares: list[Tensor], device: torch.device) -> Tensor:
    """Σ_m w_m·grid_m(I), 256 × 256: what the trace parts of Gram matrices add to a grid.

    shares: per part, one number per module: (tr K_m/o)·its factor.
    """
    total = torch.zeros(signs.ROWS, signs.ROWS, device=device)
    by_width: dict[int, list[tuple[Part, Tensor]]] = defaultdict(list)
    for part, share in zip(parts, shares, strict=True):
        by_width[part.width].append((part, share))
    for width, members in by_width.items():
        names = tuple(place.name for part, _ in members for place in part.places)
        weights = torch.cat([share for _, share in members]).to(F32)
        e = _sign_block("e", names, signs.ROWS, device)
        f = _sign_block("f", names, signs.ROWS, device)
        total += (e.T @ (f * weights[:, None])) * _trace_grid(width, device)
    return total

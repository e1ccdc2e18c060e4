"""Linear sketches of modules: from ΔW to a 256 × 256 grid per group, without building ΔW.

For a module with ΔW = B·A the grid is (e_m∘S·B)·(f_m∘S'·Aᵀ)ᵀ/256 with the sides S of
``signs.py``; since the sign mask is e_m·f_mᵀ, the grids of a whole group add up in one matrix
product over the ranks of all its modules. The Gram matrix K = ΔW·ΔWᵀ has the factors B·(AAᵀ) and
B. What has no factors is dense, one module at a time.

E over the signs of ⟨grid(X), grid(Y)⟩ is Σ_m ⟨X_m, Y_m⟩.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lorafind.formats.adapter import GROUPS, Place
from lorafind.formats.delta import Delta, Kronecker, LowRank
from lorafind.signatures import signs

F32 = torch.float32


@lru_cache(maxsize=65536)
def _sign_row(matrix: str, name: str, width: int) -> Tensor:
    return torch.from_numpy(signs.stream(matrix, name, width))


@lru_cache(maxsize=1024)
def _sign_block(matrix: str, names: tuple[str, ...], width: int, device: torch.device) -> Tensor:
    """Signs of several modules, len(names) × width, float32."""
    rows = torch.stack([_sign_row(matrix, name, width) for name in names])
    return rows.to(device=device, dtype=F32)


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
class Block:
    """What the sketches need of the modules of one group (columns run over all their ranks).

    left, right: S·B and S'·Aᵀ, 256 × Σr float32, masks applied, scale in ``left``; gram_left,
    gram_right: the same for the Gram matrix K (right: on the second stride; left: times AAᵀ),
    None where style does not use it. A dense module's columns are its grid and an identity.
    norms: ‖ΔW‖²; gram_norms: ‖K₀‖²; traces: tr K; float64, one per module; widths: o.
    """

    group: str
    places: list[Place]
    ranks: list[int]
    left: Tensor
    right: Tensor
    gram_ranks: list[int]
    gram_left: Tensor | None
    gram_right: Tensor | None
    norms: Tensor
    gram_norms: Tensor
    traces: Tensor
    widths: list[int]


def _columns(x: Tensor) -> Tensor:
    """modules × rows × rank → rows × (modules·rank)."""
    return x.permute(1, 0, 2).flatten(1)


def grammed(group: str) -> bool:
    """True where style looks at the output side alone: cross-attention and text encoders."""
    return group in ("cross_attn", "text")


#: Place, up, down, scale.
_Factors = tuple[Place, Tensor, Tensor, float]


class Sketcher:
    """Collects modules, a batch at a time, and keeps only 512 numbers per rank of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Norms are added up in float64, which Apple's GPUs lack.
        self._exact = torch.float32 if device.type == "mps" else torch.float64
        self._parts: dict[str, list[Block]] = defaultdict(list)

    def add(self, modules: Iterable[tuple[Place, Delta]]) -> None:
        """Take modules in; matrices of one shape and group are worked on together."""
        low: dict[tuple[str, int, int, int], list[_Factors]] = defaultdict(list)
        for place, delta in modules:
            if type(delta) is LowRank and delta.mid is None:
                b, a, scale = delta.up.flatten(1), delta.down.flatten(1), delta.scale
            else:
                pair = delta.factors(F32)
                if pair is None:
                    self._add_dense(place, delta.dense(F32).to(self.device))
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
        gram_left = gram_right = None
        gram_norms = traces = torch.zeros_like(norms)
        if grammed(places[0].group):
            columns = left.view(signs.ROWS, len(items), rank).permute(1, 0, 2)
            gram_left = (columns @ gram_a).permute(1, 0, 2).reshape(signs.ROWS, -1)
            second = fold(b, signs.GRAM_STRIDE, 1)
            gram_right = self._side(_columns(second), "f", names, scale)
            product = (gram_b @ gram_a) * square[:, None, None]
            gram_norms = (product * product.mT).sum((1, 2)).to(self._exact) - norms.square() / o
            traces = norms
        ranks = [rank] * len(items)
        gram_ranks = ranks if gram_left is not None else []
        self._keep(
            places,
            ranks,
            left,
            right,
            gram_ranks,
            gram_left,
            gram_right,
            norms,
            gram_norms,
            traces,
            o,
        )

    def _add_dense(self, place: Place, x: Tensor) -> None:
        name, (o, n) = (place.name,), x.shape
        norms = x.square().sum(dtype=self._exact).reshape(1)
        x = x * self._signs("d", name, o).mT
        x *= self._signs("d'", name, n)
        folded = fold(x, signs.STRIDE, 0)
        grid = fold(folded, signs.STRIDE, 1)
        left = self._side(grid, "e", name)
        right = self._side(self._eye(grid.shape[1]), "f", name)
        gram_left = gram_right = None
        gram_norms = traces = torch.zeros_like(norms)
        grams = []
        if grammed(place.group):
            product = folded @ fold(x, signs.GRAM_STRIDE, 0).T
            gram_left = self._side(product, "e", name)
            gram_right = self._side(self._eye(product.shape[1]), "f", name)
            small = x @ x.T if o <= n else x.T @ x
            gram_norms = small.square().sum(dtype=self._exact).reshape(1) - norms.square() / o
            traces, grams = norms, [product.shape[1]]
        ranks = [grid.shape[1]]
        self._keep(
            [place], ranks, left, right, grams, gram_left, gram_right, norms, gram_norms, traces, o
        )

    def _keep(
        self,
        places: list[Place],
        ranks: list[int],
        left: Tensor,
        right: Tensor,
        gram_ranks: list[int],
        gram_left: Tensor | None,
        gram_right: Tensor | None,
        norms: Tensor,
        gram_norms: Tensor,
        traces: Tensor,
        width: int,
    ) -> None:
        group = places[0].group
        self._parts[group].append(
            Block(
                group,
                places,
                ranks,
                left,
                right,
                gram_ranks,
                gram_left,
                gram_right,
                norms,
                gram_norms.clamp(min=0.0),
                traces,
                [width] * len(places),
            )
        )

    def _signs(self, matrix: str, names: tuple[str, ...], width: int) -> Tensor:
        return _sign_block(matrix, names, width, self.device)

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(device=self.device, dtype=F32, non_blocking=True)

    def _eye(self, size: int) -> Tensor:
        return torch.eye(size, device=self.device)

    def _side(
        self, folded: Tensor, matrix: str, names: tuple[str, ...], scale: Tensor | None = None
    ) -> Tensor:
        """Rotate and mask rows × (modules·rank); returns 256 × (modules·rank)."""
        rows, columns = folded.shape
        padded = torch.zeros(signs.ROWS, columns, device=self.device)
        padded[:rows] = folded
        mask = self._signs(matrix, names, signs.ROWS)
        if scale is not None:
            mask = mask * scale[:, None]
        rotated = rotate(padded)
        rotated.view(signs.ROWS, len(names), -1).mul_(mask.T.unsqueeze(2))
        return rotated

    def blocks(self) -> list[Block]:
        """Everything that was added, one block per group. The Sketcher is empty afterwards."""
        parts, self._parts = self._parts, defaultdict(list)
        return [_join(parts[group]) for group in GROUPS if group in parts]


def _join(parts: list[Block]) -> Block:
    def together(pick: Callable[[Block], Tensor | None]) -> Tensor | None:
        found = [x for part in parts if (x := pick(part)) is not None]
        return torch.cat(found, -1) if found else None

    left, right = together(lambda p: p.left), together(lambda p: p.right)
    norms, gram_norms = together(lambda p: p.norms), together(lambda p: p.gram_norms)
    traces = together(lambda p: p.traces)
    assert left is not None and right is not None
    assert norms is not None and gram_norms is not None and traces is not None
    return Block(
        parts[0].group,
        [place for part in parts for place in part.places],
        [rank for part in parts for rank in part.ranks],
        left,
        right,
        [rank for part in parts for rank in part.gram_ranks],
        together(lambda p: p.gram_left),
        together(lambda p: p.gram_right),
        norms,
        gram_norms,
        traces,
        [width for part in parts for width in part.widths],
    )


def trace_part(
    places: list[Place], weights: Tensor, widths: list[int], device: torch.device
) -> Tensor:
    """Σ_m w_m·grid_m(I), 256 × 256: what the trace parts of Gram matrices add to a grid.

    weights: one number per module, (tr K_m/o)·its vote.
    """
    total = torch.zeros(signs.ROWS, signs.ROWS, device=device)
    for width in sorted(set(widths)):
        picked = [i for i, w in enumerate(widths) if w == width]
        names = tuple(places[i].name for i in picked)
        e = _sign_block("e", names, signs.ROWS, device)
        f = _sign_block("f", names, signs.ROWS, device)
        mixed = e.T @ (f * weights[picked].to(F32)[:, None])
        total += mixed * _trace_grid(width, device)
    return total

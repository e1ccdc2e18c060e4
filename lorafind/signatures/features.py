"""The two features of an adapter and their signatures: identity (for copies) and style.

identity: ΔW as it is, one sketch of DIMENSIONS numbers per segment (group × half of the depth;
text encoders one each). style: every module at unit Frobenius norm, one sketch of STYLE numbers
per group; ΔW itself, but for cross-attention and text encoders the traceless output-side Gram
K₀ = K − (tr K/o)·I with K = ΔW·ΔWᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafind.formats.adapter import GROUPS, Place
from lorafind.signatures import signs
from lorafind.signatures.constants import DIMENSIONS, FAINT, SEGMENTS, STYLE
from lorafind.signatures.sketch import Part, Sketcher, grammed, segment, trace_part


@dataclass
class Signature:
    """What the index keeps of one adapter.

    identity: 11 × 128 float32, each segment divided by its exact norm (zero where absent).
    segment_norms: float64, ‖ΔW‖ per segment, exact.
    style: group → 32,768 float32 (before quantisation), Σ over modules of vote · unit feature.
    votes: group → Σ vote² (exact squared norm were the modules orthogonal: their number).
    norms: float64 ‖ΔW_m‖² per module, in the order of ``places``.
    """

    places: list[Place]
    norms: np.ndarray
    identity: np.ndarray
    segment_norms: np.ndarray
    style: dict[str, np.ndarray]
    votes: dict[str, float]

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all modules."""
        return float(np.sqrt(self.norms.sum()))


def identity_sketch(sketcher: Sketcher) -> tuple[np.ndarray, np.ndarray]:
    """Identity sketches (11 × 128, each over its exact norm) and the norms per segment."""
    squares = np.zeros(len(SEGMENTS))
    for parts in sketcher.parts.values():
        for part in parts:
            which = [segment(place) for place in part.places]
            np.add.at(squares, which, part.norms.double().square().cpu().numpy())
    sketch = torch.fft.irfft(sketcher.spectrum, n=DIMENSIONS, dim=0).T.cpu().numpy()
    exact = np.sqrt(squares)
    # Numbers beyond float32 are told from the norms, later.
    with np.errstate(over="ignore", invalid="ignore"):
        return sketch / np.where(exact > 0, exact, 1.0).astype(np.float32)[:, None], exact


def votes(norms: Tensor) -> Tensor:
    """min(1, ‖ΔW_m‖ / (0.01 · median of the group)) of the modules of one group."""
    return (norms / (FAINT * norms.median())).clamp(max=1.0)


def style_sketch(group: str, parts: list[Part]) -> tuple[np.ndarray, float] | None:
    """Style sketch (32,768 float32) of one group and Σ vote²; None where no matrix has a vote."""
    norms = torch.cat([part.norms for part in parts])
    sizes = torch.cat([part.sizes for part in parts])
    device = norms.device
    vector = torch.tensor([p.vector for part in parts for p in part.places], device=device)
    counted = (norms > 0) & (sizes > 0) & ~vector
    if not bool(counted.any()):
        return None
    vote = torch.zeros_like(sizes)
    vote[counted] = votes(norms[counted])
    factor = torch.where(counted, vote / sizes, torch.zeros_like(sizes))
    factors = list(factor.split([len(part.places) for part in parts]))
    grid = torch.zeros(signs.ROWS, signs.ROWS, device=device)
    for part, own in zip(parts, factors, strict=True):
        part.add_to(grid, own)
    if grammed(group):
        shares = [part.traces / part.width * own for part, own in zip(parts, factors, strict=True)]
        grid -= trace_part(parts, shares, device)
    return _folded(grid), float(vote.square().sum())


def delta_sketch(parts: list[Part]) -> tuple[np.ndarray, float]:
    """Sketch of ΔW itself (32,768 float32) of one group, and ‖ΔW‖².

    parts: of a linear Sketcher; E⟨sketch(X), sketch(Y)⟩ = Σ_m ⟨X_m, Y_m⟩.
    """
    grid = torch.zeros(signs.ROWS, signs.ROWS, device=parts[0].norms.device)
    for part in parts:
        part.add_to(grid, torch.ones_like(part.sizes))
    return _folded(grid), sum(float(part.norms.square().sum()) for part in parts)


def _folded(grid: Tensor) -> np.ndarray:
    half = signs.ROWS // 2
    # Shifted by a column, two cells that meet share neither row nor column, so that a module of
    # rank 1 is folded as well as any.
    folded = grid[:half] + grid[half:].roll(1, 1)
    return folded.reshape(STYLE).cpu().numpy()


def signature(sketcher: Sketcher) -> Signature:
    """The signature of the adapter whose modules a Sketcher has collected (at least one).

    Of a linear Sketcher ``style`` holds the sketches of ΔW itself and ``votes`` ‖ΔW‖² per group.
    """
    identity, segment_norms = identity_sketch(sketcher)
    styles = {
        group: found
        for group in GROUPS
        if (parts := sketcher.parts.get(group))
        and (found := delta_sketch(parts) if sketcher.linear else style_sketch(group, parts))
    }
    everything = [part for parts in sketcher.parts.values() for part in parts]
    return Signature(
        [place for part in everything for place in part.places],
        np.concatenate([part.norms.double().square().cpu().numpy() for part in everything]),
        identity,
        segment_norms,
        {group: sketch for group, (sketch, _) in styles.items()},
        {group: total for group, (_, total) in styles.items()},
    )

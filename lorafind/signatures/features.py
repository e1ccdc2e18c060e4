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

from lorafind.formats.adapter import Place
from lorafind.signatures import signs
from lorafind.signatures.constants import DIMENSIONS, FAINT, SEGMENTS, STYLE
from lorafind.signatures.sketch import Block, grammed, trace_part

_FAMILY = {"self_attn": 0, "cross_attn": 2, "ff": 4, "conv": 6, "other": 6}


def segment(place: Place) -> int:
    """Index into SEGMENTS of a module."""
    if place.group == "text":
        return {"te1": 8, "te2": 9}.get(place.component, 10)
    return _FAMILY[place.group] + int(place.late)


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


def identity_sketch(blocks: list[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Identity sketches (11 × 128, each over its exact norm) and the norms per segment.

    The grid of a module, folded along a + b modulo 128, is a circular convolution of its two
    sides (a tensor sketch); in the Fourier domain that is a product, summed over ranks.
    """
    device = blocks[0].left.device
    norms = torch.zeros(len(SEGMENTS), dtype=blocks[0].norms.dtype, device=device)
    spectrum = torch.zeros(DIMENSIONS // 2 + 1, len(SEGMENTS), dtype=torch.complex64, device=device)
    for block in blocks:
        which = torch.tensor([segment(place) for place in block.places], device=device)
        norms.index_add_(0, which, block.norms)
        left, right = (
            torch.fft.rfft(side.view(2, DIMENSIONS, -1).sum(0), dim=0)
            for side in (block.left, block.right)
        )
        columns = which.repeat_interleave(torch.tensor(block.ranks, device=device))
        spectrum.index_add_(1, columns, left.mul_(right))
    sketch = torch.fft.irfft(spectrum, n=DIMENSIONS, dim=0).T
    exact = norms.sqrt()
    divisor = torch.where(exact > 0, exact, torch.ones_like(exact))
    sketch = sketch / divisor.to(sketch.dtype)[:, None]
    return sketch.cpu().numpy(), exact.cpu().double().numpy()


def votes(norms: Tensor) -> Tensor:
    """min(1, ‖ΔW_m‖ / (0.01 · median of the group)) of one group; norms are squared."""
    size = norms.sqrt()
    return (size / (FAINT * size.median())).clamp(max=1.0)


def style_sketch(block: Block) -> tuple[np.ndarray, float] | None:
    """Style sketch (32,768 float32) of one group and Σ vote²; None where no matrix has a vote."""
    gram = grammed(block.group)
    sizes = block.gram_norms if gram else block.norms
    vector = torch.tensor([p.vector for p in block.places], device=sizes.device)
    counted = (block.norms > 0) & (sizes > 0) & ~vector
    if not bool(counted.any()):
        return None
    vote = torch.zeros_like(sizes)
    vote[counted] = votes(block.norms[counted])
    factor = torch.where(counted, vote / sizes.sqrt(), torch.zeros_like(sizes))
    left, right, ranks = block.left, block.right, block.ranks
    if gram:
        assert block.gram_left is not None and block.gram_right is not None
        left, right, ranks = block.gram_left, block.gram_right, block.gram_ranks
    wide = factor.to(left.dtype).repeat_interleave(torch.tensor(ranks, device=left.device))
    grid = (left * wide) @ right.T
    if gram:
        share = block.traces * factor / torch.tensor(block.widths, device=left.device)
        grid -= trace_part(block.places, share, block.widths, left.device)
    half = signs.ROWS // 2
    # Shifted by a column, two cells that meet share neither row nor column, so that a module of
    # rank 1 is folded as well as any.
    folded = grid[:half] + grid[half:].roll(1, 1)
    return folded.reshape(STYLE).cpu().numpy(), float(vote.square().sum())


def signature(blocks: list[Block]) -> Signature:
    """The signature of the adapter whose modules a Sketcher has collected (at least one)."""
    identity, segment_norms = identity_sketch(blocks)
    styles = {b.group: found for b in blocks if (found := style_sketch(b)) is not None}
    return Signature(
        [place for block in blocks for place in block.places],
        np.concatenate([block.norms.cpu().double().numpy() for block in blocks]),
        identity,
        segment_norms,
        {group: sketch for group, (sketch, _) in styles.items()},
        {group: total for group, (_, total) in styles.items()},
    )

"""The signature is frozen: another number here means another SIGNATURE_VERSION."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorafind.formats.adapter import Place
from lorafind.formats.delta import LowRank
from lorafind.signatures import signs
from lorafind.signatures.constants import SIGNATURE_VERSION
from lorafind.signatures.features import signature
from lorafind.signatures.sketch import Sketcher

PLACES = (
    Place("unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "self_attn", True),
    Place("unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "cross_attn", True),
    Place("unet/down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "ff", False),
)


def made() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    sketcher = Sketcher(torch.device("cpu"))
    for k, place in enumerate(PLACES):
        o, n = 600 + 10 * k, 700 - 10 * k
        # Exact in every dtype, and the same on every machine.
        up = torch.arange(o * 2).view(o, 2).remainder(7) - 3.0
        down = torch.arange(n * 2).view(2, n).remainder(5) - 2.0
        sketcher.add([(place, LowRank(up, down, 0.5))])
    found = signature(sketcher)
    return found.identity, found.style


def test_signs_are_frozen() -> None:
    assert signs.stream("d", "unet/x", 16).tolist() == GOLDEN_SIGNS
    longer = signs.stream("d", "unet/x", 5000)
    assert longer[:16].tolist() == GOLDEN_SIGNS


def test_sketches_are_frozen() -> None:
    assert SIGNATURE_VERSION == 1
    identity, style = made()
    for segment, numbers in GOLDEN_IDENTITY.items():
        assert identity[segment, :4].tolist() == pytest.approx(numbers, abs=1e-5)
    for group, numbers in GOLDEN_STYLE.items():
        assert style[group][:4].tolist() == pytest.approx(numbers, abs=1e-6)


GOLDEN_SIGNS = [-1, -1, 1, -1, -1, -1, -1, -1, -1, 1, 1, -1, -1, 1, -1, -1]
GOLDEN_IDENTITY = {
    1: [-0.0705082, -0.1494523, 0.0736151, 0.0503784],
    3: [-0.0205253, 0.1107594, 0.0871144, 0.0409969],
    4: [-0.1075106, 0.0778822, 0.0929548, -0.1455474],
}
GOLDEN_STYLE = {
    "self_attn": [-0.001386215, -0.003888955, 0.00154803, -0.000782106],
    "cross_attn": [0.003961912, 0.004470686, -0.004430504, 0.006248799],
    "ff": [0.003038742, 0.005461123, 0.012895141, 0.001219265],
}

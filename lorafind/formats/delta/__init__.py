"""The forms in which a file writes one module's ΔW, and exact access to it.

Every form is a small frozen object over the stored tensors (their stored dtype, never
copied). ΔW is out × in (o × n); a convolution is flattened to o × i·kh·kw.
Formulas: FORMATS of LyCORIS, kohya-ss/sd-scripts, PEFT and ComfyUI; see each class.
"""

from __future__ import annotations

from lorafind.formats.delta.base import F64, ROUNDING, Delta, Rounding
from lorafind.formats.delta.diagonal import Diagonal
from lorafind.formats.delta.full import Full, Value
from lorafind.formats.delta.hadamard import Hadamard
from lorafind.formats.delta.kronecker import Kronecker, KroneckerRows
from lorafind.formats.delta.lowrank import LowRank
from lorafind.formats.delta.rotation import Gain, Skew
from lorafind.formats.delta.sparse import Residual

__all__ = [
    "F64",
    "ROUNDING",
    "Delta",
    "Diagonal",
    "Full",
    "Gain",
    "Hadamard",
    "Kronecker",
    "KroneckerRows",
    "LowRank",
    "Residual",
    "Rounding",
    "Skew",
    "Value",
]

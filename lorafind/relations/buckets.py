"""Which pairs may hold one ΔW up to rounding (``file``, ``tensors``, ``weights``), without
comparing all with all.

Two adapters that :func:`lorafind.relations.verify.prove` calls ``weights`` differ by little. Every
module that passes by rounding has ‖X_m − Y_m‖² ≤ 12·(T_m(X)² + T_m(Y)²) + 1e-11·‖X_m‖² (12 is the
most that chance is granted there), the T² of all modules together stay below 0.5 % squared of
‖X‖², what passes by bits is equal, and no module is left over. So

    ‖X − Y‖ ≤ REACH·‖X‖,   REACH = √(12·0.005² + 1e-11) = 0.0173

and ``file`` and ``tensors`` are the same ΔW. From this follow, x = X/‖X‖ and y = Y/‖Y‖ being less
than arcsin(REACH) apart:

- |log ‖X‖ − log ‖Y‖| ≤ −log(1 − REACH), without exception;
- Σ_m (‖x_m‖ − ‖y_m‖)² ≤ arcsin(REACH)², without exception: the norms of single modules;
- the projections ⟨g, sketch(x)⟩ and ⟨g, sketch(y)⟩ of the identity sketches on a vector g of random
  signs are less than SIGMAS·arcsin(REACH)/√d apart, d numbers in a sketch. The sketch is linear and
  each of its numbers a sum with random signs (the masks E_m), so that by Hoeffding's inequality the
  difference exceeds t standard deviations with a probability below 2·exp(−t²/2). The deviation
  itself, drawn with L and R, is above √2 times its mean only in thin adapters (one module, rank 1)
  and then once in 1e5; both together make a miss at SIGMAS = 10 rarer than 1e-15.

Norm and projections, each in units of its tolerance, are the coordinates of a point: LoRAs that
hold one ΔW are within 1 in every coordinate. A search tree finds these; the norms of the modules
then sort out what is only near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lorafind.signatures.constants import DIMENSIONS, SEGMENTS

#: The grades that mean one ΔW.
COPIES = ("file", "tensors", "weights")
#: The bound of ‖X − Y‖/‖X‖ for pairs that are proved to hold one ΔW.
REACH = math.sqrt(12.0 * 0.005**2 + 1e-11)
#: What is added for norms that the signature took in single precision.
NORM_ERROR = 1e-3
SIGMAS = 10.0
PROJECTIONS = 8
_NUMBERS = len(SEGMENTS) * DIMENSIONS
#: Spread of a projection by float16, 2⁻¹¹/√3 per number; both sides.
_HALF = 2.0**-11 / math.sqrt(3.0) / math.sqrt(_NUMBERS)

APART = math.asin(REACH + NORM_ERROR)
#: Units of the coordinates.
LOG_NORM = -math.log1p(-(REACH + NORM_ERROR))
PROJECTION = SIGMAS * (APART / math.sqrt(_NUMBERS) + math.sqrt(2.0) * _HALF)
_BLOCK = 512


def points(record: np.ndarray) -> np.ndarray:
    """n × 9 float64 coordinates of n identity records (``constants.IDENTITY``).

    Of two LoRAs that hold one ΔW, none differs by more than 1.
    """
    norms = record["norms"]
    total = np.sqrt((norms**2).sum(1))
    share = np.divide(norms, total[:, None], out=np.zeros_like(norms), where=total[:, None] > 0)
    unit = record["sketch"].astype(np.float32)
    unit *= share.astype(np.float32)[:, :, None]
    found = np.empty((len(record), 1 + PROJECTIONS))
    found[:, 0] = np.log(np.maximum(total, 1e-300)) / LOG_NORM
    found[:, 1:] = unit.reshape(len(record), -1) @ _signs() / PROJECTION
    return found


def _signs() -> np.ndarray:
    """_NUMBERS × PROJECTIONS float32: the g, of length 1; the same at every run."""
    signs = np.random.default_rng(20).integers(0, 2, (_NUMBERS, PROJECTIONS)) * 2 - 1
    return (signs / math.sqrt(_NUMBERS)).astype(np.float32)


class Near:
    """A search tree over the points of n LoRAs; some 150 bytes each.

    order: the n positions, such that neighbours stand together; asked in it, the tree answers
    faster.
    """

    def __init__(self, where: np.ndarray) -> None:
        from scipy.spatial import cKDTree

        # A tree of middles of boxes: many equal points would make one of medians deep.
        self._tree = cKDTree(where, leafsize=32, balanced_tree=False, compact_nodes=False)
        self.order: np.ndarray = self._tree.indices

    def around(self, which: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(position, positions within 1 of it in every coordinate, itself too)."""
        for start in range(0, len(which), _BLOCK):
            block = which[start : start + _BLOCK]
            found = self._tree.query_ball_point(
                self._tree.data[block], 1.0, p=np.inf, workers=-1, return_sorted=False
            )
            for position, near in zip(block.tolist(), found, strict=True):
                yield position, np.array(near, np.int64)


def possible(
    x: np.ndarray, y: np.ndarray, names: tuple[Sequence[str], Sequence[str]] | None = None
) -> bool:
    """False where the norms of the modules rule out that two LoRAs hold one ΔW.

    x, y: ‖ΔW_m‖² in the order of the layouts; names: of their modules where the layouts differ.
    """
    if names is not None:
        columns = {name: k for k, name in enumerate(dict.fromkeys([*names[0], *names[1]]))}
        wide = np.zeros((2, len(columns)))
        for row, own, norms in zip(wide, names, (x, y), strict=True):
            row[[columns[name] for name in own]] = norms
        x, y = wide
    a, b = np.sqrt(x.astype(np.float64)), np.sqrt(y.astype(np.float64))
    one, two = np.linalg.norm(a), np.linalg.norm(b)
    return bool(np.linalg.norm(a / one - b / two) <= APART) if one and two else False

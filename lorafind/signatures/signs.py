"""The fixed random signs of the signatures, the same everywhere and for ever.

Every sign is a bit of SHAKE-128 over ``lorafind/<matrix>/v1/<name>``; a stream is a prefix of
every longer one, so that a layer of width w uses the first w signs and a wider layer next year
changes nothing.

A side of a module of width w is taken to ROWS = 256 numbers by the matrix S = H·F·diag(d_m):
d_m are the signs of the module, F adds up the coordinates that are equal modulo a prime STRIDE
below 256 (a count sketch; the prime keeps the equal positions of attention heads, whose widths
are 40, 64, 80, 128 …, apart), and H is the 256 × 256 Hadamard matrix, which spreads each of the
sums over all rows. Then Sᵀ·S/256 = I + C, where C has ±1 where two coordinates share a sum and 0
elsewhere: up to STRIDE wide the sketch is an isometry, and beyond it the relative variance of a
squared norm is 2·Σ u_i²·u_j² over the pairs that share a sum, about 2/251 − 2/w for a spread
vector u, never more on average than the 2/256 of dense signs, at a hundredth of the work.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

VERSION = 1
ROWS = 256
#: Moduli of the left side, the right side, and the right side of a square Gram matrix. Left and
#: right of a Gram matrix share their signs d_m; with two primes no pair of coordinates closer
#: than 251·241 shares a sum on both sides, which keeps its sketch unbiased.
STRIDE = 251
GRAM_STRIDE = 241


def stream(matrix: str, name: str, count: int) -> np.ndarray:
    """The first ``count`` signs of a stream: int8, +1 or −1."""
    digest = np.frombuffer(_bits(matrix, name, (count + 7) // 8), np.uint8)
    bits = np.unpackbits(digest, count=count, bitorder="little")
    return (bits.astype(np.int8) << 1) - 1


@lru_cache(maxsize=8192)
def _bits(matrix: str, name: str, size: int) -> bytes:
    """The signs as bits, for layouts that come again: an eighth of the memory."""
    return hashlib.shake_128(f"lorafind/{matrix}/v{VERSION}/{name}".encode()).digest(size)


@lru_cache(maxsize=1)
def hadamard() -> np.ndarray:
    """The 256 × 256 Hadamard matrix in Sylvester's order, float32, entries ±1."""
    h = np.ones((1, 1), np.float32)
    while h.shape[0] < ROWS:
        h = np.block([[h, h], [h, -h]])
    return h


@lru_cache(maxsize=256)
def trace_grid(width: int) -> np.ndarray:
    """H·F₂₅₁·F₂₄₁ᵀ·Hᵀ / ROWS: what a unit trace part (I) of a Gram matrix adds to its grid."""
    counts = np.zeros((ROWS, ROWS), np.float32)
    index = np.arange(width)
    np.add.at(counts, (index % STRIDE, index % GRAM_STRIDE), 1.0)
    h = hadamard()
    return (h @ counts @ h.T) / ROWS

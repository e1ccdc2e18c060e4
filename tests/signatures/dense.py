"""The sketches of DESIGN 4 once more, dense and in float64, written from the formulas alone."""

from __future__ import annotations

import hashlib

import numpy as np


def sign_bits(matrix: str, name: str, count: int) -> np.ndarray:
    """Signs ±1 from the bits of SHAKE-128, least significant bit of each byte first."""
    raw = hashlib.shake_128(f"lorafind/{matrix}/v1/{name}".encode()).digest(-(-count // 8))
    return np.array([1.0 if raw[i // 8] >> (i % 8) & 1 else -1.0 for i in range(count)])


def walsh() -> np.ndarray:
    """Sylvester's Hadamard matrix of order 256: (−1)^popcount(i & j)."""
    i = np.arange(256)
    return np.array([[(-1.0) ** bin(a & b).count("1") for b in i] for a in i])


def side(name: str, matrix: str, width: int, stride: int) -> np.ndarray:
    """S = H·F·diag(d) / 16, 256 × width."""
    folded = np.zeros((256, width))
    folded[np.arange(width) % stride, np.arange(width)] = sign_bits(matrix, name, width)
    return walsh() @ folded / 16.0


def mask(name: str) -> np.ndarray:
    """e_m·f_mᵀ."""
    return np.outer(sign_bits("e", name, 256), sign_bits("f", name, 256))


def grid(name: str, x: np.ndarray) -> np.ndarray:
    """Grid of ΔW."""
    left, right = side(name, "d", x.shape[0], 251), side(name, "d'", x.shape[1], 251)
    return mask(name) * (left @ x @ right.T)


def gram_grid(name: str, x: np.ndarray) -> np.ndarray:
    """Grid of K₀ = K − (tr K/o)·I, not normalised."""
    k = x @ x.T
    k -= np.eye(len(k)) * np.trace(k) / len(k)
    return mask(name) * (side(name, "d", len(k), 251) @ k @ side(name, "d", len(k), 241).T)


def identity_fold(g: np.ndarray) -> np.ndarray:
    """Cells with equal a + b modulo 128 added up."""
    out = np.zeros(128)
    for a in range(256):
        for b in range(256):
            out[(a + b) % 128] += g[a, b]
    return out


def style_fold(g: np.ndarray) -> np.ndarray:
    """Upper half and lower half, this one shifted by a column, added up."""
    return (g[:128] + np.roll(g[128:], 1, axis=1)).ravel()

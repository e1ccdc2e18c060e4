"""Small basis files, for tests of what is done with them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lorafind.bases import file
from lorafind.signatures.constants import SIGNATURE_VERSION

GROUPS = ("self_attn", "ff")


def write_basis(path: Path, width: int = 64, seed: int = 0, **changed: Any) -> Path:
    """A calibrated basis of three components over two groups of ``width`` numbers.

    changed: facts that differ.
    """
    rng = np.random.default_rng(seed)
    k = 3
    axes = np.linalg.qr(rng.normal(size=(len(GROUPS) * width, k)))[0].T.astype(np.float16)
    facts = {
        "format": file.FORMAT,
        "id": f"{seed:08x}",
        "name": "wild",
        "feature": "style",
        "groups": list(GROUPS),
        "weights": dict.fromkeys(GROUPS, 1.0),
        "architecture": "sd1",
        "base_model": "someone/sd1",
        "signature_version": SIGNATURE_VERSION,
        "components": k,
        "computed": 5,
        "loras": 40,
        "artists": 20,
        "calibration": "scale and offset",
        "metric": "euclidean",
        "distance": 1.0,
        "rank": None,
        "layouts": ["d" * 64],
        "explained_variance": [0.4, 0.3, 0.1, 0.05, 0.05],
        "scales": [1.0, 1.25, 1.5],
        "evaluation": [
            {
                "split": "test (same)",
                "queries": 100,
                "metric": "mAP over the whole ranking, %",
                "plain": 72.25,
                "uncalibrated": 80.0,
                "cosine": 81.0,
                "calibrated": 88.5,
            }
        ],
        "licence": "mit",
        "data": "Forty LoRAs of twenty fonts.",
        "made": "2026-01-02",
        "seen": 40,
        **changed,
    }
    arrays: dict[str, np.ndarray] = {
        "scale": np.array([1.0, 1.25, 1.5]),
        "offset": np.array([0.0, 0.1, -0.1]),
        "eigenvalues": np.array([0.4, 0.3, 0.1, 0.05, 0.05]),
        "contents": file.contents([f"{i:064x}" for i in range(40)]),
        "test": np.zeros(k),
    }
    for group, part in zip(GROUPS, np.split(axes, len(GROUPS), 1), strict=True):
        arrays[f"components/{group}"] = part
        arrays[f"gram/{group}"] = part.astype(np.float64) @ part.T.astype(np.float64)
        arrays[f"mean/{group}"] = rng.normal(size=width).astype(np.float32)
        arrays[f"centres/{group}"] = rng.normal(size=(2, k)).astype(np.float32)
    writer = file.Writer(path, {n: (a.dtype.type, a.shape) for n, a in arrays.items()}, facts)
    for name, array in arrays.items():
        writer.write(name, array)
    writer.write("test", file.test_coordinates(file.load(writer.part)))
    writer.commit()
    return path


def spoiled(data: bytes) -> bytes:
    """A basis file with another number in its stored test vector."""
    size = int.from_bytes(data[:8], "little")
    start = 8 + size + json.loads(data[8 : 8 + size])["test"]["data_offsets"][0]
    return data[:start] + struct.pack("<d", 100.0) + data[start + 8 :]

"""Rows to fill an index with."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from lorafind.files.scan import Found
from lorafind.index.rows import FileFacts, Known, LoraFacts, Module, StoredSignature
from lorafind.index.store import Store

MODULES = [
    Module("unet/down_blocks.0.attentions.0.proj_in", "other", 320, 320, False, False),
    Module("te1/text_model.encoder.layers.0.mlp.fc1", "text", 3072, 768, False, True),
]
#: Long past, so that no row counts as read within two seconds of its mtime.
OLD = 1_600_000_000_000_000_000


def lora(store: Store, content: str, **changes: Any) -> int:
    """Put a LoRA of two modules."""
    layout = store.put_layout("sd1", MODULES)
    row: dict[str, Any] = {
        "content": content,
        "data_sha256": "d" + content,
        "architecture": "sd1",
        "family": "lora",
        "spelling": "kohya",
        "ranks": [16],
        "alphas": [8.0],
        "dtype": "F16",
        "effective_dtype": "F16",
        "layout": layout,
        "norm": 5.0,
        "norms": np.array([9.0, 16.0]),
        "version": 1,
    }
    return store.put_lora(LoraFacts(**(row | changes)))


def signature(seed: int, groups: int = 0b000101) -> StoredSignature:
    random = np.random.default_rng(seed)
    count = groups.bit_count()
    return StoredSignature(
        1,
        groups,
        random.random(count).astype("f4"),
        random.random(count),
        random.integers(-127, 128, (count, 32_768)).astype("i1"),
    )


def found(path: bytes, root: bytes = b"/r", **changes: Any) -> Found:
    """A found file with an inode of its own."""
    inode = int.from_bytes(hashlib.sha256(root + path).digest()[:7], "big")
    return Found(root, path, 1000, OLD, OLD, 1, inode)._replace(**changes)


def facts(sha: str | None = "s", **changes: Any) -> FileFacts:
    """The facts of a file that was read long after it was written."""
    row: dict[str, Any] = {
        "status": "lora",
        "version": 1,
        "read_ns": OLD + 10**12,
        "sha256": sha,
        "probe": (sha or "").encode(),
    }
    return FileFacts(**(row | changes))


def known(item: Found, number: int, sha: str = "s", **changes: Any) -> Known:
    """The row that reading ``item`` would have left."""
    row = Known(
        number,
        *item[:8],
        sha.encode(),
        "lora",
        "",
        sha,
        number,
        1,
        OLD + 10**12,
        "here",
    )
    return row._replace(**changes)

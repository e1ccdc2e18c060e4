"""Indexes of a few rows, in which everything differs that can."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorafind.demo.make import make as make_demo
from lorafind.index.rows import Relation, StoredSignature
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.relations.grades import Relation as Proof
from lorafind.relations.grades import Step
from lorafind.signatures.constants import IDENTITY, SIGNATURE_VERSION, STYLE, VERSION
from tests.index.make import OLD, facts, found, lora


def collection(folder: Path) -> None:
    """The demo's files, written long ago, so that no index reads them again to be sure."""
    make_demo(folder)
    for path in folder.rglob("*"):
        os.utime(path, ns=(OLD, OLD))


def content(name: str) -> str:
    """The digest that stands for a LoRA's name."""
    return hashlib.sha256(name.encode()).hexdigest()


def put_lora(store: Store, name: str, version: int = VERSION, **changes: Any) -> int:
    """A LoRA with signature and identity record, which follow from name and version."""
    seed = int(content(f"{name} {version}")[:8], 16)
    rng = np.random.default_rng(seed)
    number = lora(store, content(name), version=version, **changes)
    groups = 1 + seed % 7
    count = groups.bit_count()
    style = rng.integers(-127, 128, (count, STYLE)).astype("i1")
    signature = StoredSignature(
        SIGNATURE_VERSION, groups, rng.random(count, "f4"), rng.random(count), style
    )
    store.put_signature(number, signature)
    record = np.zeros((), IDENTITY)
    record["norms"], record["sketch"] = rng.random(11), rng.standard_normal((11, 128))
    store.chunks.append("identity", "sd", number, record)
    return number


def put_file(
    store: Store, root: bytes, path: str, name: str | None, read: int, **more: Any
) -> None:
    """A file that holds the LoRA of a name, or none; ``read``: seconds."""
    item = found(path.encode(), root, size=1000 + len(name or ""))
    number = None if name is None else store.find_lora(content(name))
    assert name is None or number is not None
    row = facts(
        content("file " + (name or path)),
        version=VERSION,
        read_ns=read * 10**9,
        status="zero" if name is None else "lora",
        reason="ΔW is zero everywhere" if name is None else "",
        lora_id=number[0] if number else None,
    )
    store.put_file(item, row)
    for key, value in more.items():
        store.conn.execute(
            f"UPDATE files SET {key} = ? WHERE root = ? AND path = ?",
            (value, root_id(store, root), path.encode()),
        )


def root_id(store: Store, path: bytes, seen: int | None = None) -> int:
    """A root, which is added where it is new; ``seen``: seconds."""
    store.conn.execute(
        "INSERT INTO roots (path, single) VALUES (?, 0) ON CONFLICT (path) DO NOTHING", (path,)
    )
    if seen is not None:
        store.conn.execute("UPDATE roots SET seen_ns = ? WHERE path = ?", (seen * 10**9, path))
    (number,) = store.conn.execute("SELECT id FROM roots WHERE path = ?", (path,)).fetchone()
    return int(number)


def relation(x: int, y: int, version: int = RELATION_VERSION) -> Relation:
    """That the first of two LoRAs was resized to the second."""
    proof = Proof(
        "resized",
        "x" if x < y else "y",
        (Step("resized", "resized 16→8"),),
        cosine=0.75,
        shares=(1.0, 0.5) if x < y else (0.5, 1.0),
        differs={"rank": [[16], [8]] if x < y else [[8], [16]]},
        dominates=(x < y, x > y),
    )
    return Relation(
        min(x, y),
        max(x, y),
        version,
        "resized",
        1 if x < y else -1,
        ["resized 16→8"],
        proof.to_json(),
    )


def index(
    db: Path,
    files: Mapping[str, tuple[str | None, int]],
    root: bytes = b"/r",
    seen: int = 1,
    pairs: tuple[tuple[str, str], ...] = (),
    **columns: Any,
) -> Path:
    """An index of path → (name of its LoRA, when it was read), with relations of some names."""
    with Store.open(db, "write") as store, store.batch():
        root_id(store, root, seen)
        numbers = {}
        for name in dict.fromkeys(name for name, _ in files.values() if name is not None):
            numbers[name] = put_lora(store, name)
        for path, (held, read) in files.items():
            put_file(store, root, path, held, read, **columns)
        store.put_relations([relation(numbers[a], numbers[b]) for a, b in pairs])
    return db

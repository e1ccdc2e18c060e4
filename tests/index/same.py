"""What an index holds, named by content and path: equal for equal collections, however built."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import numpy as np

from lorafind.files.scan import join
from lorafind.index.classes import series_of
from lorafind.index.store import Store

#: Facts of a LoRA that tell of the file that was read: one of several may have been the first.
OF_FILE = ("facts", "notes")
#: Rounding of what is computed from float16 sketches in another order of LoRAs.
BASIS_ATOL = 0.02


def dump(store: Store) -> dict[str, Any]:
    """Tables by name, without ids and without the times of runs.

    roots: path → single. files: path → what is known of it, and its content. loras: content →
    columns, layout, identity record and signature, byte for byte. relations: pair of contents in
    order → grade, direction in that order, steps, |cosine|; of two that differ by a factor alone,
    what is told goes by their ids and is left out. checked: pairs looked at, with those in which
    nothing was found. families: sets of contents. bases: architecture → contents in order and the
    products of their embeddings (an axis' sign is free).
    """
    conn = store.conn
    names = dict(conn.execute("SELECT id, content FROM loras"))
    pairs = [
        (names[x], names[y], grade, direction, json.loads(steps), json.loads(numbers))
        for x, y, grade, direction, steps, numbers in conn.execute(
            "SELECT x, y, grade, direction, steps, numbers FROM relations"
        )
    ]
    families: dict[int, set[str]] = {}
    for lora, family in conn.execute("SELECT lora, family FROM families"):
        families.setdefault(family, set()).add(names[lora])
    return {
        "roots": dict(conn.execute("SELECT path, single FROM roots")),
        "files": {
            os.fsdecode(join(root, path)): (*rest, names.get(lora))
            for root, path, lora, *rest in conn.execute(
                "SELECT r.path, f.path, f.lora, f.size, f.mtime_ns, f.ctime_ns, f.device, f.inode, "
                "f.is_link, f.probe, f.status, f.reason, f.sha256, f.version, f.presence "
                "FROM files f JOIN roots r ON r.id = f.root"
            )
        },
        "loras": loras(store),
        "relations": {
            (min(a, b), max(a, b)): (
                grade,
                0 if grade == "scaled" else direction if a < b else -direction,
                [] if grade == "scaled" else sorted(map(str, steps)),
                round(abs(numbers["cosine"]), 6),
            )
            for a, b, grade, direction, steps, numbers in pairs
            if grade
        },
        "checked": {(min(a, b), max(a, b)) for a, b, *_ in pairs},
        "families": sorted(map(sorted, families.values())),
        "bases": {
            architecture: cosines(store, basis, names)
            for basis, architecture in conn.execute("SELECT id, architecture FROM bases")
        },
    }


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Fails where two indexes (as :func:`dump` gives them) do not hold the same.

    Embeddings are compared where no LoRA has relatives: a basis is fitted to the member of a
    family with the lowest id, which is the one that was finished first.
    """
    assert one.keys() == two.keys()
    for table in ("roots", "files", "loras", "relations"):
        assert one[table].keys() == two[table].keys(), table
        for key, value in one[table].items():
            assert value == two[table][key], (table, key)
    assert one["checked"] == two["checked"]
    assert one["families"] == two["families"]
    assert one["bases"].keys() == two["bases"].keys()
    for architecture, (order, products) in one["bases"].items():
        assert order == two["bases"][architecture][0]
        if not one["families"]:
            np.testing.assert_allclose(products, two["bases"][architecture][1], atol=BASIS_ATOL)


def loras(store: Store, of_file: bool = False) -> dict[str, Any]:
    """Content → columns, layout, identity record and signature; of_file: also what tells of one of
    several files."""
    conn = store.conn
    columns = [row[1] for row in conn.execute("PRAGMA table_info(loras)")]
    copies = Counter(
        content
        for (content,) in conn.execute("SELECT content FROM files JOIN loras ON loras.id = lora")
    )
    found = {}
    for row in conn.execute(f"SELECT {', '.join(columns)} FROM loras"):
        facts = dict(zip(columns, row, strict=True))
        number, layout = facts.pop("id"), facts.pop("layout")
        if copies[facts["content"]] > 1 and not of_file:
            for name in OF_FILE:
                del facts[name]
        identity = store.chunks.get("identity", series_of(facts["architecture"]), number)
        assert identity is not None, "a LoRA without a sketch"
        signature = conn.execute(
            "SELECT version, groups, scales, votes, style FROM signatures WHERE lora = ?",
            (number,),
        ).fetchone()
        assert signature is not None, "a LoRA without a signature"
        found[facts["content"]] = (facts, store.layout(layout), identity.tobytes(), signature)
    return found


def cosines(store: Store, basis: str, names: dict[int, str]) -> tuple[list[str], np.ndarray]:
    """Contents in order, and the products of their embeddings (signs of axes are free)."""
    found = {
        names[int(lora)]: np.array(row["vector"])
        for block, rows in store.chunks.scan("embedding", basis)
        for lora, row in zip(block, rows, strict=True)
    }
    order = sorted(found)
    vectors = np.array([found[name] for name in order])
    return order, vectors @ vectors.T

"""What an index holds, named by content: equal for equal collections, whatever the ids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lorafind.files.scan import join
from lorafind.index.store import Store
from tests.index.same import cosines, loras


def content(db: Path) -> dict[str, Any]:
    """Tables by name: files by path, LoRAs with signatures and sketches by content, relations by
    pair of contents (grade, |cosine|), families as sets, and cosines in each basis."""
    with Store.open(db) as store:
        conn = store.conn
        names = dict(conn.execute("SELECT id, content FROM loras"))
        files = {
            os.fsdecode(join(root, path)): (*rest, names.get(lora))
            for root, path, lora, *rest in conn.execute(
                "SELECT r.path, f.path, f.lora, f.size, f.mtime_ns, f.device, f.inode, f.is_link, "
                "f.probe, f.status, f.reason, f.sha256, f.version, f.presence FROM files f "
                "JOIN roots r ON r.id = f.root"
            )
        }
        relations = {
            frozenset((names[x], names[y])): (grade, round(abs(json.loads(numbers)["cosine"]), 6))
            for x, y, grade, numbers in conn.execute(
                "SELECT x, y, grade, numbers FROM relations WHERE grade != ''"
            )
        }
        families: dict[int, set[str]] = {}
        for lora, family in conn.execute("SELECT lora, family FROM families"):
            families.setdefault(family, set()).add(names[lora])
        return {
            "files": files,
            "loras": loras(store, of_file=True),
            "relations": relations,
            "families": sorted(map(sorted, families.values())),
            "bases": {
                architecture: cosines(store, basis, names)
                for basis, architecture in conn.execute("SELECT id, architecture FROM bases")
            },
        }


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Fails where two indexes do not hold the same."""
    for table in ("files", "loras", "relations"):
        assert one[table].keys() == two[table].keys(), table
        for key, value in one[table].items():
            assert value == two[table][key], (table, key)
    assert one["families"] == two["families"]
    assert one["bases"].keys() == two["bases"].keys()
    for architecture, (order, products) in one["bases"].items():
        assert order == two["bases"][architecture][0]
        np.testing.assert_allclose(products, two["bases"][architecture][1], atol=0.02)

"""What is in a store is never acted on, and never the reason for which a local file goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafind.api import Index
from lorafind.clean.apply import How
from lorafind.demo.make import make
from lorafind.search.dupes import Choice
from tests.remote import Store

THIN = Path(make.__code__.co_filename).parent / "data" / "thin"
STORED = "s3://collection/demo/{}.safetensors"


@pytest.fixture
def mixed(bucket: Store, tmp_path: Path) -> Index:
    """a and b here and a in the bucket are one content; c here and in the bucket are another."""
    one, two = [path.read_bytes() for path in sorted(THIN.glob("lobster*"))[:2]]
    (tmp_path / "loras").mkdir()
    for name, data in {"a": one, "b": one, "c": two}.items():
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(data)
    bucket.put("demo/a.safetensors", one)
    bucket.put("demo/c.safetensors", two)
    index = Index.open(tmp_path / "x.db", write=True)
    index.build([tmp_path / "loras", "s3://collection/demo"])
    return index


def test_a_local_file_goes_only_for_a_local_one(mixed: Index, tmp_path: Path) -> None:
    here = {name: str(tmp_path / "loras" / f"{name}.safetensors") for name in "abc"}
    with mixed as index:
        rows = {m.path: m for group in index.dupes() for m in group.files}
        assert {p for p, m in rows.items() if m.removable} <= {here["a"], here["b"]}
        assert len([m for m in rows.values() if m.removable]) == 1
        assert rows[STORED.format("a")].stays == "in a store, where nothing is removed"
        assert rows[STORED.format("c")].stays == "in a store, where nothing is removed"
        assert rows[here["c"]].grade == "keeper"
        only = Choice(protect=["s3://collection/demo/"])
        assert any(m.removable for group in index.dupes(only) for m in group.files)


def test_a_plan_that_is_edited_to_remove_from_a_store(
    mixed: Index, bucket: Store, tmp_path: Path
) -> None:
    place = tmp_path / "plan.json"
    with mixed as index:
        index.plan(place)
        plan = json.loads(place.read_text())
        (group,) = plan["groups"]
        for row in group["files"]:
            row["act"] = "remove" if row["path"].startswith("s3://") else "keep"
        place.write_text(json.dumps(plan))
        bucket.requests.clear()
        (done,) = index.apply(place, How("move", str(tmp_path / "away")))
        assert (done.path, done.outcome) == (STORED.format("a"), "stays")
        assert done.reason == "it is in a store, where nothing is removed"
        # The only local copy, for one in the store.
        for row in group["files"]:
            row["act"] = "keep" if row["path"].startswith("s3://") else "remove"
        place.write_text(json.dumps(plan))
        rows = list(index.apply(place, How("move", str(tmp_path / "x"))))
        assert {row.outcome for row in rows} == {"stays"} and len(rows) == 2
        assert all("the keeper is in a store" in row.reason for row in rows)
    assert len(list((tmp_path / "loras").iterdir())) == 3
    assert {method for method, *_ in bucket.requests} <= {"GET", "HEAD"}

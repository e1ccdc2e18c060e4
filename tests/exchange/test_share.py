"""What is exported can be read by others, and comes back as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafind
from lorafind.bases.basis import PUBLISHED
from lorafind.bases.stored import current, in_use
from lorafind.exchange.tables import EMBEDDINGS, FORMAT, TABLES
from lorafind.index.build import build
from lorafind.index.problem import IndexProblem
from lorafind.index.rows import StoredBasis, readable
from lorafind.index.store import Store
from lorafind.search.similar import Wishes
from lorafind.signatures.constants import SIGNATURE_VERSION, STYLE
from tests.exchange.make import collection, index
from tests.index.same import dump, same

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pd = pytest.importorskip("pandas")
KINDS = ("folder", "lancedb")


def rows(db: Path) -> dict[str, Any]:
    with Store.open(db) as store:
        return dump(store)


def export(db: Path, kind: str, place: Path, force: bool = False) -> dict[str, int]:
    if kind == "lancedb":
        pytest.importorskip("lancedb")
    with lorafind.Index.open(db) as index:
        return index.export(**{kind: str(place)}, force=force)  # type: ignore[arg-type]


def take(db: Path, kind: str, place: Path, relate: bool = True) -> Any:
    with lorafind.Index.open(db, write=True) as index:
        return index.import_(**{kind: str(place)}, relate=relate)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the demo's files, with a published basis that is in use for another model."""
    folder = tmp_path_factory.mktemp("demo")
    collection(folder / "files")
    # A name that no text can hold comes back too.
    shutil.copy2(
        os.fsencode(folder / "files" / "thin" / "lobster-train-01.safetensors"),
        os.path.join(os.fsencode(folder), b"files", b"odd \xff.safetensors"),
    )
    with Store.open(folder / "i.db", "write") as store:
        build(store, [folder / "files"], device="cpu")
        parts = {"centres/ff": np.arange(6, dtype="f2").reshape(2, 3), "scale": np.ones(3)}
        facts = {"name": "mine", "layouts": [], "feature": "style"}
        with store.batch():
            store.put_basis(
                StoredBasis("b-1", "flux1", PUBLISHED, SIGNATURE_VERSION, facts, parts, 77)
            )
            store.set_meta(in_use("flux1"), "b-1")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relate", [True, False])
def test_there_and_back(demo: Path, tmp_path: Path, kind: str, relate: bool) -> None:
    counts = export(demo / "i.db", kind, tmp_path / "out")
    wanted = rows(demo / "i.db")
    assert counts["loras"] == len(wanted["loras"]) and counts["files"] == len(wanted["files"])
    taken = take(tmp_path / "back.db", kind, tmp_path / "out", relate)
    assert taken.anything and taken.relations == 0
    if relate:
        same(rows(tmp_path / "back.db"), wanted)
    else:
        assert rows(tmp_path / "back.db")["loras"] == wanted["loras"]
    before = (tmp_path / "back.db").read_bytes()
    assert not take(tmp_path / "back.db", kind, tmp_path / "out", relate).anything
    assert (tmp_path / "back.db").read_bytes() == before
    with Store.open(tmp_path / "back.db") as store, Store.open(demo / "i.db") as first:
        assert store.get_meta(in_use("flux1")) == "b-1"
        one, two = store.basis("b-1"), first.basis("b-1")
        assert one is not None and two is not None
        assert (one.facts, one.made_ns, one.parts.keys()) == (two.facts, 77, two.parts.keys())
        for name, part in one.parts.items():
            assert part.dtype == two.parts[name].dtype
            np.testing.assert_array_equal(part, two.parts[name])
    with Store.open(tmp_path / "back.db", "write") as store:
        summary = build(store, [demo / "files"], device="cpu")
        assert (summary.added, summary.refreshed, summary.bytes) == (0, 0, 0)


def test_pandas_reads_what_the_index_holds(demo: Path, tmp_path: Path) -> None:
    export(demo / "i.db", "folder", tmp_path / "out")
    assert {p.stem for p in (tmp_path / "out").iterdir()} >= set(TABLES)
    table = {name: pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in TABLES}
    with Store.open(demo / "i.db") as store:
        conn = store.conn
        for row in table["loras"].itertuples():
            norms, norm, ranks, facts = conn.execute(
                "SELECT norms, norm, ranks, facts FROM loras WHERE content = ?", (row.content,)
            ).fetchone()
            assert row.norms.dtype == np.float32 and row.norms.tobytes() == norms
            assert (row.norm, json.loads(row.ranks)) == (norm, json.loads(ranks))
            assert json.loads(row.facts) == json.loads(facts)
            np.testing.assert_allclose(np.sqrt(row.norms.astype("f8").sum()), row.norm, rtol=1e-6)
            modules = json.loads(table["layouts"].set_index("id").modules[row.layout])
            assert len(modules) == len(row.norms)
        for row in table["signatures"].itertuples():
            groups, scales, votes, style = conn.execute(
                "SELECT groups, scales, votes, style FROM signatures WHERE lora = ?", (row.lora,)
            ).fetchone()
            assert row.groups == groups and row.scales.tobytes() == scales
            assert row.votes.dtype == np.float64 and row.votes.tobytes() == votes
            sketch = np.frombuffer(row.style, np.int8).reshape(-1, STYLE)
            assert len(sketch) == len(row.scales) and sketch.tobytes() == style
        for row in table["identity"].itertuples():
            record = store.chunks.get("identity", row.series, row.lora)
            assert record is not None
            assert row.sketch.dtype == np.float16
            np.testing.assert_array_equal(row.sketch.reshape(11, 128), record["sketch"])
            np.testing.assert_array_equal(row.norms, record["norms"])
        found = {os.fsencode(path) for path in rows(demo / "i.db")["files"]}
    root = table["roots"].set_index("id").path
    assert {root[f.root] + b"/" + f.path for f in table["files"].itertuples()} == found
    odd = [f for f in table["files"].itertuples() if b"\xff" in f.path]
    assert len(odd) == 1 and odd[0].name.endswith("odd \\udcff.safetensors")
    schema = pq.read_schema(tmp_path / "out" / "roots.parquet")
    assert json.loads(schema.metadata[b"lorafind"])["format"] == FORMAT


def neighbours(db: Path, lora: str, count: int) -> tuple[list[str], list[float]]:
    """Paths and scores by `similar`."""
    with lorafind.Index.open(db) as index:
        odd = lora.replace(r"\udcff", "\udcff")
        found = list(index.similar(odd, Wishes(count=count, every=True)))
    return [readable(n.path) for n in found], [n.score for n in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nearest_neighbour_query_answers_as_similar(
    demo: Path, tmp_path: Path, kind: str
) -> None:
    export(demo / "i.db", kind, tmp_path / "out")
    with Store.open(demo / "i.db") as store:
        (architecture,) = (
            a for (a,) in store.conn.execute("SELECT architecture FROM bases") if ":" in a
        )
        basis = current(store, architecture)
        assert basis is not None and not basis.euclidean
    name = EMBEDDINGS + architecture.replace(":", "-")
    if kind == "folder":
        whole = pq.read_table(tmp_path / "out" / f"{name}.parquet")
    else:
        import lancedb

        table: Any = lancedb.connect(str(tmp_path / "out")).open_table(name)
        whole = table.to_arrow()
    facts = json.loads(whole.schema.metadata[b"lorafind"])
    assert (facts["basis"], facts["metric"]) == (basis.id, "cosine")
    every = whole.to_pandas()
    vectors = np.array(every.vector.tolist())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    full = every.groups.mode()[0]
    asked = 0
    for row in every[(every.groups == full) & every.fitted].itertuples():
        # LoRAs that lack a group are compared over the groups that both have.
        paths, scores = neighbours(demo / "i.db", row.path, len(every))
        same_groups = set(every.path[every.groups == full]) - {row.path}
        wanted = [(p, s) for p, s in zip(paths, scores, strict=True) if p in same_groups]
        if kind == "folder":
            dots = vectors @ np.array(row.vector)
            found = {p: float(d) for p, d in zip(every.path, dots, strict=True)}
        else:
            hits = table.search(row.vector).distance_type("cosine").limit(len(every)).to_pandas()
            found = dict(zip(hits.path, 1.0 - hits["_distance"], strict=True))
            order = [path for path in hits.path if path in same_groups]
            # Scores are rounded to four digits: only what they tell apart has an order.
            told = [found[p] for p in order]
            assert told == sorted(told, reverse=True)
        for path, score in wanted:
            assert found[path] == pytest.approx(score, abs=6e-5)
        asked += len(wanted) > 20
    assert asked > 20


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_overwritten_by_mistake(demo: Path, tmp_path: Path, kind: str) -> None:
    small = index(tmp_path / "small.db", {"x": ("x", 1)})
    place = tmp_path / "out"
    export(demo / "i.db", kind, place)
    with pytest.raises(IndexProblem, match="--force replaces it"):
        export(small, kind, place)
    assert take(tmp_path / "a.db", kind, place, False).sources[0].files > 40
    export(small, kind, place, force=True)
    assert take(tmp_path / "b.db", kind, place, False).sources[0].files == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    other = tmp_path / "other"
    if kind == "folder":
        other.mkdir()
        (other / "roots.parquet").write_text("mine")
        (place / "notes.txt").write_text("mine")
        with pytest.raises(IndexProblem, match=r"holds notes.txt beside an export"):
            export(small, kind, place, force=True)
    else:
        import lancedb

        lancedb.connect(str(other)).create_table("roots", [{"mine": 1}])
        lancedb.connect(str(place)).create_table("mine", [{"mine": 1}])
        export(demo / "i.db", kind, place, force=True)
        assert lancedb.connect(str(place)).open_table("mine").count_rows() == 1
    for force in (False, True):
        with pytest.raises(IndexProblem, match="choose another"):
            export(small, kind, other, force=force)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_that_are_not_whole(demo: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(IndexProblem, match=r"no export|no LanceDB"):
        take(tmp_path / "x.db", kind, tmp_path / "nowhere")
    export(demo / "i.db", kind, tmp_path / "out")

    def newer(schema: Any) -> Any:
        facts = json.loads(schema.metadata[b"lorafind"])
        return {b"lorafind": json.dumps({**facts, "format": FORMAT + 1})}

    def broken(change: Callable[[Path], None], words: str) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        change(tmp_path / "copy")
        with pytest.raises(IndexProblem, match=words) as caught:
            take(tmp_path / "x.db", kind, tmp_path / "copy")
        assert "\n" not in str(caught.value)
        assert not rows(tmp_path / "x.db")["files"]

    if kind == "folder":

        def rewrite(change: Callable[[Any], Any], name: str) -> Callable[[Path], None]:
            def do(place: Path) -> None:
                found = pq.read_table(place / f"{name}.parquet")
                pq.write_table(change(found), place / f"{name}.parquet")

            return do

        broken(rewrite(lambda t: t.replace_schema_metadata(newer(t.schema)), "roots"), "newer")
        broken(rewrite(lambda t: t.slice(1), "files"), "is not whole: files has")
        broken(rewrite(lambda t: t.drop_columns(["norms"]), "loras"), "loras lacks norms")
        broken(rewrite(lambda t: t.replace_schema_metadata(None), "roots"), "not written by")
        broken(lambda p: (p / "signatures.parquet").unlink(), "no signatures.parquet")
        broken(lambda p: os.truncate(p / "loras.parquet", 3000), "loras.parquet is damaged")
    else:
        import lancedb

        def drop(name: str) -> Callable[[Path], None]:
            return lambda place: lancedb.connect(str(place)).drop_table(name)

        def again(change: Callable[[Any], Any], name: str) -> Callable[[Path], None]:
            def do(place: Path) -> None:
                database = lancedb.connect(str(place))
                found = change(database.open_table(name).to_arrow())
                database.create_table(name, found, mode="overwrite")

            return do

        broken(drop("roots"), "no whole export: there is no table roots")
        broken(drop("files"), "no table files")
        broken(again(lambda t: t.slice(1), "files"), "is not whole: files has")
        broken(again(lambda t: t.replace_schema_metadata(newer(t.schema)), "roots"), "newer")


def test_a_killed_export_is_not_there(demo: Path, tmp_path: Path) -> None:
    """…, and one that fails leaves nothing at all."""
    code = (
        "import sys; from lorafind.exchange.share import export; from pathlib import Path\n"
        "print('go', flush=True)\n"
        "export(Path(sys.argv[1]), sys.argv[2])"
    )
    there = 0
    for k in range(8):
        place = tmp_path / f"out{k}"
        with subprocess.Popen(
            [sys.executable, "-c", code, demo / "i.db", place], stdout=subprocess.PIPE
        ) as run:
            assert run.stdout is not None
            run.stdout.readline()
            time.sleep(0.05 * k)
            run.send_signal(signal.SIGKILL)
        if place.exists():
            there += 1
            assert take(tmp_path / f"{k}.db", "folder", place, False).anything
    assert there < 8
    with pytest.raises(IndexProblem):
        export(tmp_path / "nowhere.db", "folder", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()

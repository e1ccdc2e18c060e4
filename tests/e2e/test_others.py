"""`dupes --others` names only what may go, whatever is asked for."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafind.index.rows import Relation as Row
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.relations.grades import GRADES, Relation, Step
from lorafind.search.dupes import KEEP, PROVED, Choice, dupes
from tests.e2e import variants as v
from tests.e2e.tools import OLD_NS, age, index, lorafind, one_sentence, rows, told
from tests.index import make
from tests.relations import made

ALWAYS = {"file", "tensors", "weights"}
IF_NAMED = {"cast", "scaled", "part", "resized"}
LORAS = 5


@dataclass(frozen=True)
class Path_:
    """One path of a made collection. of: the path it leads to (links), else None."""

    lora: int
    folder: int
    kind: str
    of: int | None
    hour: int
    metadata: int


@dataclass(frozen=True)
class Pair:
    """A relation of two LoRAs x < y."""

    x: int
    y: int
    grade: str
    dominates: tuple[bool, bool]
    step: str


@st.composite
def collections(draw: st.DrawFn) -> tuple[list[Path_], list[Pair]]:
    """Up to a dozen paths to five LoRAs, and any relations between these."""
    paths: list[Path_] = []
    for _ in range(draw(st.integers(2, 12))):
        kind = draw(
            st.sampled_from(
                ["plain"] * 5
                + ["hardlink", "symlink", "outside", "offline", "changed", "missing", "other mount"]
            )
        )
        sources = [k for k, p in enumerate(paths) if p.kind == "plain"]
        of = draw(st.sampled_from(sources)) if sources and kind != "plain" else None
        if of is None and kind in ("hardlink", "symlink", "other mount"):
            kind = "plain"
        linked = kind in ("hardlink", "symlink", "other mount") and of is not None
        lora = paths[of].lora if linked and of is not None else draw(st.integers(0, LORAS - 1))
        hour = paths[of].hour if linked and of is not None else draw(st.integers(0, 30))
        metadata = paths[of].metadata if linked and of is not None else draw(st.integers(0, 1))
        paths.append(
            Path_(lora, draw(st.integers(0, 2)), kind, of if linked else None, hour, metadata)
        )
    pairs = []
    for x in range(LORAS):
        for y in range(x + 1, LORAS):
            grade = draw(st.sampled_from(("", "", *GRADES[1:])))
            both = st.tuples(st.booleans(), st.booleans())
            dominates = draw(both) if grade not in ("near", "kin") else (False, False)
            stronger = [
                g for g in ("dtype", "cast", "scaled", "part", "resized") if _weaker(grade, g)
            ]
            if grade:
                pairs.append(Pair(x, y, grade, dominates, draw(st.sampled_from(stronger or [""]))))
    return paths, pairs


def _weaker(grade: str, kind: str) -> bool:
    """True where a relation of this grade can have a step of this kind."""
    step = "weights" if kind == "dtype" else kind
    return grade in GRADES[GRADES.index(step) : GRADES.index("near")]


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """What the command line makes of any of its options."""
    grade = draw(st.sampled_from(["", "all", *GRADES, "part,cast", "resized,weights,scaled"]))
    named = [word for word in grade.split(",") if word]
    places = st.lists(st.sampled_from(["0", "1", "2", "0/1.safetensors", "nowhere"]), max_size=2)
    return Choice(
        GRADES if "all" in named else named or PROVED,
        [word for word in named if word != "all"],
        draw(st.sampled_from((*KEEP, "*/1/*", "*3.safetensors", "nothing"))),
        draw(places),
        draw(places),
    )


def lay_out(folder: Path, store: Store, paths: list[Path_], pairs: list[Pair]) -> list[Path]:
    """The collection on disk and in the index; returns its paths."""
    places = [folder / str(p.folder) / f"{k}.safetensors" for k, p in enumerate(paths)]
    with store.batch():
        for number in range(3):
            (folder / str(number)).mkdir()
        store.conn.execute(
            "INSERT INTO roots (id, path, single) VALUES (1, ?, 0)", (os.fsencode(folder),)
        )
        ids = [make.lora(store, f"content {k}") for k in range(LORAS)]
        store.conn.executemany(
            "UPDATE loras SET ranks = '{\"8\": 1}' WHERE id = ?", [(i,) for i in ids]
        )
        for k, (place, p) in enumerate(zip(places, paths, strict=True)):
            if p.kind == "hardlink" and p.of is not None:
                os.link(places[p.of], place)
            elif p.kind == "symlink" and p.of is not None:
                place.symlink_to(places[p.of])
            else:
                if p.kind == "outside":
                    # A link to a file that the index does not know.
                    (folder.parent / f"{k}").touch()
                    place.symlink_to(folder.parent / f"{k}")
                place.write_bytes(bytes(100 * (1 + p.lora) + p.metadata))
                os.utime(place, ns=(OLD_NS, OLD_NS + p.hour * 10**9))
            facts = place.stat()
            ctime, device, inode = k, 1, facts.st_ino
            if p.kind == "other mount" and p.of is not None:
                ctime, device, inode = p.of, 2, 10**6 + k
            store.conn.execute(
                "INSERT INTO files VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?, X'00', 'lora', '', ?, ?, 1, "
                "1, ?)",
                (
                    k + 1,
                    os.fsencode(place.relative_to(folder)),
                    facts.st_size,
                    facts.st_mtime_ns,
                    ctime if p.of is None or p.kind == "other mount" else p.of,
                    device,
                    inode,
                    p.kind in ("symlink", "outside"),
                    f"sha {p.lora} {p.metadata}",
                    ids[p.lora],
                    "offline" if p.kind == "offline" else "here",
                ),
            )
        store.put_relations(
            Row(
                ids[pair.x],
                ids[pair.y],
                RELATION_VERSION,
                pair.grade,
                1,
                [],
                Relation(
                    pair.grade,
                    "x",
                    tuple(Step(kind, kind) for kind in (pair.step, _kind(pair)) if kind),
                    dominates=pair.dominates,
                ).to_json(),
            )
            for pair in pairs
        )
    for place, p in zip(places, paths, strict=True):
        if p.kind == "changed":
            os.utime(place, ns=(OLD_NS, OLD_NS + 10**12))
        elif p.kind == "missing":
            place.unlink()
    return places


def _kind(pair: Pair) -> str:
    """The kind of the step that gives the pair its grade."""
    return pair.grade if pair.grade in GRADES[GRADES.index("cast") : GRADES.index("near")] else ""


def held_steps(keeper: Path_, path: Path_, pairs: list[Pair]) -> list[str]:
    """The grades of the steps between two paths."""
    for pair in pairs:
        if {pair.x, pair.y} == {keeper.lora, path.lora}:
            found = [kind for kind in (pair.step, _kind(pair)) if kind]
            return ["weights" if kind == "dtype" else kind for kind in found]
    return []


def held(keeper: Path_, path: Path_, pairs: list[Pair]) -> tuple[str, bool]:
    """Grade between two paths, and whether the first holds all that the second does."""
    if keeper.lora == path.lora:
        return ("file" if keeper.metadata == path.metadata else "tensors"), True
    for pair in pairs:
        if (pair.x, pair.y) == (keeper.lora, path.lora):
            return pair.grade, pair.dominates[0]
        if (pair.y, pair.x) == (keeper.lora, path.lora):
            return pair.grade, pair.dominates[1]
    return "", False


def below(path: Path, folder: Path, names: Sequence[str]) -> bool:
    return any(path == folder / name or folder / name in path.parents for name in names)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(collection=collections(), choice=choices())
def test_nothing_goes_but_what_is_held_by_what_stays(
    collection: tuple[list[Path_], list[Pair]], choice: Choice
) -> None:
    paths, pairs = collection
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        root = folder / "loras"
        root.mkdir()
        with Store.open(folder / "i.db", "write") as store:
            places = lay_out(root, store, paths, pairs)
            protect, within = (
                [str(root / p) for p in part] for part in (choice.protect, choice.within)
            )
            asked = Choice(choice.grades, choice.named, choice.keep, protect, within)
            groups = list(dupes(store, asked))
        known = dict(zip(map(str, places), paths, strict=True))
        shown = Counter(row.path for group in groups for row in group.files)
        assert max(shown.values(), default=1) == 1
        keepers = {group.keeper for group in groups}
        going = {row.path for group in groups for row in group.files if row.removable}
        assert not keepers & going
        for group in groups:
            keeper = known[group.keeper]
            kept = [row for row in group.files if not row.removable]
            assert [row.path for row in kept if row.grade == "keeper"] == [group.keeper]
            assert group.freed_bytes == sum(r.bytes for r in group.files if r.removable)
            if within:
                assert any(below(Path(r.path), root, choice.within) for r in group.files)
            for row in group.files:
                if not row.removable:
                    continue
                path = known[row.path]
                grade, dominates = held(keeper, path, pairs)
                assert row.grade == grade and dominates
                steps = {grade, *held_steps(keeper, path, pairs)}
                assert all(g in ALWAYS or (g in IF_NAMED and g in choice.named) for g in steps)
                # The keeper is there as it was read, and no link; so is what may go.
                assert {keeper.kind, path.kind} <= {"plain", "hardlink", "other mount"}
                assert Path(group.keeper).exists() and Path(row.path).exists()
                assert not below(Path(row.path), root, choice.protect)
                assert not within or below(Path(row.path), root, choice.within)
                # No other path leads to the same bytes, which then would not be freed.
                inode = os.stat(row.path).st_ino
                assert [p for p in known if os.path.exists(p) and os.stat(p).st_ino == inode] == [
                    row.path
                ]
                if "other mount" in (keeper.kind, path.kind):
                    mine, theirs = known[row.path], keeper
                    assert mine.of != places.index(Path(group.keeper))
                    assert theirs.of != places.index(Path(row.path))
        # Whatever goes, one file of its content, or one that holds it, stays.
        for row_path in going:
            (group,) = [g for g in groups if any(r.path == row_path for r in g.files)]
            assert os.path.exists(group.keeper) and group.keeper not in going


# ---------------------------------------------------------------------------- the command itself

TRICKY = ("ä 猫.safetensors", "two\nlines.safetensors", "tab\t.safetensors", "-0.safetensors")


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of one LoRA as F32 and in many copies; returns the folder."""
    folder = tmp_path_factory.mktemp("others")
    loras = folder / "loras"
    (loras / "keep").mkdir(parents=True)
    modules = made.trained(v.kohya_layout("sd1"), 8, seed=1)
    modules = {name: delta for name, delta in modules.items() if "attn1" in name}
    plain = v.kohya(modules)
    v.write(loras / "original.safetensors", plain)
    for name in TRICKY:
        v.write(loras / name, plain, {"name": name})
    v.write(loras / "f16.safetensors", v.kohya(made.cast(modules, torch.float16)))
    e5m2 = v.kohya(made.cast(modules, torch.float8_e5m2))
    v.write(loras / "f8.safetensors", e5m2)
    v.write(loras / "half.safetensors", v.kohya(made.scaled(modules, 0.5)))
    small = v.small_svd(modules, lambda s: 4, torch.float32)
    v.write(loras / "small.safetensors", v.kohya(small))
    late = made.kept(modules, lambda n: "up_blocks" in n)
    v.write(loras / "part.safetensors", v.kohya(late))
    v.write(loras / "noise.safetensors", v.kohya(made.noisy(modules, 0.01)))
    v.write(loras / "keep/copy.safetensors", v.kohya(made.cast(modules, torch.bfloat16)))
    raw = os.fsencode(loras) + b"/not utf-8 \xff.safetensors"
    v.write(Path(os.fsdecode(raw)), plain, {"name": "raw"})
    age(loras)
    os.utime(loras / "original.safetensors", ns=(OLD_NS, OLD_NS - 10**9))
    index(folder / "i.db", loras)
    return folder


def others(folder: Path, *arguments: str) -> set[str]:
    """Names of what `dupes -0 --others` lists."""
    done = lorafind("dupes", "-0", "--others", *arguments, db=folder / "i.db")
    told(done)
    parts = done.stdout.split(b"\0")
    assert parts.pop() == b""
    start = os.fsencode(folder / "loras") + b"/"
    assert all(part.startswith(start) for part in parts) and len(set(parts)) == len(parts)
    return {os.fsdecode(part.removeprefix(start)) for part in parts}


COPIES = {
    *TRICKY,
    "f16.safetensors",
    "keep/copy.safetensors",
    os.fsdecode(b"not utf-8 \xff.safetensors"),
}


def test_paths_are_byte_exact(collection: Path) -> None:
    assert others(collection) == COPIES


@pytest.mark.parametrize("grade", ["cast", "scaled", "part", "resized"])
def test_weaker_grades_go_only_when_named(collection: Path, grade: str) -> None:
    file = {"cast": "f8", "scaled": "half", "part": "part", "resized": "small"}[grade]
    assert f"{file}.safetensors" not in others(collection)
    found = others(collection, "--grade", f"file,tensors,weights,{grade}")
    if grade == "scaled" and "original.safetensors" in found:
        # Either of two strengths may stay.
        file = "original"
    assert found == COPIES | {f"{file}.safetensors"}


def test_every_step_must_be_named(collection: Path) -> None:
    """An F8 file at another strength is `scaled`, but it is a cast as well."""
    db = collection / "i.db"
    for grade, goes in (("scaled", False), ("cast", False), ("cast,scaled", True)):
        groups = rows(lorafind("dupes", "--grade", grade, "--json", db=db))
        keepers = {Path(group["keeper"]).name for group in groups}
        shown = {Path(row["path"]).name: row for group in groups for row in group["files"]}
        if grade == "scaled":
            assert "half.safetensors" in keepers
            assert shown["f8.safetensors"]["stays"] == "only with --grade cast"
        assert ("f8.safetensors" in others(collection, "--grade", grade)) is (
            goes or grade == "cast"
        )


def test_near_never_goes(collection: Path) -> None:
    for grade in ("near", "near,kin", "all", "reweighted"):
        assert "noise.safetensors" not in others(collection, "--grade", grade)
    groups = rows(lorafind("dupes", "--grade", "near", "--json", db=collection / "i.db"))
    assert groups and all(
        not row["removable"] for g in groups for row in g["files"] if row["grade"] == "near"
    )


def test_protected_and_outside_files_stay(collection: Path) -> None:
    loras = str(collection / "loras")
    assert others(collection, "--protect", f"{loras}/keep") == COPIES - {"keep/copy.safetensors"}
    assert others(collection, "--protect", loras) == set()
    assert others(collection, f"{loras}/keep") == {"keep/copy.safetensors"}
    assert others(collection, f"{loras}/keep", "--protect", f"{loras}/keep") == set()
    done = lorafind(
        "dupes",
        "-0",
        "--others",
        "-",
        db=collection / "i.db",
        stdin=b"-0.safetensors\n",
        cwd=collection / "loras",
    )
    assert done.stdout.removesuffix(b"\0").endswith(b"/-0.safetensors")


def test_keep_chooses_only_among_files_that_hold_all(collection: Path) -> None:
    # F16, BF16, F8 and small ones match these words, yet none of them may become the keeper.
    for keep in ("smallest", "*/f16*", "*/small*", "*/keep/*", "newest", "shortest-path"):
        groups = rows(
            lorafind("dupes", "--keep", keep, "--json", "--grade", "all", db=collection / "i.db")
        )
        for group in groups:
            for row in group["files"]:
                if row["removable"]:
                    name = Path(group["keeper"]).name
                    assert name in {*TRICKY, "original.safetensors"} or "not utf-8" in name
    assert "f16.safetensors" in others(collection, "--keep", "*/f16*")
    kept = TRICKY[0]
    found = others(collection, "--keep", f"*/{kept}")
    assert found == COPIES - {kept} | {"original.safetensors"}


def test_changed_and_offline_files_are_never_listed(collection: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    loras = folder / "loras"
    loras.mkdir(parents=True)
    for name in ("original", "f16", "half"):
        data = (collection / f"loras/{name}.safetensors").read_bytes()
        (loras / f"{name}.safetensors").write_bytes(data)
    (loras / "again.safetensors").write_bytes((loras / "original.safetensors").read_bytes())
    age(loras)
    db = folder / "i.db"
    index(db, loras)
    assert others(folder) == {"original.safetensors", "f16.safetensors"}
    os.utime(loras / "f16.safetensors")
    assert others(folder) == {"original.safetensors"}
    # The keeper itself has changed: nothing may go on its account.
    os.utime(loras / "again.safetensors")
    assert others(folder, "--keep", "*/again*") == set()
    os.rename(loras, folder / "away")
    index(db)
    assert others(folder) == set()
    done = lorafind("dupes", "--others", "--exit-code", db=db)
    assert (done.returncode, done.stdout) == (1, b"")
    told(lorafind("dupes", "--others", db=db))


def test_no_such_grade(collection: Path) -> None:
    done = lorafind("dupes", "--grade", "same", db=collection / "i.db")
    assert "'same' is no grade" in one_sentence(done, 2)

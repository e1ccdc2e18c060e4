"""rebuild-basis, basis use and similar --basis from the command line, on the demo's LoRAs."""

from __future__ import annotations

import csv
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import torch as torch_file
from safetensors.numpy import load_file, save_file

import lorafind
from lorafind.bases import file
from lorafind.bases.basis import OWN
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import open_stored
from lorafind.bases.use import parts_of_file, project
from lorafind.index.store import Store
from lorafind.search.similar import Wishes
from tests.e2e import tools

DATA = Path(lorafind.__file__).parent / "demo/data"
ARTISTS = 6


def artist_of(path: str | Path) -> str:
    return Path(path).name.split("-")[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """thin/ and wild/ of the demo, an index of both, and labels for both."""
    folder = tmp_path_factory.mktemp("bases")
    for world in ("thin", "wild"):
        shutil.copytree(DATA / world, folder / world)
    files = sorted(p for w in ("thin", "wild") for p in (folder / w).glob("*.safetensors"))
    assert len(files) == 40
    count: dict[str, int] = {}
    with (folder / "labels.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "artist", "split"])
        for path in files:
            turn = count[artist_of(path)] = count.get(artist_of(path), -1) + 1
            split = {1: "calibration", 3: "validation", 5: "test"}.get(turn, "train")
            writer.writerow([path.relative_to(folder), artist_of(path), split])
    tools.index(folder / "i.db", folder / "thin", folder / "wild")
    return folder


def run(place: Path, *arguments: str | Path, codes: tuple[int, ...] = (0,)) -> Any:
    return tools.rows(tools.lorafind(*arguments, "--json", db=place / "i.db"), *codes)


def near(db: Path, target: Path, **wishes: Any) -> dict[str, float]:
    """Path → score of everything that is compared with a target."""
    with lorafind.Index.open(db) as index:
        wishes["basis"] = index.basis(str(wishes["basis"])) if "basis" in wishes else ""
        found = index.similar(str(target), Wishes(count=99, every=True, **wishes))
        return {row.path: row.score for row in found}


def use(db: Path, name: str | Path) -> Any:
    """basis use."""
    with lorafind.Index.open(db, write=True) as index:
        return index.use_basis(str(name))


@pytest.fixture(scope="module")
def basis(place: Path) -> Path:
    """Built from the folder."""
    found = run(place, "rebuild-basis", place, "-o", place / "b.safetensors", "--name", "fonts")
    assert {row["split"] for row in found} == {"validation", "test"}
    for row in found:
        assert row["cosine_calibrated"] > row["plain"] or row["split"] == "validation"
    return place / "b.safetensors"


def test_a_basis_from_the_index_is_the_one_from_the_files(place: Path, basis: Path) -> None:
    run(place, "rebuild-basis", "--from-index", "--labels", place / "labels.csv",
        "-o", place / "i.safetensors", "--name", "fonts")  # fmt: skip
    mine, theirs = (file.read_facts(path) for path in (place / "i.safetensors", basis))
    for name in ("distance", "scales"):
        assert mine.pop(name) == pytest.approx(theirs.pop(name), rel=1e-4)
    assert mine == theirs
    one, two = load_file(basis), load_file(place / "i.safetensors")
    for name, array in one.items():
        np.testing.assert_allclose(
            two[name].astype(float), array.astype(float), rtol=2e-3, atol=1e-5
        )


def test_without_labels_it_is_the_collections_own(place: Path) -> None:
    assert run(place, "rebuild-basis", "--from-index", "-o", place / "o.safetensors") == []
    facts = file.read_facts(place / "o.safetensors")
    with Store.open(place / "i.db") as store:
        (own,) = store.basis_ids()
        stored = store.basis(own)
        assert stored is not None
        assert facts["components"] == stored.facts["components"]["model"]
        theirs = stored.parts["model/self_attn/components"].astype(np.float64)
    mine = load_file(place / "o.safetensors")["components/self_attn"].astype(np.float64)
    cosines = np.abs((mine * theirs).sum(1)) / np.linalg.norm(mine, axis=1) ** 2
    np.testing.assert_allclose(cosines, 1.0, atol=1e-2)


def test_scores_are_those_of_the_coordinates(place: Path, basis: Path) -> None:
    """similar --basis against the formula, from the components in the file."""
    target = place / "thin" / "lobster-train-01.safetensors"
    told = near(place / "i.db", target, basis=basis)
    space, facts = load_file(basis), file.read_facts(basis)
    seen = {row.tobytes() for row in space["contents"]}
    vectors = {}
    with Store.open(place / "i.db") as store:
        for lora, root, path, content, digest in store.conn.execute(
            "SELECT l.id, r.path, f.path, l.content, d.digest FROM loras l "
            "JOIN files f ON f.lora = l.id JOIN roots r ON r.id = f.root "
            "JOIN layouts d ON d.id = l.layout"
        ).fetchall():
            signature = next(iter(store.signatures(1, [lora])))[1]
            if len(signature.style) < 3:
                continue
            row = 1 + facts["layouts"].index(digest) if digest in facts["layouts"] else 0
            total = np.zeros(facts["components"])
            for group, style in zip(facts["groups"], signature.style, strict=True):
                x = style.astype(np.float64) / np.linalg.norm(style.astype(np.float64))
                v = space[f"components/{group}"].astype(np.float64)
                total += facts["weights"][group] * v @ x - space[f"centres/{group}"][row]
            if bytes.fromhex(content) not in seen:
                total = total * space["scale"] + space["offset"]
            vectors[str(Path(root.decode()) / path.decode())] = total
    mine = vectors.pop(str(target))
    assert len(vectors) > 30 and len(told) == 39
    for path, theirs in vectors.items():
        if facts["metric"] == "cosine":
            score = mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs)
        else:
            score = 1 - np.linalg.norm(mine - theirs) / facts["distance"]
        assert told[path] == pytest.approx(score, abs=2e-3), path


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_used_or_only_named_a_basis_says_the_same(place: Path, metric: str, tmp_path: Path) -> None:
    path, db = tmp_path / "b.safetensors", tmp_path / "i.db"
    labels = ("--labels", place / "labels.csv", "--metric", metric, "--name", "fonts")
    run(place, "rebuild-basis", "--from-index", "-o", path, *labels)
    shutil.copyfile(place / "i.db", db)
    assert file.read_facts(path)["metric"] == metric
    full = place / "wild" / "lobster-train-02.safetensors"
    attention = place / "wild" / "lobster-train-07.safetensors"
    own = {target: near(db, target) for target in (full, attention)}
    named = {target: near(db, target, basis=path) for target in own}
    used = use(db, path)
    assert used.embedded == 40 and not used.refused and used.name == "fonts"
    for target, scores in named.items():
        assert len(scores) == 39
        assert near(db, target) == pytest.approx(scores, abs=2e-4)
        assert scores != pytest.approx(own[target], abs=0.05)
    use(db, OWN)
    assert near(db, full) == own[full]
    assert near(db, full, basis="fonts") == pytest.approx(named[full], abs=2e-4)
    (found,) = run(tmp_path, "similar", full, "-k", "1", "--basis", "plain")
    assert found["basis"] == "plain"
    (found,) = run(tmp_path, "similar", full, "-k", "1", "--basis", "fonts")
    assert found["basis"] == used.id
    assert run(tmp_path, "basis", "use", "fonts") == []
    assert near(db, full) == pytest.approx(named[full], abs=2e-4)


def test_new_loras_are_embedded_by_index(place: Path, basis: Path, tmp_path: Path) -> None:
    db, folder = tmp_path / "i.db", tmp_path / "all"
    folder.mkdir()
    for path in sorted((place / "thin").iterdir())[:12]:
        shutil.copy2(path, folder / f"thin-{path.name}")
    tools.index(db, folder)
    use(db, basis)
    target = place / "wild" / "lobster-train-07.safetensors"
    before = near(db, target)
    for path in (place / "wild").iterdir():
        shutil.copy2(path, folder / f"wild-{path.name}")
    tools.index(db, folder)
    after = near(db, target)
    assert len(before) == 12 < len(after)
    # Now that the index has its layout, the target has the mean of that taken off, no longer the
    # pooled one: as if the basis were used anew.
    use(db, basis)
    assert near(db, target) == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("feature", ["theta", "canonical", "delta"])
def test_features_of_files_are_read_again(place: Path, tmp_path: Path, feature: str) -> None:
    """Bases over other features: LoRAs that do not fit are listed, the rest is compared."""
    thin, db, path = tmp_path / "thin", tmp_path / "i.db", tmp_path / "b.safetensors"
    shutil.copytree(place / "thin", thin)
    shutil.copyfile(place / "i.db", db)
    kept = [p.name for p in sorted(thin.iterdir())]
    rows = "".join(f"{name},{artist_of(name)},train\n" for name in kept)
    (thin / "labels.csv").write_text("file,artist,split\n" + rows)
    run(tmp_path, "rebuild-basis", thin, "--feature", feature, "-o", path, "--components", "5")
    facts = file.read_facts(path)
    assert (facts["feature"], facts["components"], facts["loras"]) == (feature, 5, len(kept))
    used = use(db, path)
    target = place / "thin" / kept[0]
    found = near(db, target)
    if feature == "theta":
        # Only LoRAs of rank 1 with all modules have θ of this kind.
        assert {Path(file).parent.name for file, _ in used.refused} == {"wild"}
        assert all("rank" in reason or "lacks" in reason for _, reason in used.refused)
        with pytest.raises(BasisProblem):
            near(db, place / "wild" / "lobster-train-07.safetensors")
    else:
        assert not used.refused
    assert len(found) + len(used.refused) == 39
    # What comes later is embedded by index, what does not fit is not read again.
    late = tmp_path / "late"
    late.mkdir()
    for source in (place / "wild" / "lobster-train-07.safetensors", place / "thin" / kept[1]):
        doubled = {key: np.asarray(2 * value) for key, value in load_file(source).items()}
        save_file(doubled, late / f"{source.parent.name}.safetensors")
    tools.index(db, late)
    with Store.open(db) as store:
        left_out = store.get_meta(f"left-out:{used.id}")
        newest = {name: lora for name, lora in store.conn.execute("SELECT path, lora FROM files")}
    assert (newest[b"wild.safetensors"] in left_out) == (feature == "theta")
    more = near(db, target)
    fitting = {str(late / "thin.safetensors")} | (
        set() if feature == "theta" else {str(late / "wild.safetensors")}
    )
    assert more.keys() - found.keys() == fitting
    # A file outside of the index gives what the index holds of it.
    with Store.open(db) as store:
        basis = open_stored(store, used.id)
        (lora,) = store.conn.execute(
            "SELECT lora FROM files WHERE path = ? ORDER BY root", (kept[0].encode(),)
        ).fetchone()
        row = store.chunks.get("parts", used.id, lora)
    assert basis is not None and row is not None
    np.testing.assert_allclose(parts_of_file(basis, str(target))[0], row, atol=1e-5)


def test_a_basis_of_other_styles_is_told_from_one_of_these(place: Path, tmp_path: Path) -> None:
    db, path = tmp_path / "i.db", tmp_path / "b.safetensors"
    shutil.copyfile(place / "i.db", db)
    verdicts = {}
    for name, artists in (("all", "3ceclo"), ("some", "3c")):
        path.unlink(missing_ok=True)
        rows = [
            f"{world}/{p.name},{artist_of(p)},train"
            for world in ("thin", "wild")
            for p in sorted((place / world).iterdir())
            if p.name[0] in artists
        ]
        table = place / f"{name}.csv"
        table.write_text("\n".join(["file,artist,split", *rows]))
        run(place, "rebuild-basis", "--from-index", "--labels", table, "-o", path)
        verdicts[name] = use(db, path)
    assert "knows the styles" in verdicts["all"].verdict
    assert "own` is likely" in verdicts["some"].verdict
    assert verdicts["some"].kept < 0.97 < 1.0 < verdicts["all"].kept
    assert verdicts["all"].own_kept == pytest.approx(verdicts["some"].own_kept)


def test_a_lora_without_the_groups_of_a_basis_is_left_out(place: Path, tmp_path: Path) -> None:
    db, path = tmp_path / "i.db", tmp_path / "b.safetensors"
    shutil.copyfile(place / "i.db", db)
    run(place, "rebuild-basis", "--from-index", "--groups", "ff", "-o", path)
    used = use(db, path)
    bare = place / "wild" / "lobster-train-07.safetensors"
    assert str(bare) in {file for file, _ in used.refused}
    assert all("none of the basis's groups (ff)" in reason for _, reason in used.refused)
    late = tmp_path / "late"
    late.mkdir()
    doubled = {key: np.asarray(2 * value) for key, value in load_file(bare).items()}
    save_file(doubled, late / "bare.safetensors")
    tools.index(db, late)
    found = near(db, place / "thin" / "lobster-train-01.safetensors")
    assert len(found) == used.embedded - 1 and str(bare) not in found


def test_a_basis_over_files_has_to_be_used_first_and_stay(place: Path, tmp_path: Path) -> None:
    db, path, late = tmp_path / "i.db", tmp_path / "t.safetensors", tmp_path / "late"
    shutil.copyfile(place / "i.db", db)
    target = place / "thin" / "lobster-train-01.safetensors"
    labels = tmp_path / "l.csv"
    thin = ("rebuild-basis", place / "thin", "--labels", labels, "--feature", "theta")
    names = sorted(p.name for p in (place / "thin").iterdir() if p.suffix == ".safetensors")
    rows = "".join(f"{name},{artist_of(name)}\n" for name in names)
    labels.write_text("file,artist\n" + rows)
    run(place, *thin, "-o", path, "--components", "4")
    with pytest.raises(BasisProblem, match="is over theta"):
        near(db, target, basis=path)
    use(db, path)
    run(place, *thin, "-o", path, "--components", "6", "--force")
    late.mkdir()
    for source in (target, place / "wild" / "lobster-train-02.safetensors"):
        doubled = {key: 2 * value for key, value in torch_file.load_file(source).items()}
        torch_file.save_file(doubled, late / source.name)
    # The file is another basis now: nothing is embedded with it, and the query is told.
    tools.index(db, late)
    assert str(late / target.name) not in near(db, target)
    with pytest.raises(BasisProblem, match="is no longer the basis"):
        near(db, late / target.name)


def test_own_is_always_the_collections(place: Path, basis: Path, tmp_path: Path) -> None:
    db = tmp_path / "i.db"
    shutil.copyfile(place / "i.db", db)
    target = place / "thin" / "lobster-train-01.safetensors"
    before = near(db, target)
    path = tmp_path / "b.safetensors"
    data = basis.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head = data[8 : 8 + length].replace(b'\\"name\\": \\"fonts\\"', b'\\"name\\": \\"own\\"  ')
    path.write_bytes(data[:8] + head + data[8 + length :])
    assert file.read_facts(path)["name"] == "own"
    use(db, path)
    assert near(db, target) != before
    use(db, OWN)
    assert near(db, target) == before


def test_a_name_labels_only_the_one_lora_that_has_it(place: Path, tmp_path: Path) -> None:
    from lorafind.bases.gather import Wanted, gather_index

    sources = sorted((place / "thin").glob("*.safetensors"))[:6]
    for k, source in enumerate(sources):
        (tmp_path / f"{k}").mkdir()
        name = "last.safetensors" if k < 2 else source.name
        shutil.copy2(source, tmp_path / f"{k}" / name)
    tools.index(tmp_path / "i.db", *(tmp_path / f"{k}" for k in range(6)))
    rows = [f"{source.name},by name" for source in sources[2:]]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,artist", "0/last.safetensors,by path", *rows, ""]))
    with Store.open(tmp_path / "i.db") as store:
        found = gather_index(store, Wanted(), table)
        assert found.labels is not None
        assert sorted(one.artist for one in found.labels) == ["by name"] * 4 + ["by path"]
        table.write_text("file,artist\nlast.safetensors,anybody\n")
        with pytest.raises(BasisProblem, match="names none of the files"):
            gather_index(store, Wanted(), table)


def test_projection_of_files_is_the_dense_product(place: Path, tmp_path: Path) -> None:
    from lorafind.features.opening import open_feature

    labels = sorted((place / "thin").glob("*.safetensors"))[:10]
    opened = open_feature("theta", labels)
    for path in labels:
        shutil.copy2(path, tmp_path)
    rows = "".join(f"{p.name},{artist_of(p)},train\n" for p in labels)
    (tmp_path / "labels.csv").write_text("file,artist,split\n" + rows)
    out = tmp_path / "b.safetensors"
    run(place, "rebuild-basis", tmp_path, "--feature", "theta", "-o", out, "--components", "4")
    basis = file.load(out)
    got = project(basis, opened).reshape(10, len(basis.groups), 4)
    for k, group in enumerate(basis.groups):
        x = np.concatenate([opened.matrix.columns(group, t) for t in opened.matrix.tiles(group)], 1)
        v, mean = basis.array(f"components/{group}").astype(float), basis.array(f"mean/{group}")
        np.testing.assert_allclose(got[:, k], (x.astype(float) - mean) @ v.T, atol=2e-3)


def test_what_does_not_fit_is_told(place: Path, basis: Path, tmp_path: Path) -> None:
    db = tmp_path / "i.db"
    shutil.copyfile(place / "i.db", db)
    lora = place / "thin" / "lobster-train-01.safetensors"
    data, facts = basis.read_bytes(), file.read_facts(basis)
    versions = data.replace(b'\\"signature_version\\": 1', b'\\"signature_version\\": 9')
    (tmp_path / "v.safetensors").write_bytes(versions)
    other = facts["architecture"].replace("other:", "other_").encode()
    (tmp_path / "a.safetensors").write_bytes(data.replace(facts["architecture"].encode(), other))
    for path, said in (
        (lora, "no basis of lorafind"),
        ("nonsense", "nonsense"),
        (tmp_path / "v.safetensors", "signatures of version 9"),
        (tmp_path / "a.safetensors", "is a basis for other_"),
    ):
        with pytest.raises(BasisProblem, match=said):
            use(db, path)
    with pytest.raises(BasisProblem, match="is for other_"):
        near(db, lora, basis=tmp_path / "a.safetensors")
    told = tools.one_sentence(
        tools.lorafind("rebuild-basis", place, "--feature", "theta", "-o", "t", db=db), 4
    )
    assert "one rank and one layout" in told
    here = ("rebuild-basis", place, "-o")
    assert "exists" in tools.one_sentence(tools.lorafind(*here, basis, db=db), 4)
    assert basis.read_bytes() == data
    for arguments, said in (
        ((basis, "--force", "--groups", "nose"), "'nose' is no group"),
        ((basis, "--force", "--groups", "all"), "leave out text"),
        ((basis, "--force", "--device", "tpu"), "unknown device 'tpu'"),
    ):
        assert said in tools.one_sentence(tools.lorafind(*here, *arguments, db=db), 2)


def test_the_library_opens_a_basis_for_queries(place: Path, basis: Path) -> None:
    with lorafind.Index.open(place / "i.db") as index:
        wishes = Wishes(count=3, basis=index.basis(str(basis)))
        target = str(place / "thin" / "lobster-train-01.safetensors")
        found = list(index.similar(target, wishes))
    assert [artist_of(row.path) for row in found] == ["lobster"] * 3

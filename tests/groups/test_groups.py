"""``lorafind groups`` over the demo's collection, and on FontBench."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import adjusted_rand_score

from lorafind import Index
from lorafind.bases.stored import current
from lorafind.demo.make import make
from lorafind.groups import cluster, sort
from lorafind.groups.link import MARK, link, safe_name
from lorafind.groups.sort import Group, Wishes
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from tests.search import small


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    make(folder / "demo")
    told = {
        "lobster-train-01": ["Oyster", "font"],
        "lobster-train-03": ["oyster", "font"],
        "lobster-train-04": ["alone"],
        **{f"opensans-regular-train-0{n}": ["font"] for n in range(1, 7)},
        **{f"courier-prime-train-0{n}": ["font"] for n in range(1, 7)},
    }
    for name, words in told.items():
        path = folder / f"demo/thin/{name}.civitai.info"
        path.write_text(json.dumps({"trainedWords": words}))
    small.index(folder / "i.db", folder / "demo")
    return folder / "i.db"


def groups(db: Path, number: int | None = None) -> list[Group]:
    with Index.open(db) as index:
        return list(index.groups(Wishes(number)))


def font(path: str) -> str:
    """Which of the six fonts a file was trained on; ``untitled`` is a copy of a 3dlet."""
    return Path(path).stem.replace("untitled", "3dlet").partition("-")[0]


@pytest.mark.parametrize("number", [6, None])
def test_every_font_is_a_group(db: Path, number: int | None) -> None:
    found = groups(db, number)
    assert [g.number for g in found] == [1, 2, 3, 4, 5, 6]
    fonts = [{font(m.path) for m in g.members} for g in found]
    assert list(map(len, fonts)) == [1] * 6 and len(set.union(*fonts)) == 6
    assert [g.families for g in found] == sorted((g.families for g in found), reverse=True)
    with Store.open(db) as store:
        basis = current(store, found[0].architecture)
        assert basis is not None
        every = store.chunks.ids("embedding", basis.id).tolist()
    assert sorted(m.lora for g in found for m in g.members) == sorted(every)


def test_central_spread_and_scores(db: Path) -> None:
    with Store.open(db) as store:
        families = dict(store.conn.execute("SELECT lora, family FROM families").fetchall())
        group = groups(db, 6)[0]
        basis = current(store, group.architecture)
        assert basis is not None
        vector = {
            lora: np.array(store.chunks.get("embedding", basis.id, lora)["vector"], "f8")  # type: ignore[index]
            for lora in (m.lora for m in group.members)
        }
    # One of each family, the first that was indexed.
    heads = [
        i
        for i in sorted(vector)
        if i == min(j for j in vector if families.get(j, j) == families.get(i, i))
    ]
    assert len(heads) == group.families < len(vector)
    cosines = np.array([[vector[i] @ vector[j] for j in heads] for i in heads])
    best = int(cosines.sum(1).argmax())
    central = group.members[0]
    assert group.central is central and central.role == "central"
    assert central.lora == heads[best] and group.path == central.path
    assert group.spread == pytest.approx(1 - np.delete(cosines[best], best).mean(), abs=1e-6)
    for member in group.members:
        assert member.score == pytest.approx(vector[member.lora] @ vector[heads[best]], abs=1e-6)
    scores = [m.score or 0.0 for m in group.members]
    assert scores == sorted(scores, reverse=True)


def test_trigger_words_are_those_that_set_a_group_apart(db: Path) -> None:
    words = {font(g.path or ""): tuple(map(str.lower, g.trigger_words)) for g in groups(db)}
    assert words["lobster"] == ("oyster",)
    assert words["opensans"] == words["courier"] == ("font",)
    assert words["3dlet"] == ()


def test_copies_have_one_vote(tmp_path: Path) -> None:
    make(tmp_path / "demo")
    source = tmp_path / "demo/thin/lobster-train-01.safetensors"
    small.index(tmp_path / "i.db", tmp_path / "demo/thin")
    before = groups(tmp_path / "i.db", 6)
    for number in range(12):
        # The same LoRA a little stronger: other numbers, another LoRA of the index.
        made = {
            key: tensor.float() * (1 + number / 100 if "up" in key or "lora_B" in key else 1)
            for key, tensor in load_file(source).items()
        }
        save_file(made, tmp_path / f"demo/thin/z{number}.safetensors")
    small.index(tmp_path / "i.db", tmp_path / "demo/thin")
    after = groups(tmp_path / "i.db", 6)
    assert [(g.families, g.path) for g in after] == [(g.families, g.path) for g in before]
    assert [g.spread for g in after] == pytest.approx([g.spread for g in before], abs=1e-6)
    assert sum(len(g.members) for g in after) == sum(len(g.members) for g in before) + 12


def test_a_sample_decides_and_the_rest_follows(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {m.lora: font(m.path) for g in groups(db) for m in g.members}
    monkeypatch.setattr(sort, "SAMPLE", 24)
    assert cluster.SAMPLE > 24
    found = groups(db, 6)
    assert {m.lora: font(m.path) for g in found for m in g.members} == whole
    assert all(len({font(m.path) for m in g.members}) == 1 for g in found)


def test_what_cannot_be_sorted_is_said(db: Path, tmp_path: Path) -> None:
    done = small.run(db, "groups", "-k", "6", "-0")
    assert done.stdout_bytes.count(b"\0") == 6
    assert "is not sorted: a basis of its own needs 30 families of LoRAs, it has 1" in done.stderr
    with pytest.raises(IndexProblem, match="fewer than 90 groups"):
        groups(db, 90)
    done = small.run(db, "groups", "--arch", "sd1")
    assert done.exit_code == 4
    assert "The index holds no LoRA of the architecture 'sd1'" in done.stderr
    small.save(tmp_path / "l/one.safetensors", small.random(1))
    small.index(tmp_path / "i.db", tmp_path / "l")
    with pytest.raises(IndexProblem, match="sd1 is not sorted: a basis of its own needs 30"):
        groups(tmp_path / "i.db")


def test_lines_members_and_json(db: Path) -> None:
    header, *lines = small.run(db, "groups", "--header").stdout.splitlines()
    assert header.split("\t") == [
        "path",
        "group",
        "loras",
        "families",
        "spread",
        "outliers",
        "trigger_words",
        "architecture",
    ]
    whole = json.loads(small.run(db, "groups", "--json").stdout)
    assert [line.split("\t")[:2] for line in lines] == [
        [row["path"], str(row["group"])] for row in whole
    ]
    header, *lines = small.run(db, "groups", "--members", "--header").stdout.splitlines()
    assert header.split("\t") == ["path", "group", "role", "score", "architecture"]
    assert [line.split("\t")[0] for line in lines] == [
        member["path"] for row in whole for member in row["members"]
    ]


def test_links(db: Path, tmp_path: Path) -> None:
    target = tmp_path / "by style"
    target.mkdir()
    done = small.run(db, "groups", "-k", "6", "--link", str(target))
    assert done.exit_code == 0
    found = groups(db, 6)
    names = [f"{g.number} {Path(g.path or '').stem}" for g in found]
    assert sorted(os.listdir(target)) == [MARK, *names]
    for group in found:
        place = target / f"{group.number} {Path(group.path or '').stem}"
        linked = {os.readlink(p) for p in place.iterdir()}
        sidecars = {path for path in linked if path.endswith(".civitai.info")}
        assert linked - sidecars == {m.path for m in group.members}
        own = {os.path.splitext(m.path)[0] + ".civitai.info" for m in group.members}
        assert sidecars == {path for path in own if os.path.exists(path)}
    assert os.listdir(tmp_path) == ["by style"]
    assert "links and 14 to sidecars and previews in" in done.stderr
    before = {p: os.lstat(p) for p in target.rglob("*")}
    done = small.run(db, "groups", "-k", "6", "--link", str(target))
    assert done.exit_code == 0 and ", as they were" in done.stderr
    assert {p: os.lstat(p) for p in target.rglob("*")} == before
    # Other groups replace them; what is not a link of ours is never replaced.
    assert small.run(db, "groups", "-k", "3", "--link", str(target)).exit_code == 0
    assert len(os.listdir(target)) == 4 and os.listdir(tmp_path) == ["by style"]
    mine = next(p for p in target.iterdir() if p.is_dir()) / "notes.txt"
    mine.write_text("mine")
    done = small.run(db, "groups", "-k", "6", "--link", str(target))
    assert done.exit_code == 4 and "notes.txt is no link that lorafind made" in done.stderr
    assert mine.read_text() == "mine" and len(os.listdir(target)) == 4
    (tmp_path / "used").mkdir()
    (tmp_path / "used/x").symlink_to("y")
    done = small.run(db, "groups", "-k", "6", "--link", str(tmp_path / "used"))
    assert done.exit_code == 4 and "is not empty" in done.stderr
    assert os.readlink(tmp_path / "used/x") == "y"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IndexProblem, match="is a file or a link"):
        link(found, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_links_of_one_name_and_of_gone_files(db: Path, tmp_path: Path) -> None:
    group = groups(db, 6)[0]
    made = []
    for number, member in enumerate(group.members[:3]):
        place = tmp_path / str(number) / "style.safetensors"
        place.parent.mkdir()
        place.write_bytes(b"x")
        made.append(sort.Member(**{**vars(member), "path": str(place), "other_paths": ()}))
    gone = sort.Member(**{**vars(made[0]), "path": str(tmp_path / "gone"), "other_paths": ()})
    whole = sort.Group(**{**vars(group), "central": made[0], "members": (*made, gone)})
    for number in range(2):
        (tmp_path / str(number) / "style.preview.png").write_bytes(b"x")
    made_ = link([whole], tmp_path / "links")
    assert (made_.links, made_.beside, made_.missing) == (3, 2, 1)
    place = tmp_path / "links/1 style"
    assert sorted(os.listdir(place)) == [
        "style (2).preview.png",
        "style (2).safetensors",
        "style (3).safetensors",
        "style.preview.png",
        "style.safetensors",
    ]
    for name in ("style", "style (2)"):
        weights, picture = (place / f"{name}{end}" for end in (".safetensors", ".preview.png"))
        assert Path(os.readlink(weights)).parent == Path(os.readlink(picture)).parent


def test_a_file_system_without_links_is_named(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, place: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    group = groups(db, 6)[0]
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(IndexProblem, match="name a folder on a file system that has links"):
        link([group], tmp_path / "links")
    assert os.listdir(tmp_path) == []


def test_interrupted_links_leave_nothing(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = groups(db, 6)[0]
    count = 0

    def interrupt(path: str, place: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "symlink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        link([group], tmp_path / "links")
    assert os.listdir(tmp_path) == []
    assert all(Path(m.path).is_file() for m in group.members)


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("a/b\\c:d", "a_b_c_d"),
        ("..", "_"),
        ("", "_"),
        ("CON", "_CON"),
        ("x\n\x1b[2J", "x__[2J"),
        ("é" * 200, "é" * 80),
        ("name. ", "name"),
    ],
)
def test_safe_names(given: str, safe: str) -> None:
    assert safe_name(given) == safe


@pytest.mark.parametrize(("number", "least"), [(20, 88.0), (None, 88.0)])
def test_fontbench(shared: Path, tmp_path: Path, number: int | None, least: float) -> None:
    """The training files of the wild world: reference 90.7 ± 1.4 for k-means on 15 components."""
    folder = shared / "loras/fontbench/wild"
    with (folder / "labels.csv").open(newline="") as file:
        artist = {
            row["file"]: row["artist"] for row in csv.DictReader(file) if row["split"] == "train"
        }
    (tmp_path / "train").mkdir()
    for name in artist:
        (tmp_path / "train" / name).symlink_to(folder / name)
    small.index(tmp_path / "i.db", tmp_path / "train", relate=False)
    with Index.open(tmp_path / "i.db", write=True) as index:
        index.finish()
    given, found = [], []
    for group in groups(tmp_path / "i.db", number):
        for member in group.members:
            given.append(artist[os.path.basename(member.path)])
            # A LoRA of no group is one of its own.
            found.append(group.number or -member.lora)
    assert len(given) == 160
    assert 100 * adjusted_rand_score(given, found) >= least

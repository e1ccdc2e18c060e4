"""``lorafind map`` as a user sees it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

import lorafind
from lorafind.demo.make import make
from lorafind.map.collect import Wishes
from tests.search import small

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("map")
    make(folder / "demo")
    small.index(folder / "i.db", folder / "demo")
    return folder / "i.db"


def data(page: Path) -> dict[str, Any]:
    found = re.search('<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found
    told: dict[str, Any] = json.loads(found[1])
    return told


def test_a_page(db: Path, tmp_path: Path) -> None:
    done = small.run(db, "map", "-o", str(tmp_path / "m.html"), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["path"] == str(tmp_path / "m.html") and told["layout"] == "components"
    listed = json.loads(small.run(db, "ls", "--json", "--arch", told["architecture"]).stdout)
    found = data(tmp_path / "m.html")
    assert told["points"] == len(found["path"]) == len({row["content"] for row in listed})
    assert set(found["path"]) <= {row["path"] for row in listed}
    assert "folder" in told["colours"]


def test_lines(db: Path, tmp_path: Path) -> None:
    done = small.run(db, "map", "-o", str(tmp_path / "m.html"), "--header", "-k", "0")
    header, line = (row.split("\t") for row in done.stdout.splitlines())
    assert header == ["path", "architecture", "points", "basis", "layout", "colours"]
    assert "group" not in json.loads(line[-1]) and line[0] == str(tmp_path / "m.html")


def test_groups_are_those_of_groups(db: Path, tmp_path: Path) -> None:
    assert small.run(db, "map", "-o", str(tmp_path / "m.html"), "-k", "6").exit_code == 0
    found = data(tmp_path / "m.html")
    mine: dict[str, set[str]] = {}
    for path, group in zip(found["path"], found["group"], strict=True):
        mine.setdefault(group, set()).add(path)
    told = json.loads(small.run(db, "groups", "-k", "6", "--json").stdout)
    theirs = [{m["path"] for m in group["members"]} for group in told if group["group"]]
    assert len(theirs) == 6
    assert sorted(map(sorted, mine.values())) == sorted(map(sorted, theirs))


def test_the_preview_beside_a_file_is_in_the_page(db: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    beside = db.parent / "demo/wild/lobster-train-02.preview.png"
    image.new("RGB", (640, 320), "teal").save(beside)
    try:
        done = small.run(db, "map", "-o", str(tmp_path / "m.html"), "--json")
        none = small.run(db, "map", "-o", str(tmp_path / "n.html"), "--json", "--pictures", "0")
    finally:
        beside.unlink()
    assert json.loads(done.stdout)["pictures"] == 1
    assert json.loads(none.stdout)["pictures"] == 0
    found = data(tmp_path / "m.html")
    ((number, text),) = found["pictures"].items()
    assert Path(found["path"][int(number)]).name == "lobster-train-02.safetensors"
    with image.open(io.BytesIO(base64.b64decode(text))) as small_one:
        assert small_one.width == 2 * small_one.height <= 640
        red, green, blue = small_one.convert("RGB").getpixel((5, 5))
        assert red < 20 and abs(green - 128) < 20 and abs(blue - 128) < 20


def test_labels_colours_and_pictures(db: Path, tmp_path: Path) -> None:
    rows = json.loads(small.run(db, "ls", "--json").stdout)
    lines = {Path(row["path"]).name: row["path"].split("/")[-1].split("-")[0] for row in rows}
    text = "file,artist\n" + "".join(f"{name},{font}\n" for name, font in lines.items())
    (tmp_path / "labels.csv").write_text(text)
    for name in ("m.png", "m.svg", "m.html"):
        done = small.run(
            db, "map", "-o", str(tmp_path / name), "--labels", str(tmp_path / "labels.csv"),
            "--colour", "label",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert re.match(r"\d+ of \d+ LoRAs have a label", done.stderr)
    assert "lobster" in (tmp_path / "m.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("-o", "m.txt"), 2, "no ending that says what to write"),
        (("-o", "m.html", "--layout", "pca"), 2, "components, tsne, umap"),
        (("-o", "m.html", "--arch", "sdxl"), 4, "no LoRA of 'sdxl'"),
        (("-o", "m.html", "--basis", "mine"), 4, "no basis 'mine'"),
        (("-o", "m.html", "--colour", "genre"), 2, "tells no two of these LoRAs apart"),
        (("-o", "away/m.html"), 2, "There is no file or folder"),
        (("-o", "m.html", "--labels", "away.csv"), 4, "cannot be read as CSV"),
    ],
)
def test_refusals(
    db: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = small.run(db, "map", *arguments)
    assert done.exit_code == code
    assert sentence in done.output + capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_python(db: Path, tmp_path: Path) -> None:
    with lorafind.Index.open(db) as index:
        made = index.map(tmp_path / "m.html", Wishes(layout="tsne", groups=0))
        with pytest.raises(ValueError, match="no ending"):
            index.map(tmp_path / "m.gif")
    assert len(data(tmp_path / "m.html")["path"]) == len(made.points)

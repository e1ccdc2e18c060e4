"""``lorafind train-many``, and what rebuild-basis, eval and similar make of its LoRAs.

Two artists whose pictures differ clearly, and a tiny model that tells noise from pictures a little
(:mod:`tests.train.fitted`).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from tests.train import fitted, tiny
from tests.train.conftest import apart

__all__ = ["apart"]

#: Three training LoRAs of six pictures and one of each other kind, per artist.
SET = (
    *("--loras", "3", "--size", "6", "--calibration", "1", "--queries", "1", "--few", "2"),
    *("--held-back", "3"),
)
COURSE = (
    *("--resolution", "64", "--steps", "20", "--batch-size", "8", "--learning-rate", "2e-3"),
    *("--rank", "16", "--alpha", "16", "--prior-weight", "0"),
)


def call(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(make_app(), [*map(str, arguments)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def rows(*arguments: str | Path, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted.save(tmp_path_factory.mktemp("fitted") / "model")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen pictures of each artist, in folders of their genre."""
    place: Path = tmp_path_factory.mktemp("museum") / "pictures"
    for style, genre in zip(tiny.STYLES, ("warm", "cold"), strict=True):
        tiny.paint(place / genre / style, style, range(18))
    return place


@pytest.fixture(scope="module")
def museum(model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a data set, and what the command printed."""
    out: Path = tmp_path_factory.mktemp("museum") / "loras"
    told = rows("train-many", root, "-o", out, "--model", model, *SET, *COURSE, "--parallel", "6")
    return out, told


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIND_DB", str(tmp_path / "index.db"))
    return tmp_path / "index.db"


def labels(out: Path) -> list[dict[str, str]]:
    with (out / "labels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_line_per_artist(museum: tuple[Path, Any]) -> None:
    out, told = museum
    assert [row["artist"] for row in told] == ["rings", "stripes"]
    for row, genre in zip(told, ("warm", "cold"), strict=True):
        numbers = {"pictures": 18, "training": 12, "validation": 3, "test": 3}
        numbers |= {"loras": 6, "done": 6}
        assert row | numbers | {"genre": genre, "reason": "", "warnings": []} == row
        assert 0 <= row["overlap"] <= row["overlap_most"] <= 5
    assert len(labels(out)) == 12
    assert all((out / row["file"]).is_file() for row in labels(out))


def test_a_second_time_and_a_dry_run_train_nothing(
    museum: tuple[Path, Any], model: Path, root: Path
) -> None:
    out, told = museum
    arguments = ("train-many", root, "-o", out, "--model", model, *SET, *COURSE)
    again = call(*arguments)
    assert "12 LoRAs are done already." in again.stderr
    assert f"0 LoRAs trained; {out} holds 12." in again.stderr
    before = sorted(out.rglob("*"))
    dry = call(*arguments, "--same", "--dry-run", "--json")
    assert sorted(out.rglob("*")) == before
    # One calibration LoRA of six pictures more; six cannot be drawn from three held back.
    assert [row["loras"] for row in json.loads(dry.stdout)] == [7, 7]
    assert "no test LoRAs of 6 pictures" in dry.stderr
    assert "Training: 2 LoRAs, 1 at once; 160 layers" in dry.stderr
    assert "each. \n" not in dry.stderr and "steps each." in dry.stderr
    assert [row["done"] for row in told] == [6, 6]


def test_similar_tells_the_artists_apart(museum: tuple[Path, Any], db: Path) -> None:
    """LoRAs of one artist, each of its own seed, are nearer to each other than to the other's."""
    out, _ = museum
    call("index", out)
    artists = {str(out / row["file"]): row["artist"] for row in labels(out)}
    trained = [str(out / row["file"]) for row in labels(out) if row["split"] == "train"]
    within: list[float] = []
    across: list[float] = []
    for path in artists:
        found = rows("similar", path, "-k", "99", "--all", "--basis", "plain")
        assert len(found) == 11
        for one in found if path in trained else ():
            if one["path"] in trained:
                same = artists[one["path"]] == artists[path]
                (within if same else across).append(one["score"])
    assert (len(within), len(across)) == (12, 18)
    assert min(within) > max(across)


def test_rebuild_basis_and_eval(museum: tuple[Path, Any], db: Path, tmp_path: Path) -> None:
    out, _ = museum
    basis = tmp_path / "museum.safetensors"
    found = rows("rebuild-basis", out, "-o", basis)
    by_split = {row["split"]: row for row in found}
    assert set(by_split) == {"validation", "test"}
    assert {row["queries"] for row in found} == {2}
    # One query per artist, three of six LoRAs to find: at worst at places 4, 5 and 6.
    assert 100 * (1 / 4 + 2 / 5 + 3 / 6) / 3 - 0.01 <= by_split["test"]["plain"] <= 100
    report = rows("eval", out, "--features", "style,theta", "--groups", "all", "--components", "2")
    protocol = [row for row in report if row["table"] == "protocol" and row["split"] == "test"]
    assert {row["feature"] for row in protocol} == {"style", "theta"}
    assert all(row["map"] is not None for row in protocol if row["queries"] and not row["ari"])


def test_artists_that_cannot_be_trained_are_left_out(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tiny.paint(root / "rings", "rings", range(8))
    tiny.paint(root / "stripes", "stripes", range(8), captions=False)
    tiny.paint(root / "few", "rings", range(20, 22))
    (root / "genres.csv").write_text("artist,genre\nrings,warm\n")
    out = tmp_path / "out"
    quick = ("--model", model, "--resolution", "64", "--steps", "1", "--rank", "1")
    arguments: tuple[str | Path, ...] = (
        *("train-many", root, "-o", out),
        *(*quick, "--prior-weight", "0"),
        *("--loras", "1", "--size", "2", "--held-back", "1", "--few", "1"),
        *("--calibration", "0", "--queries", "0"),
    )
    planned = {row["artist"]: row for row in rows(*arguments, "--dry-run", code=3)}
    assert not out.exists()
    done = call(*arguments, "--json", "--one-seed", code=3)
    found = {row["artist"]: row for row in json.loads(done.stdout)}
    assert {name: row["done"] for name, row in found.items()} == {
        "few": 0,
        "rings": 1,
        "stripes": 0,
    }
    for name, words in (("few", "2 pictures are too few"), ("stripes", "has a caption")):
        assert words in found[name]["reason"] == planned[name]["reason"]
        assert f"warning: {name}: {found[name]['reason']}" in done.stderr
    assert [(row["genre"], row["seed"]) for row in labels(out)] == [("warm", "0")]
    failed = json.loads((out / "train-many.json").read_text())["failed"]
    assert set(failed) == {"few", "stripes"}


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--size", "0"), "0 for size is too few", 2),
        (("--parallel", "0"), "--parallel", 2),
        (("--names", "keep"), "refuse, drop, allow", 4),
        (("-o", "{root}/loras"), "cannot lie among the pictures", 2),
        (("--class-images", "{root}"), "holds no pictures: files are looked for", 4),
        (("--held-back", "1", "--size", "99"), "Of no artist of", 4),
        (("--format", "x"), "--format is one of", 2),
    ],
)
def test_wrong_use(
    root: Path, tmp_path: Path, options: tuple[str, ...], words: str, code: int
) -> None:
    given = [option.format(root=root) for option in options]
    result = call("train-many", root, "-o", tmp_path / "out", *given, code=code)
    assert words in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()

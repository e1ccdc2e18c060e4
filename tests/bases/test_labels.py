"""Labelled folders and CSV files, and how splits are made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lorafind.bases.labels import Labelled, queries, read_labels, with_splits
from lorafind.bases.problem import BasisProblem


def test_a_folder_names_its_artist(tmp_path: Path) -> None:
    for name in ("monet/a.safetensors", "monet/deep/b.safetensors", "goya/c.pt", "goya/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loose.safetensors").touch()
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash/d.safetensors").touch()
    found = {one.path.relative_to(tmp_path).as_posix(): one.artist for one in read_labels(tmp_path)}
    assert found == {
        "goya/c.pt": "goya",
        "monet/a.safetensors": "monet",
        "monet/deep/b.safetensors": "monet",
    }


def test_a_table_says_more(tmp_path: Path) -> None:
    text = "file,artist,genre,split,images,rank\nx.safetensors, monet ,impressionism,train,10,4\n"
    (tmp_path / "labels.csv").write_text("\ufeff" + text, "utf-8")
    (one,) = read_labels(tmp_path)
    path = tmp_path / "x.safetensors"
    assert one == Labelled(path, "monet", "impressionism", "train", 10)
    (tmp_path / "other.csv").write_text("file,artist\ny.safetensors,goya\n")
    (other,) = read_labels(tmp_path, tmp_path / "other.csv")
    assert other == Labelled(tmp_path / "y.safetensors", "goya")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,artist\nx,y\n", "no column 'file'"),
        ("file,painter\nx,y\n", "no column 'artist'"),
        ("file,artist,split\nx,y,exam\n", "line 2: 'exam' is no split"),
        ("file,artist\nx,\n", "line 2: a file and an artist"),
        ("file,artist\n", "no labelled LoRA"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(BasisProblem, match=said):
        read_labels(tmp_path)


def test_a_missing_folder_or_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(BasisProblem, match="is no folder"):
        read_labels(tmp_path / "none")
    with pytest.raises(BasisProblem, match="cannot be read"):
        read_labels(tmp_path, tmp_path / "none.csv")
    with pytest.raises(BasisProblem, match="no labelled LoRA"):
        read_labels(tmp_path)


def made(each: int, artists: int = 3) -> list[Labelled]:
    return [Labelled(Path(f"{a}/{k}"), f"artist {a}") for a in range(artists) for k in range(each)]


def test_thirty_loras_are_divided_as_in_the_paper() -> None:
    found = with_splits(made(30), seed=1)
    assert [one.path for one in found] == [one.path for one in made(30)]
    for artist in range(3):
        count = Counter(one.split for one in found if one.artist == f"artist {artist}")
        assert count == {"train": 21, "calibration": 3, "validation": 3, "test": 3}
    assert found == with_splits(made(30), seed=1) != with_splits(made(30), seed=2)


def test_few_loras_only_train() -> None:
    assert {one.split for one in with_splits(made(5))} == {"train"}
    assert Counter(one.split for one in with_splits(made(6, 1))) == {
        "train": 3,
        "calibration": 1,
        "validation": 1,
        "test": 1,
    }


def test_named_splits_are_kept() -> None:
    given = [Labelled(Path("a"), "x", split="test_same"), Labelled(Path("b"), "x")]
    assert [one.split for one in with_splits(given)] == ["test_same", "train"]
    assert queries(given) == ("test_same",)

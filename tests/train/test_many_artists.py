"""Folders of artists, genres, and captions that name the artist."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafind.train.artists import Artist, find_artists, naming
from lorafind.train.images import Picture
from lorafind.train.problem import TrainProblem


def folder(place: Path, *pictures: str) -> Path:
    place.mkdir(parents=True)
    for name in pictures:
        (place / name).write_bytes(b"")
    return place


def picture(caption: str) -> Picture:
    return Picture(Path("a.png"), caption, "0" * 64, 9, 9)


def test_a_folder_per_artist(tmp_path: Path) -> None:
    folder(tmp_path / "Édouard Manet", "a.png")
    folder(tmp_path / "Monet", "a.JPG")
    folder(tmp_path / ".cache", "a.png")
    (tmp_path / "readme.txt").write_text("x")
    assert find_artists(tmp_path) == [
        Artist("Monet", tmp_path / "Monet"),
        Artist("Édouard Manet", tmp_path / "Édouard Manet"),
    ]
    assert [a.stem for a in find_artists(tmp_path)] == ["monet", "édouard-manet"]


def test_two_levels_and_a_table_of_genres(tmp_path: Path) -> None:
    folder(tmp_path / "impressionism" / "Monet", "a.png")
    folder(tmp_path / "impressionism" / "Manet", "a.png")
    folder(tmp_path / "Klee", "a.png")
    folder(tmp_path / "Klee" / "sketches", "b.png")
    (tmp_path / "genres.csv").write_text("artist,genre\nManet,realism\nKlee, modern \n", "utf-8")
    found = {a.name: (a.genre, a.folder.name) for a in find_artists(tmp_path)}
    assert found == {
        "Klee": ("modern", "Klee"),
        "Manet": ("realism", "Manet"),
        "Monet": ("impressionism", "Monet"),
    }


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TrainProblem, match="There is no folder"):
        find_artists(tmp_path / "nothing")
    with pytest.raises(TrainProblem, match="holds no folders"):
        find_artists(tmp_path)
    folder(tmp_path / "one" / "Jan Steen", "a.png")
    folder(tmp_path / "two" / "jan_steen", "a.png")
    with pytest.raises(TrainProblem, match="called alike"):
        find_artists(tmp_path)
    (tmp_path / "loose.png").write_bytes(b"")
    with pytest.raises(TrainProblem, match="1 pictures itself"):
        find_artists(tmp_path)


def test_what_is_wrong_with_a_table_of_genres(tmp_path: Path) -> None:
    folder(tmp_path / "Klee", "a.png")
    table = tmp_path / "genres.csv"
    table.write_text("artist;genre\nKlee;modern\n")
    with pytest.raises(TrainProblem, match="columns artist and genre"):
        find_artists(tmp_path)
    table.write_text("artist,genre\nKlea,modern\n")
    with pytest.raises(TrainProblem, match="names 'Klea', of which there is no folder"):
        find_artists(tmp_path)
    table.write_bytes(b"artist,genre\nKl\xe9,modern\n")
    with pytest.raises(TrainProblem, match="cannot be read"):
        find_artists(tmp_path)


@pytest.mark.parametrize(
    ("artist", "caption", "words"),
    [
        ("claude-monet", "water lilies by Claude Monet", "claude, monet"),
        ("claude-monet", "a MONET's garden", "monet"),
        ("claude-monet", "claudemonet style", "claudemonet"),
        ("Édouard Manet", "by edouard", "edouard"),
        ("Edouard Manet", "by Édouard", "edouard"),
        ("Vincent van Gogh", "a van by the road", ""),
        ("Vincent van Gogh", "in the style of gogh", "gogh"),
        ("claude-monet", "monetary things, a cloud", ""),
        ("Grant Wood", "a table of wood", "wood"),
        ("El Greco", "el hombre", ""),
        ("Bo", "bo at sea", "bo"),
        ("北斎", "北斎 の 波", "北斎"),
        ("claude-monet", "", ""),
    ],
)
def test_captions_that_name_the_artist(artist: str, caption: str, words: str) -> None:
    one = picture(caption)
    assert naming(artist, [picture("a tree"), one]) == ([(one, words)] if words else [])

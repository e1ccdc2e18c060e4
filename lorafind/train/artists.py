"""Folders of pictures per artist, their genres, and captions that name the artist.

``ROOT/<artist>/`` or ``ROOT/<genre>/<artist>/``; a ``genres.csv`` in ROOT (columns ``artist`` and
``genre``) says the genres of the first kind, and has the last word on those of the second.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafind.train.images import SUFFIXES, Picture
from lorafind.train.problem import TrainProblem

GENRES = "genres.csv"
#: Words in names that say nothing of who it is.
_PARTICLES = frozenset(
    ("and", "dal", "das", "del", "den", "der", "des", "dos", "the", "van", "von")
)
_SHORTEST = 3


@dataclass(frozen=True)
class Artist:
    """A folder of one artist's pictures. name: the folder's; genre: empty where nothing is said."""

    name: str
    folder: Path
    genre: str = ""

    @property
    def stem(self) -> str:
        """The name as file names have it: lower case, letters and digits of any script."""
        return re.sub(r"[\W_]+", "-", self.name.casefold()).strip("-") or "artist"


def find_artists(root: Path) -> list[Artist]:
    """The artists of a folder, by name.

    Raises TrainProblem where there is none, two have one name, pictures lie outside of an artist's
    folder, or genres.csv cannot be read or names an artist that is not there.
    """
    if not root.is_dir():
        raise TrainProblem(f"There is no folder {root}: name one with a folder per artist.")
    if loose := sum(_is_picture(path) for path in root.iterdir()):
        raise TrainProblem(
            f"{root} holds {loose:,} pictures itself: put those of every artist into a folder of "
            "the artist's name."
        )
    found = []
    for folder in _folders(root):
        inner = _folders(folder)
        if inner and not any(map(_is_picture, folder.iterdir())):
            found += [Artist(one.name, one, folder.name) for one in inner]
        else:
            found.append(Artist(folder.name, folder))
    if not found:
        raise TrainProblem(f"{root} holds no folders: one per artist is expected.")
    _distinct(found)
    genres = _genres(root / GENRES, {artist.name for artist in found})
    named = [Artist(a.name, a.folder, genres.get(a.name, a.genre)) for a in found]
    return sorted(named, key=lambda artist: artist.name)


def naming(artist: str, pictures: Sequence[Picture]) -> list[tuple[Picture, str]]:
    """The pictures whose caption names the artist, and the words that do.

    A caption does where it has a word of the name, of three letters or more and no particle, or
    the whole name in one word; case and accents do not count. A name such as Wood is also found
    where the word means wood.
    """
    wanted = {word for word in _words(artist) if len(word) >= _SHORTEST} - _PARTICLES
    wanted |= {"".join(_words(artist))}
    found = []
    for picture in pictures:
        said = wanted & set(_words(picture.caption))
        if said:
            found.append((picture, ", ".join(sorted(said))))
    return found


def _words(text: str) -> list[str]:
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c)
    )
    return re.findall(r"[^\W\d_]+", plain)


def _folders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _distinct(artists: Sequence[Artist]) -> None:
    known: dict[str, Artist] = {}
    for artist in artists:
        other = known.setdefault(artist.stem, artist)
        if other is not artist:
            raise TrainProblem(
                f"{other.folder} and {artist.folder} are called alike: every artist needs one "
                "folder, and a name that differs in letters or digits."
            )


def _genres(file: Path, known: set[str]) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainProblem(f"{file} cannot be read as CSV: {error}.") from error
    if not {"artist", "genre"} <= set(reader.fieldnames or ()):
        raise TrainProblem(f"{file} needs the columns artist and genre, named in its first line.")
    found = {(r["artist"] or "").strip(): (r["genre"] or "").strip() for r in rows}
    if strangers := sorted(set(found) - known):
        raise TrainProblem(f"{file} names {strangers[0]!r}, of which there is no folder.")
    return found

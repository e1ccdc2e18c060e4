"""What a point of the map shows: names, paths, labels, and the picture beside the file."""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from lorafind.bases.labels import Labelled
from lorafind.files.opening import open_regular
from lorafind.files.sidecars import PREVIEWS
from lorafind.index.progress import Progress, Silent
from lorafind.index.rows import readable
from lorafind.index.store import Store
from lorafind.search.targets import cards

#: Of what strangers wrote no more is shown: characters of a text, trigger words.
MAX_TEXT, MAX_WORDS = 200, 12
#: A picture with a larger file, or more pixels, is not opened.
MAX_FILE, MAX_PIXELS = 32 * 2**20, 50_000_000
#: Edge of a thumbnail in pixels: the largest with which all are likely to fit, else the last.
EDGES = {144: 9_000, 96: 5_000, 64: 2_500}
#: Bytes of thumbnails in one page.
PICTURES = 16 * 2**20
_CARDS = 512
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Point:
    """One LoRA; every text is one line without control characters, empty where unknown.

    folder: of its first path, below the folder that all share. paths: of its other copies.
    """

    lora: int
    path: str
    name: str
    rank: str
    family: str
    trigger_words: tuple[str, ...]
    base_model: str
    folder: str
    label: str = ""
    genre: str = ""
    group: str = ""
    copies: int = 0


def points(
    store: Store,
    ids: Sequence[int],
    labels: Sequence[Labelled] = (),
    groups: Mapping[int, str] | None = None,
) -> list[Point]:
    """One point per id, in their order.

    labels: matched by path, else by a file name that only one of them has. groups: LoRA id → name
    of its style group.
    """
    known = {}
    for start in range(0, len(ids), _CARDS):
        known.update(cards(store, list(ids[start : start + _CARDS])))
    above = _above([known[i].paths[0] for i in ids if known[i].paths])
    label_of = _matcher(labels)
    found = []
    for lora in ids:
        card = known[lora]
        path = card.paths[0] if card.paths else ""
        label = label_of(card.paths)
        found.append(
            Point(
                lora,
                line(path),
                _short(card.name or os.path.splitext(os.path.basename(path))[0]),
                card.rank,
                card.family,
                tuple(_short(word) for word in card.trigger_words[:MAX_WORDS]),
                _short(card.base_model),
                _short(os.path.relpath(os.path.dirname(path), above)) if path else "",
                _short(label.artist) if label else "",
                _short(label.genre) if label else "",
                (groups or {}).get(lora, ""),
                max(0, len(card.paths) - 1),
            )
        )
    return found


def line(text: str) -> str:
    """``text`` on one line: escapes for control characters, turned writing, undecodable bytes."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", readable(text))


def _short(text: str) -> str:
    text = line(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _above(paths: Sequence[str]) -> str:
    """The folder that all files share; of several drives, none."""
    try:
        return os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:
        return os.sep


def _matcher(labels: Sequence[Labelled]) -> Callable[[Sequence[str]], Labelled | None]:
    by_path = {os.path.realpath(one.path): one for one in labels}
    names = Counter(one.path.name for one in labels)
    by_name = {one.path.name: one for one in labels if names[one.path.name] == 1}

    def match(paths: Sequence[str]) -> Labelled | None:
        for path in paths if by_path else ():
            if (found := by_path.get(os.path.realpath(path))) is not None:
                return found
        for path in paths:
            if (found := by_name.get(os.path.basename(path))) is not None:
                return found
        return None

    return match


# ---------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Pictures:
    """Thumbnails: LoRA id → JPEG in base64.

    broken: path and reason of previews that could not be shown; left_out: how many more there were
    than the page has room for.
    """

    jpegs: Mapping[int, str]
    broken: tuple[tuple[str, str], ...] = ()
    left_out: int = 0


def previews(store: Store, ids: Sequence[int]) -> dict[int, Path]:
    """The picture that lies beside a file of each LoRA, where one does; folders are listed once."""
    listed: dict[str, frozenset[str]] = {}
    found = {}
    for start in range(0, len(ids), _CARDS):
        for lora, card in cards(store, list(ids[start : start + _CARDS])).items():
            for path in card.paths:
                folder, name = os.path.split(path)
                stem = os.path.splitext(name)[0]
                if folder not in listed:
                    listed[folder] = _names(folder)
                beside = next((stem + p for p in PREVIEWS if stem + p in listed[folder]), None)
                if beside is not None:
                    found[lora] = Path(folder, beside)
                    break
    return found


def _names(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        # A drive that is away has no pictures to show; the index says so, not the map.
        return frozenset()


def thumbnails(
    found: Mapping[int, Path], room: int = PICTURES, progress: Progress | None = None
) -> Pictures:
    """Small JPEGs of pictures, together at most ``room`` bytes as base64.

    Videos and formats that Pillow cannot read, broken pictures and bombs are named in ``broken``.
    Without Pillow there are none, and that is named once.
    """
    progress = progress or Silent()
    if not found or not room:
        return Pictures({}, (), len(found))
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError:
        why = "Pillow is missing: pip install 'lorafind[map]'"
        return Pictures({}, (("previews", why),), len(found))
    edge = next((e for e, size in EDGES.items() if size * len(found) <= room), min(EDGES))
    jpegs: dict[int, str] = {}
    broken = []
    used = left_out = 0
    progress.stage("pictures", len(found), 0)
    for lora, path in found.items():
        try:
            text = base64.b64encode(thumbnail(path, edge)).decode()
        except (OSError, ValueError, SyntaxError) as error:
            broken.append((str(path), str(error)))
        else:
            if used + len(text) > room:
                left_out += 1
            else:
                jpegs[lora], used = text, used + len(text)
        progress.advance(1, 0)
    return Pictures(jpegs, tuple(broken), left_out)


def thumbnail(path: Path, edge: int) -> bytes:
    """A JPEG that fits into edge × edge pixels: the first picture of an animation, no metadata.

    Raises OSError or ValueError with a reason.
    """
    from PIL import Image, ImageOps

    with open_regular(path) as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"it is larger than {MAX_FILE:,} bytes")
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
            picture.draft("RGB", (2 * edge, 2 * edge))
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except Image.DecompressionBombError as error:
        raise ValueError("it has too many pixels") from error
    upright.thumbnail((edge, edge))
    ground = Image.new("RGB", upright.size, "white")
    ground.paste(upright, mask=upright.getchannel("A"))
    out = BytesIO()
    ground.save(out, "JPEG", quality=72, optimize=True)
    return out.getvalue()

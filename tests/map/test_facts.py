"""What points show: names, labels, pictures."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from lorafind.bases.labels import Labelled
from lorafind.index.store import Store
from lorafind.map import facts
from lorafind.map.colouring import MOST, OTHERS, colourings
from tests.map.made import point
from tests.search import small

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four LoRAs in two folders, with pictures beside three of them."""
    folder = tmp_path_factory.mktemp("facts")
    told = {"ss_tag_frequency": {"1_x": {"blue": 9}}, "modelspec.trigger_phrase": "sky, sea"}
    for k, name in enumerate(("a/x", "a/y", "b/z", "b/evil\n\x1b[31m<b>")):
        small.save(folder / "loras" / f"{name}.safetensors", small.random(k), told)
    g = np.random.default_rng(0)
    noise = Image.fromarray(g.integers(0, 256, (300, 500, 3)).astype("u1"))
    noise.save(folder / "loras/a/x.preview.png")
    noise.save(folder / "loras/a/y.jpg")
    (folder / "loras/b/z.webp").write_bytes(b"RIFF no picture")
    small.index(folder / "i.db", folder / "loras", relate=False)
    return folder / "i.db"


def ids(store: Store) -> list[int]:
    return [lora for (lora,) in store.conn.execute("SELECT id FROM loras ORDER BY id")]


def test_points(db: Path) -> None:
    labels = [
        Labelled(db.parent / "loras/a/x.safetensors", "monet", "oil"),
        # Elsewhere, but only one label has this file name.
        Labelled(Path("/elsewhere/z.safetensors"), "hokusai", "print"),
        Labelled(Path("/one/y.safetensors"), "p"),
        Labelled(Path("/two/y.safetensors"), "q"),
    ]
    with Store.open(db) as store:
        found = {Path(p.path).name: p for p in facts.points(store, ids(store), labels)}
    x, y, z = (found[f"{name}.safetensors"] for name in "xyz")
    evil = next(p for name, p in found.items() if name.startswith("evil"))
    assert (x.folder, y.folder, z.folder) == ("a", "a", "b")
    assert (x.label, x.genre, z.label, y.label) == ("monet", "oil", "hokusai", "")
    assert x.rank == "4" and x.family == "lora"
    assert evil.path.endswith("evil\\u000a\\u001b[31m<b>.safetensors")
    assert "\n" not in evil.name and "\x1b" not in evil.name


def test_long_texts_are_cut_and_odd_ones_escaped() -> None:
    assert facts.line("a\u202eb\udcff") == "a\\u202eb\\udcff"
    assert len(facts._short("x" * 1000)) == facts.MAX_TEXT


def test_thumbnails(db: Path) -> None:
    with Store.open(db) as store:
        found = facts.previews(store, ids(store))
        assert sorted(p.name for p in found.values()) == ["x.preview.png", "y.jpg", "z.webp"]
        made = facts.thumbnails(found)
        room = max(map(len, made.jpegs.values())) + 10
        less = facts.thumbnails(found, room=room)
        none = facts.thumbnails(found, room=0)
    assert len(made.jpegs) == 2 and [Path(p).name for p, _ in made.broken] == ["z.webp"]
    for text in made.jpegs.values():
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            assert picture.format == "JPEG" and max(picture.size) == max(facts.EDGES)
            assert picture.size[0] / picture.size[1] == pytest.approx(500 / 300, rel=0.02)
    assert sum(map(len, less.jpegs.values())) <= room
    assert len(less.jpegs) + less.left_out == 2
    assert (len(none.jpegs), none.left_out) == (0, 3)


def test_bombs_are_refused(tmp_path: Path) -> None:
    """A PNG of 60,000 × 60,000 pixels in a few bytes, and one just above the limit."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    for k, edge in enumerate((60_000, 8_000)):
        head = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
        (tmp_path / f"{k}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(bytes(1000)))
            + chunk(b"IEND", b"")
        )
    made = facts.thumbnails({k: tmp_path / f"{k}.png" for k in range(2)})
    assert not made.jpegs and all("pixels" in why for _, why in made.broken), made.broken


def test_transparent_and_turned_pictures(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    with Image.open(io.BytesIO(facts.thumbnail(tmp_path / "clear.png", 64))) as picture:
        assert picture.getpixel((5, 5)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=turned)
    with Image.open(io.BytesIO(facts.thumbnail(tmp_path / "turned.jpg", 64))) as picture:
        assert picture.size == (20, 40) and not picture.getexif()


def test_colourings() -> None:
    g = np.random.default_rng(0)
    points = [point(k, f"n{k}", folder=f"f{k % 70}", rank=str(4 << (k % 3))) for k in range(210)]
    points += [point(999, "last", folder="", rank="")]
    places = g.standard_normal((211, 3))
    found = {one.key: one for one in colourings(points, places[:, :2], places)}
    assert list(found) == ["folder", "rank"]
    assert found["rank"].names == ("4", "8", "16", "") and found["rank"].grey == 1
    folder = found["folder"]
    assert len(folder.names) == MOST + 2 and folder.names[MOST:] == (OTHERS, "")
    assert folder.grey == 2 and len(folder.shapes) == MOST
    for k, one in enumerate(points):
        name = folder.names[folder.of[k]]
        assert name == one.folder or (name == OTHERS and one.folder not in folder.names)
    assert sum(c == MOST for c in folder.of) == 30


def test_the_word_that_others_share_colours() -> None:
    words = (("mine", "monet"), ("monet",), ("zebra",))
    points = [
        facts.Point(k, f"/{k}", "", "4", "lora", told, "", "") for k, told in enumerate(words)
    ]
    found = {one.key: one for one in colourings(points, np.eye(3)[:, :2], np.eye(3))}
    assert [found["word"].names[c] for c in found["word"].of] == ["monet", "monet", "zebra"]

"""Pictures: every kind of file, what is wrong with any of them, and the square that is learnt."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorafind.train.images import decode, square, survey
from lorafind.train.problem import TrainProblem
from tests.train import tiny


def stored(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


def test_the_middle_square_is_learnt() -> None:
    wide = tiny.draw("rings", 0, (160, 80))
    # The whole picture at half size, then its middle.
    whole = np.asarray(wide.resize((80, 40), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(square(stored(wide), 40), whole[:, 20:60])
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    whole = np.asarray(tall.resize((40, 80), Image.Resampling.LANCZOS))
    # Pillow goes along the other axis first; it rounds in between.
    np.testing.assert_allclose(square(stored(tall), 40).astype(int), whole[20:60], atol=1)
    small = square(stored(tiny.draw("rings", 0, (20, 20))), 64)
    assert small.shape == (64, 64, 3) and small.dtype == np.uint8


def test_pictures_are_looked_at_upright() -> None:
    upright = tiny.draw("stripes", 0, (64, 48))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90° to look at
    found = decode(stored(turned, exif=exif))
    assert found.size == (64, 48)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((0, 0), (200, 0, 0, 255))
    clear.putpixel((1, 0), (200, 0, 0, 51))
    # 51/255 of the colour over white.
    expected = [[200, 0, 0], [244, 204, 204], [255, 255, 255], [255, 255, 255]]
    np.testing.assert_array_equal(np.asarray(decode(stored(clear)))[0], expected)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert decode(stored(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(stored(palette)).getpixel((0, 0)) == (0, 0, 200)
    grey = Image.new("LA", (4, 4), (90, 0))
    assert decode(stored(grey)).getpixel((0, 0)) == (255, 255, 255)


def test_all_kinds_of_files() -> None:
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        assert decode(stored(colour, kind)).getpixel((3, 3)) == (200, 100, 50)
    for kind in ("JPEG", "WEBP", "AVIF"):
        pixels = np.asarray(decode(stored(colour, kind)), int)
        assert np.abs(pixels - (200, 100, 50)).max() < 8
    printed = decode(stored(colour.convert("CMYK"), "TIFF"))
    assert printed.mode == "RGB" and printed.getpixel((3, 3)) == (200, 100, 50)
    assert decode(stored(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 0x8040, np.uint16))
    assert decode(stored(deep)).getpixel((0, 0)) == (128, 128, 128)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    moving = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(moving).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="floating point"):
        decode(stored(Image.new("F", (8, 8)), "TIFF"))


def test_what_is_no_picture_is_told_all_at_once(tmp_path: Path) -> None:
    tiny.paint(tmp_path, "rings", range(2))
    whole = stored(tiny.draw("rings", 5, (300, 300)), "JPEG")
    bad = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": stored(tiny.draw("rings", 5))[:3000],
        "empty.png": b"",
        "page.webp": b"<!doctype html><p>not found</p>",
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(64),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    # Neither pictures nor meant as such.
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("x")
    seen = survey([tmp_path], 64)
    assert {path.name for path, _ in seen.broken} == set(bad)
    assert all(why for _, why in seen.broken)
    assert [p.path.name for p in seen.pictures] == ["rings-0.png", "rings-1.png"]


def test_the_order_hangs_neither_on_folders_nor_on_the_command_line(
    rings: Path, stripes: Path, tmp_path: Path
) -> None:
    one = survey([rings, stripes], 64).pictures
    two = survey([stripes, rings / "rings-3.png", rings, rings], 64).pictures
    assert one == two and len(one) == 12
    for picture in one:
        (tmp_path / picture.path.name).write_bytes(picture.path.read_bytes())
    three = survey([tmp_path], 64).pictures
    assert [p.digest for p in three] == [p.digest for p in one]


def test_small_pictures_are_enlarged_with_a_warning_or_left_out(tmp_path: Path) -> None:
    for side in (40, 64, 100):
        tiny.draw("rings", side, (side + 30, side)).save(tmp_path / f"{side}.png")
    seen = survey([tmp_path], 64)
    assert len(seen.pictures) == 3
    assert seen.warnings == ["1 picture is smaller than 64 pixels and will be enlarged: 40.png."]
    seen = survey([tmp_path], 64, min_size=80)
    assert [p.path.name for p in seen.pictures] == ["100.png"]
    assert seen.warnings == ["2 pictures are left out, smaller than 80 pixels: 40.png, 64.png."]
    seen = survey([tmp_path], 64, min_size=64)
    assert {p.path.name for p in seen.pictures} == {"100.png", "64.png"}
    assert survey([tmp_path], 64, min_size=40).warnings == []
    with pytest.raises(TrainProblem, match="No picture has 200 pixels"):
        survey([tmp_path], 64, min_size=200)


def test_one_picture_under_two_names_is_told(tmp_path: Path) -> None:
    tiny.paint(tmp_path, "rings", range(1))
    (tmp_path / "copy.png").write_bytes((tmp_path / "rings-0.png").read_bytes())
    seen = survey([tmp_path], 64)
    assert len(seen.pictures) == 2
    assert seen.warnings == ["1 picture is there more than once and count as often: rings-0.png."]


def test_places_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny.paint(tmp_path / "museum" / "artist", "rings", range(3))
    with pytest.raises(TrainProblem, match=r"There is no file or folder .*nowhere"):
        survey([tmp_path / "nowhere"], 64)
    with pytest.raises(TrainProblem, match=r"empty holds no pictures: .*\.png"):
        survey([tmp_path / "empty"], 64)
    with pytest.raises(TrainProblem, match=r"museum holds no pictures itself.* hold 3: name"):
        survey([tmp_path / "museum"], 64)
    with pytest.raises(TrainProblem, match="No pictures are named"):
        survey([], 64)
    tiny.paint(tmp_path / "museum", "stripes", range(2))
    seen = survey([tmp_path / "museum"], 64)
    assert len(seen.pictures) == 2 and "The 3 pictures in folders within" in seen.warnings[0]


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    content = stored(Image.new("RGB", (2400, 2400), "teal"), "JPEG")
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from PIL import Image, JpegImagePlugin\n"
        "from lorafind.train.images import survey\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(survey([Path(sys.argv[1])], 64).pictures) == 40\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    scale = 1 if sys.platform == "darwin" else 1024
    # 40 decoded pictures are 660 MiB, those of all decoders (twice each, when turned) 132 MiB.
    assert int(done.stdout) * scale < 300 * 2**20

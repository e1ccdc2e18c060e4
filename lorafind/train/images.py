"""The pictures that a LoRA learns from: found, looked at whole, and brought to a square.

Everything that is wrong with any of them is told before a training begins, all at once.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafind.evaluation.images import DECODERS
from lorafind.evaluation.images import SUFFIXES as READABLE
from lorafind.index.progress import Progress, Silent
from lorafind.train.problem import TrainProblem

if TYPE_CHECKING:
    from PIL.Image import Image

#: Endings of pictures; those that Pillow does not know are told of, not passed over.
SUFFIXES = (*READABLE, ".heic", ".heif", ".jxl")
#: How many names a warning lists.
LISTED = 5


@dataclass(frozen=True)
class Picture:
    """A picture that can be read.

    caption: without the word [V], empty for none; digest: SHA-256 (hex) of the file; width, height:
    as it is looked at (upright), pixels; origin: of the caption, ``file``, ``blip`` or ``none``.
    """

    path: Path
    caption: str
    digest: str
    width: int
    height: int
    origin: str = "none"


@dataclass(frozen=True)
class Survey:
    """What lies in some folders.

    pictures: without captions, in the order of their file names and contents, which hangs neither
    on where they lie nor on how they were named on the command line; broken: files that are no
    readable picture, and why; warnings: sentences.
    """

    pictures: list[Picture]
    broken: list[tuple[Path, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def survey(
    sources: Sequence[Path],
    resolution: int,
    min_size: int | None = None,
    watch: Progress | None = None,
) -> Survey:
    """Read every picture of some folders and files to its end.

    sources: folders (their own files, not those of folders in them) and single files; resolution:
    pixels, below which a picture is enlarged, with a warning; min_size: leave out those whose
    shorter side is below it instead. At most DECODERS pictures are in memory at a time.

    Raises TrainProblem where a source is missing or holds no picture, or min_size leaves none.
    """
    watch = watch or Silent()
    paths, warnings = _files(sources)
    watch.stage("Pictures", len(paths), 0)
    pictures, broken = [], []
    with ThreadPoolExecutor(DECODERS) as pool:
        for path, seen in zip(paths, pool.map(_look, paths), strict=True):
            if isinstance(seen, str):
                broken.append((path, seen))
            else:
                pictures.append(seen)
            watch.advance(1, 0)
    pictures.sort(key=lambda p: (p.path.name, p.digest))
    least = resolution if min_size is None else min_size
    small = [p for p in pictures if min(p.width, p.height) < least]
    if small and min_size is not None:
        pictures = [p for p in pictures if min(p.width, p.height) >= least]
        warnings.append(
            f"{counted(small)} left out, smaller than {min_size} pixels: {listed(small)}."
        )
        if not pictures:
            raise TrainProblem(f"No picture has {min_size} pixels or more on its shorter side.")
    elif small:
        warnings.append(
            f"{counted(small)} smaller than {resolution} pixels and will be enlarged: "
            f"{listed(small)}."
        )
    return Survey(pictures, broken, warnings + _twins(pictures))


def square(content: bytes, resolution: int) -> np.ndarray:
    """A file's bytes → the picture as the VAE sees it: resolution × resolution × 3, uint8.

    Upright, on white where it is transparent, the first frame; the largest square in its middle,
    resized (Lanczos). Raises ValueError where the bytes are no whole image.
    """
    from PIL import ImageOps
    from PIL.Image import Resampling

    image = decode(content)
    return np.array(ImageOps.fit(image, (resolution, resolution), Resampling.LANCZOS))


def decode(content: bytes) -> Image:
    """A file's bytes → an upright RGB image. Raises ValueError where they are no whole image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise ValueError("no image that Pillow knows") from None
    # What Pillow raises on damaged files; SyntaxError is its word for a broken PNG.
    except (
        *(OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
        *(struct.error, zlib.error, Image.DecompressionBombError),
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def counted(pictures: Sequence[object]) -> str:
    """``1 picture is`` or ``N pictures are``."""
    return "1 picture is" if len(pictures) == 1 else f"{len(pictures):,} pictures are"


def listed(pictures: Sequence[Picture]) -> str:
    """The names of the first few, and how many more there are."""
    names = [p.path.name for p in pictures[:LISTED]]
    more = len(pictures) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def _files(sources: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files of all sources, each once, and warnings."""
    found: dict[Path, Path] = {}
    warnings = []
    for source in sources:
        if source.is_file():
            found.setdefault(source.resolve(), source)
            continue
        if not source.is_dir():
            raise TrainProblem(f"There is no file or folder {source}.")
        own = _pictures(source)
        deeper = sum(len(_pictures(p)) for p in _folders(source))
        if not own and deeper:
            raise TrainProblem(
                f"{source} holds no pictures itself, the folders in it hold {deeper:,}: name those "
                "that belong to the LoRA."
            )
        if not own:
            raise TrainProblem(
                f"{source} holds no pictures: files are looked for that end in "
                f"{', '.join(READABLE)}."
            )
        if deeper:
            warnings.append(
                f"The {deeper:,} pictures in folders within {source} are left out: name these "
                "folders too if they belong to the LoRA."
            )
        for path in own:
            found.setdefault(path.resolve(), path)
    if not found:
        raise TrainProblem("No pictures are named: name a folder of them, or files.")
    return list(found.values()), warnings


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.is_dir())


def _look(path: Path) -> Picture | str:
    """A picture without its caption, or why it cannot be read."""
    try:
        content = path.read_bytes()
        width, height = decode(content).size
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return Picture(path, "", hashlib.sha256(content).hexdigest(), width, height)


def _twins(pictures: Sequence[Picture]) -> list[str]:
    """A sentence on files of the same bytes, where there are any."""
    known: dict[str, Picture] = {}
    again = [p for p in pictures if known.setdefault(p.digest, p) is not p]
    if not again:
        return []
    return [f"{counted(again)} there more than once and count as often: {listed(again)}."]


def _rgb(image: Image) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I"):
        # Pillow's own conversion would cut 16 bits off at 255.
        image = images.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its numbers are not those of a picture (floating point)")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = images.new("RGBA", image.size, "white")
        image = images.alpha_composite(white, image)
    return image.convert("RGB")

"""Image features of LoRAs: what their pictures say, beside what their weights say.

A LoRA's images lie in a folder of its name (the file's name without its suffix), ``DIR/<name>/`` or
``DIR/<artist>/<name>/``: the pictures that it was trained on ("original") or pictures made with it
("generated"). Its feature is the mean of its images' features (Liu, Takikawa, Jacobson, A LoRA is
Worth a Thousand Pictures, arXiv 2412.12048: mean aggregation), compared by cosine.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation import imagecache
from lorafind.evaluation.encoders import Encoder, open_encoder
from lorafind.evaluation.imagecache import Key
from lorafind.index.progress import Progress, Silent

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
#: Images that go through an encoder together.
BATCH = 32
#: Images that are decoded at a time.
DECODERS = 4
#: An image longer than this many times its width is no picture, and would be huge when resized.
LONGEST = 50


@dataclass(frozen=True)
class Features:
    """Image features of LoRAs by one encoder.

    rows: LoRA → mean feature of its images, D float32; missing: LoRAs without a readable image;
    unreadable: images that could not be read (and caches that were damaged), and why.
    """

    rows: Mapping[str, np.ndarray]
    missing: list[str] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)

    def matrix(self, names: Sequence[str]) -> np.ndarray:
        """The features of some LoRAs, n × D float32. Raises KeyError for one without."""
        return np.array([self.rows[name] for name in names], np.float32)


@dataclass(frozen=True)
class Scenario:
    """One way to ask with images.

    query, base: which images the queries and the data base are known by; queries, candidates: the
    LoRAs; cosines: queries × candidates, float32 (a LoRA that is both meets itself with 1).
    """

    query: str
    base: str
    queries: tuple[str, ...]
    candidates: tuple[str, ...]
    cosines: np.ndarray


@dataclass(frozen=True)
class EmbeddingSimilarity:
    """How alike two embeddings of the same n LoRAs are; see :func:`embedding_similarity`.

    components: k', the number compared; signs: k', ±1, by which the image components were turned;
    per_component: k' cosines, ≥ 0; per_lora: n cosines; mean: the mean of per_lora; overall: the
    cosine of the two n × k' matrices; chance: what a component of unrelated embeddings has on
    average, √(2/(π·n)), since its sign is chosen.
    """

    components: int
    signs: np.ndarray
    per_component: np.ndarray
    per_lora: np.ndarray
    mean: float
    overall: float
    chance: float


def image_features(
    encoder: str | Encoder,
    folder: Path,
    names: Sequence[str],
    device: str = "cpu",
    cache: Path | None = None,
    watch: Progress | None = None,
) -> Features:
    """The mean image feature of every LoRA in ``names`` that has images under ``folder``.

    encoder: as for :func:`lorafind.evaluation.encoders.open_encoder`, or an opened one (its device
    then counts); names: file names of LoRAs without suffix, or ``<artist>/<name>`` where two
    artists have the same; cache: a folder, made where it is missing, in which features are kept
    between runs, also when this one is interrupted; watch: told of the images that are not in it.

    At most BATCH prepared images and DECODERS decoded ones are held at a time. Raises BasisProblem
    where the folder is missing, two folders may be meant by one name, or the encoder cannot be
    used.
    """
    if not folder.is_dir():
        raise BasisProblem(f"{folder} is no folder: name one with a folder of images per LoRA.")
    if isinstance(encoder, str):
        encoder = open_encoder(encoder, device)
    unreadable: list[tuple[Path, str]] = []
    images: dict[str, list[Key]] = {}
    for name, paths in _pictures(folder, names, unreadable).items():
        images[name] = []
        for path in paths:
            try:
                images[name].append(imagecache.key_of(path))
            except OSError as error:
                unreadable.append((path, error.strerror or str(error)))

    known: dict[Key, np.ndarray] = {}
    file = None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        file = imagecache.cache_file(cache, encoder.name, encoder.identity)
        try:
            known = imagecache.load(file)
        except ValueError as error:
            unreadable.append((file, str(error)))
    todo = [key for keys in images.values() for key in keys if key not in known]
    fresh: dict[Key, np.ndarray] = {}
    try:
        _encode(encoder, list(dict.fromkeys(todo)), fresh, unreadable, watch or Silent())
    finally:
        if file is not None and fresh:
            # What was known of an image that has changed since is of no use to anyone.
            changed = {key.path for key in fresh}
            kept = {key: row for key, row in known.items() if key.path not in changed}
            imagecache.save(file, kept | fresh)
    known |= fresh

    rows: dict[str, np.ndarray] = {}
    missing = []
    for name in dict.fromkeys(names):
        found = [known[key] for key in images.get(name, ()) if key in known]
        if found:
            rows[name] = np.array(found).mean(0, dtype=np.float64).astype(np.float32)
        else:
            missing.append(name)
    return Features(rows, missing, list(dict.fromkeys(unreadable)))


def scenarios(
    kinds: Mapping[str, Features], queries: Sequence[str], base: Sequence[str]
) -> list[Scenario]:
    """The paper's retrieval scenarios: what the queries and the data base are known by.

    kinds: ``{"original": …, "generated": …}`` gives four (original or generated queries × original
    or generated data base; generated × generated is what can be done with nothing but the LoRAs at
    hand); one kind alone gives one. Only LoRAs with images of every kind take part, so that the
    scenarios can be compared. The paper tells four scenarios apart; this definition of them is
    ours, since only its abstract and introduction were at hand.

    Raises BasisProblem where no query or no candidate is left, ValueError where the kinds were not
    made by one encoder.
    """
    if len({len(row) for features in kinds.values() for row in features.rows.values()}) > 1:
        raise ValueError("the features of all kinds must be of one encoder")
    everywhere = set.intersection(*(set(features.rows) for features in kinds.values()))
    asked = tuple(name for name in queries if name in everywhere)
    offered = tuple(name for name in base if name in everywhere)
    if not asked or not offered:
        raise BasisProblem(
            f"No {'data base' if asked else 'query'} LoRA has {' and '.join(kinds)} images: make "
            "a folder per LoRA, named as its file without the suffix."
        )
    out = []
    for query, other in product(kinds, kinds):
        left = _unit(kinds[query].matrix(asked))
        right = _unit(kinds[other].matrix(offered))
        out.append(Scenario(query, other, asked, offered, left @ right.T))
    return out


def embedding_similarity(lora: np.ndarray, image: np.ndarray) -> EmbeddingSimilarity:
    """How alike the embeddings of LoRAs are to the principal components of their images.

    lora: n × k, the LoRAs' coordinates in a basis; image: n × D, the mean image features of the
    same LoRAs in the same order. Both are centred over the n LoRAs; the image features are
    projected on their first k principal components, so that the k-th column of one stands beside
    the k-th of the other. The sign of a principal component is arbitrary: each image component is
    turned so that its inner product with the LoRAs' is not negative. Then cosines: per component
    (over the LoRAs), per LoRA (over the components), of both matrices as a whole. Where the images
    have fewer than k components (n − 1, D, or their numerical rank), only these are compared.

    After the paper's embedding similarity (cosine against PCA of image features, signs aligned);
    the details above are ours. Raises ValueError where the rows do not match,
    BasisProblem where the images have no component (fewer than two LoRAs, or all alike).
    """
    if lora.ndim != 2 or image.ndim != 2 or len(lora) != len(image):
        raise ValueError(f"{lora.shape} and {image.shape} do not hold the same LoRAs")
    n = len(lora)
    if n < 2:
        raise BasisProblem(f"{n} LoRAs with images are too few to compare embeddings: 2 at least.")
    ours = lora.astype(np.float64) - lora.mean(0, dtype=np.float64)
    theirs = image.astype(np.float64) - image.mean(0, dtype=np.float64)
    left, values, _ = np.linalg.svd(theirs, full_matrices=False)
    # Means were stored in float32: below this there is only their rounding.
    rank = int((values > 1e-6 * np.linalg.norm(image)).sum())
    k = min(lora.shape[1], rank)
    if k == 0:
        raise BasisProblem("The images of all LoRAs have the same features: nothing to compare.")
    ours, theirs = ours[:, :k], left[:, :k] * values[:k]
    inner = (ours * theirs).sum(0)
    signs = np.where(inner < 0, -1.0, 1.0)
    theirs = theirs * signs
    per_lora = _cosines(ours, theirs, 1)
    return EmbeddingSimilarity(
        components=k,
        signs=signs,
        per_component=_cosines(ours, theirs, 0),
        per_lora=per_lora,
        mean=float(per_lora.mean()),
        overall=float(_cosines(ours.reshape(1, -1), theirs.reshape(1, -1), 1)[0]),
        chance=float(np.sqrt(2 / (np.pi * n))),
    )


def _cosines(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Cosines along an axis; 0 where one of the two is zero."""
    size = np.linalg.norm(a, axis=axis) * np.linalg.norm(b, axis=axis)
    return np.divide((a * b).sum(axis), size, out=np.zeros_like(size), where=size > 0)


def _unit(rows: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 0)


def _pictures(
    folder: Path, names: Sequence[str], unreadable: list[tuple[Path, str]]
) -> dict[str, list[Path]]:
    """LoRA → its image files, by name, for those that have some."""
    deeper: dict[str, list[Path]] = {}
    for artist in _entries(folder, unreadable, folders=True):
        for place in _entries(artist, unreadable, folders=True):
            deeper.setdefault(place.name, []).append(place)
    found = {}
    for name in dict.fromkeys(names):
        # An artist's folder may bear the name of a LoRA; then it holds folders, not images.
        for places in ([folder / name], deeper.get(name, [])):
            held = {p: _images(p, unreadable) for p in places if p.is_dir()}
            held = {place: images for place, images in held.items() if images}
            if len(held) > 1:
                one, other, *_ = held
                raise BasisProblem(
                    f"The images of {name} may be those in {one} or in {other}: rename one of the "
                    "two, with its LoRA."
                )
            if held:
                found[name] = next(iter(held.values()))
                break
    return found


def _images(place: Path, unreadable: list[tuple[Path, str]]) -> list[Path]:
    files = _entries(place, unreadable, folders=False)
    return [p for p in files if p.name.lower().endswith(SUFFIXES)]


def _entries(place: Path, unreadable: list[tuple[Path, str]], folders: bool) -> list[Path]:
    """The folders, or what else there is, in a folder, by name; hidden ones are left out."""
    try:
        with os.scandir(place) as entries:
            return sorted(
                Path(e.path) for e in entries if e.is_dir() == folders and e.name[0] != "."
            )
    except OSError as error:
        unreadable.append((place, error.strerror or str(error)))
        return []


def _encode(
    encoder: Encoder,
    todo: list[Key],
    fresh: dict[Key, np.ndarray],
    unreadable: list[tuple[Path, str]],
    watch: Progress,
) -> None:
    """Fill ``fresh`` with the features of images, batch by batch."""
    if not todo:
        return
    encoder.load()
    watch.stage(f"Image features ({encoder.name})", len(todo), sum(key.size for key in todo))
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            keys, prepared = [], []
            for key, one in zip(
                batch, pool.map(lambda k: _prepared(encoder, k), batch), strict=True
            ):
                if isinstance(one, str):
                    unreadable.append((Path(key.path), one))
                else:
                    keys.append(key)
                    prepared.append(one)
            if prepared:
                fresh.update(zip(keys, encoder.encode(prepared), strict=True))
            watch.advance(len(batch), sum(key.size for key in batch))


def _prepared(encoder: Encoder, key: Key) -> np.ndarray | str:
    """What the encoder takes of an image, or why it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = _picture(Path(key.path))
    except UnidentifiedImageError:
        return "no image that Pillow knows"
    # What Pillow raises on damaged files; SyntaxError is its word for a broken PNG.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        return str(error) or type(error).__name__
    return encoder.prepare(image)


def _picture(path: Path) -> Image:
    """An image as it is looked at: upright, RGB, the first frame."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"{image.width} × {image.height} pixels are no picture")
        return ImageOps.exif_transpose(image).convert("RGB")

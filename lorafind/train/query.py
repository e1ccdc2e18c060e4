"""Pictures as a query: a LoRA trained on them, kept in the cache.

``queries/<key>.safetensors`` in the training's part of the cache, where the key is the SHA-256 of
the pictures' contents and captions, the settings, and which base model it is. To find an answer
again at once no model is read for that: files count by size and time of change, a model of the Hub
by its commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafind.train import checkpoint
from lorafind.train.cache import VERSION, digest, prepare, root
from lorafind.train.images import SUFFIXES, Picture
from lorafind.train.loop import Stopped, Watch, train
from lorafind.train.model import Base
from lorafind.train.settings import Settings


def holds_pictures(path: Path) -> bool:
    """Whether a path is a picture, or a folder with pictures in it (not in folders in it)."""
    if path.is_dir():
        return any(one.suffix.lower() in SUFFIXES for one in path.iterdir() if one.name[0] != ".")
    return path.suffix.lower() in SUFFIXES and path.is_file()


def query_file(pictures: Sequence[Picture], settings: Settings, cache: Path | None = None) -> Path:
    """Where the LoRA of some pictures lies, or is going to; cache: None for the user's."""
    contents = sorted([picture.digest, picture.caption] for picture in pictures)
    given = settings.class_images
    classes = settings.class_count if given is None else _files(given)
    facts = [VERSION, settings.digest(), _identity(settings.model), contents]
    key = digest(*facts, classes if settings.prior_weight else 0)
    return (cache or root()) / "train" / "queries" / f"{key}.safetensors"


def train_query(
    base: Base,
    pictures: Sequence[Picture],
    settings: Settings,
    path: Path,
    watch: Watch | None = None,
    title: str = "",
    cache: Path | None = None,
) -> None:
    """Train the LoRA of :func:`query_file` into ``path``, or go on where that was interrupted.

    base: with VAE and text encoder, which are dropped. Raises as
    :func:`lorafind.train.loop.train`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prepared = prepare(base, pictures, settings, watch, cache)
    base.drop_encoders()
    begun = checkpoint.path(path).is_file()
    try:
        train(base, prepared, settings, path, watch, resume=begun, title=title)
    except Stopped as error:
        raise Stopped(
            "Stopped; what was trained is kept, and the same command goes on from there."
        ) from error


def _identity(model: str) -> list[object]:
    """Which base model a name stands for now."""
    path = Path(model).expanduser()
    if path.exists():
        return [str(path.resolve()), *_files(path)]
    from lorafind.hub.address import Address
    from lorafind.hub.cache import held

    repository, _, revision = model.removeprefix("hf:").partition("@")
    known = held(Address(repository, revision), "model_index.json")
    return [repository, revision, known.parent.name if known else ""]


def _files(path: Path) -> list[tuple[str, int, int]]:
    """A file, or all files of a folder: name, size, time of change (ns)."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(one, one.stat()) for one in found if one.is_file()]
    return [(str(one.relative_to(path)), s.st_size, s.st_mtime_ns) for one, s in stats]

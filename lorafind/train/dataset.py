"""The LoRAs of a data set, before any is trained: of which pictures, with which settings.

Every artist is planned alone, so that one of whom something is wrong, or who comes later, changes
nothing of the others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorafind.index.progress import Progress, Silent
from lorafind.train import seeds
from lorafind.train.artists import Artist, find_artists, naming
from lorafind.train.captions import Gathered
from lorafind.train.images import Picture
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from lorafind.train.subsets import DIFF, SAME, TRAIN, Division, Subset, Wanted, divide

#: What becomes of pictures whose caption names the artist.
NAMES = ("refuse", "drop", "allow")


@dataclass(frozen=True)
class Lora:
    """A LoRA to train. file: below the data set's folder, with ``/``; settings: with its seed;
    number: from which its word [V] is drawn where the settings name none."""

    artist: Artist
    subset: Subset
    pictures: Sequence[Picture]
    settings: Settings
    file: str
    number: int

    @property
    def title(self) -> str:
        """Its name for people, inside the file."""
        stem = self.file.rpartition("/")[2].removesuffix(".safetensors")
        return f"{self.artist.name}{stem.removeprefix(self.artist.stem)}".replace("-", " ")

    def digest(self, *more: object) -> str:
        """SHA-256 (hex) of all that the file hangs on, with ``more`` facts."""
        own = self.settings
        prior = own.class_count if own.prior_weight and own.class_images is None else None
        contents = [[picture.digest, picture.caption] for picture in self.pictures]
        facts = [own.digest(), prior, self.number, contents, *more]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Share:
    """An artist's share of a data set.

    pictures: how many different ones; reason: why nothing can be trained, empty where it can;
    warnings: sentences.
    """

    artist: Artist
    pictures: int = 0
    division: Division | None = None
    loras: Sequence[Lora] = ()
    reason: str = ""
    warnings: Sequence[str] = field(default=())


def plan(
    root: Path,
    wanted: Wanted,
    settings: Settings,
    gather: Callable[[Path], Gathered],
    *,
    names: str = "refuse",
    one_seed: bool = False,
    watch: Progress | None = None,
) -> list[Share]:
    """The data set of a folder of artists, by name.

    settings: of every LoRA; gather: a folder's pictures with captions; names: of NAMES, what
    becomes of pictures whose caption names the artist; one_seed: the settings' for every LoRA, in
    place of one of its own for each. The same for the same pictures and seed, wherever they lie.

    Raises TrainProblem where there are no artists; what is wrong with one stands in its share.
    """
    if names not in NAMES:
        raise TrainProblem(f"Captions that name the artist: {names!r}? One of {', '.join(NAMES)}.")
    watch = watch or Silent()
    artists = find_artists(root)
    watch.stage("Artists", len(artists), 0)
    shares = []
    for artist in artists:
        try:
            shares.append(_share(artist, wanted, settings, gather(artist.folder), names, one_seed))
        except TrainProblem as error:
            shares.append(Share(artist, reason=str(error)))
        watch.advance(1, 0)
    return _with_strangers(shares)


def words(pictures: Sequence[Picture]) -> set[str]:
    """All words of the captions, in lower case."""
    return {word for p in pictures for word in re.findall(r"\w+", p.caption.lower())}


def _share(
    artist: Artist,
    wanted: Wanted,
    settings: Settings,
    found: Gathered,
    names: str,
    one_seed: bool,
) -> Share:
    warnings = list(found.warnings)
    if found.skipped:
        said = ", ".join(f"{path.name} ({why})" for path, why in found.skipped)
        warnings.append(f"{len(found.skipped):,} pictures cannot be read and are left out: {said}.")
    # A picture that is there twice could be held back and trained on.
    pictures = {picture.digest: picture for picture in reversed(found.pictures)}
    told = naming(artist.name, list(pictures.values()))
    if told:
        first, said = told[0]
        what = f"{len(told):,} captions name the artist, {first.path.name} by “{said}”"
        if names == "refuse":
            raise TrainProblem(
                f"{what}: rewrite them, leave these pictures out (--names drop), or train on them "
                "all the same (--names allow)."
            )
        warnings.append(f"{what}; " + ("left out." if names == "drop" else "trained on."))
        if names == "drop":
            for picture, _ in told:
                del pictures[picture.digest]
    division = divide(pictures, wanted, settings.seed)
    if division.words:
        warnings.append(f"{len(pictures):,} pictures are few: {', '.join(division.words)}.")
    loras = []
    for subset in division.subsets:
        file = f"{artist.stem}/{_name(artist, subset)}.safetensors"
        number = seeds.of_file(settings.seed, file)
        own = settings if one_seed else replace(settings, seed=number)
        chosen = [pictures[digest] for digest in subset.pictures]
        loras.append(Lora(artist, subset, chosen, own, file, number))
    return Share(artist, len(pictures), division, loras, warnings=warnings)


def _name(artist: Artist, subset: Subset) -> str:
    same = subset.setup == SAME and subset.split != TRAIN
    return f"{artist.stem}-{subset.split}{'-same' if same else ''}-{subset.number:02}"


def split_of(subset: Subset, same: bool) -> str:
    """The split of a subset in the labels file; same: the data set has queries of both set-ups."""
    if subset.split == "test" and same:
        return f"test_{subset.setup}"
    return subset.split


def has_same(shares: Sequence[Share]) -> bool:
    """Whether there are queries of both set-ups."""
    setups = {
        s.setup for share in shares for s in (o.subset for o in share.loras) if s.split == "test"
    }
    return setups == {SAME, DIFF}


def _with_strangers(shares: list[Share]) -> list[Share]:
    """The shares, with a warning where a picture is in the folders of two artists."""
    owner: dict[str, Artist] = {}
    found = []
    for share in shares:
        more = []
        digests = {p.digest: p for lora in share.loras for p in lora.pictures}
        for digest, picture in digests.items():
            other = owner.setdefault(digest, share.artist)
            if other is not share.artist:
                more.append(f"{picture.path.name} is also a picture of {other.name}.")
        found.append(replace(share, warnings=[*share.warnings, *more]))
    return found

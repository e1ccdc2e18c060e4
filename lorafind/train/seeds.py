"""Seeds that follow from what is trained.

Two LoRAs of one seed begin from one A, and agree for that alone: of two sets of pictures they came
out as near to each other as to nothing else. So every LoRA has a seed of its own, unless one is
asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lorafind.train.images import Picture


def of_pictures(pictures: Sequence[Picture]) -> int:
    """The same for the same pictures, wherever they lie; below 2³²."""
    return _number("pictures", *sorted(picture.digest for picture in pictures))


def of_file(seed: int, file: str) -> int:
    """For one file of a data set; below 2³²."""
    return _number("file", seed, file)


def _number(*what: str | int) -> int:
    said = "/".join(map(str, ("lorafind seeds v1", *what)))
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4])

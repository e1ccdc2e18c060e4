"""Which pictures of an artist each LoRA of a data set learns from.

As in the paper (section 4): of an artist's pictures so many are held back for validation and test,
the LoRAs of the data base learn from random ten of the others, calibration LoRAs from random three
of them, and queries from random three of those that were held back. Everything random is an order
by SHA-256 of the seed, a purpose and the picture's content, so that it hangs neither on names, nor
on where the pictures lie, nor on the version of a library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from lorafind.train.problem import TrainProblem

#: What a LoRA is for, as the labels file calls it (:mod:`lorafind.bases.labels`).
TRAIN, CALIBRATION, VALIDATION, TEST = "train", "calibration", "validation", "test"
#: Trained on as many pictures as the LoRAs of the data base, or on fewer.
SAME, DIFF = "same", "diff"


@dataclass(frozen=True)
class Wanted:
    """LoRAs per artist, and pictures for each. The defaults are the paper's.

    train LoRAs of ``size`` pictures; calibration ones, and ``queries`` for validation and as many
    for test, of ``few``; held: pictures held back for validation, and as many for test; same: as
    many calibration LoRAs and queries of ``size`` pictures on top.

    Raises TrainProblem for numbers that cannot be.
    """

    train: int = 30
    size: int = 10
    calibration: int = 3
    queries: int = 5
    few: int = 3
    held: int = 15
    same: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 1) for name in ("train", "size", "few", "held")),
            *((name, 0) for name in ("calibration", "queries")),
        ):
            if getattr(self, name) < least:
                raise TrainProblem(
                    f"{getattr(self, name)} for {name} is too few: at least {least}."
                )


@dataclass(frozen=True)
class Subset:
    """The pictures (digests, in the order of ``Division``) of one LoRA; number: from 1."""

    split: str
    setup: str
    number: int
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Division:
    """An artist's pictures (digests) by what they are for, and the subsets that LoRAs learn from.

    words: phrases on what was scaled down because there are too few pictures.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    subsets: tuple[Subset, ...] = ()
    words: tuple[str, ...] = field(default=())

    def overlap(self) -> tuple[float, int]:
        """Pictures that two training LoRAs share: on average over all pairs, and at most."""
        drawn = [set(s.pictures) for s in self.subsets if s.split == TRAIN]
        shared = [len(one & two) for one, two in combinations(drawn, 2)]
        return (sum(shared) / len(shared), max(shared)) if shared else (0.0, 0)


def divide(digests: Collection[str], wanted: Wanted, seed: int) -> Division:
    """Divide an artist's pictures and draw the subsets; no two subsets are equal.

    digests: SHA-256 of the pictures, each once. With fewer than 2·held + 2·size pictures fewer are
    held back in proportion, LoRAs of the data base learn from no more than half of the others, and
    queries from so few that they can differ. Raises TrainProblem where none can be held back.
    """
    count, full = len(digests), 2 * wanted.held + 2 * wanted.size
    held = wanted.held if count >= full else wanted.held * count // full
    if not held:
        least = -(-full // wanted.held)
        raise TrainProblem(f"{count} pictures are too few: at least {least} are needed.")
    order = _order(digests, seed, "hold back")
    whole = Division(
        tuple(sorted(order[2 * held :])),
        tuple(sorted(order[:held])),
        tuple(sorted(order[held : 2 * held])),
    )
    return _Drawing(whole, wanted, seed).all()


class _Drawing:
    """Draws the subsets of one artist, each once, and notes where there are too few pictures."""

    def __init__(self, whole: Division, wanted: Wanted, seed: int) -> None:
        self._whole, self._wanted, self._seed = whole, wanted, seed
        self._drawn: set[frozenset[str]] = set()
        self._words: list[str] = []

    def all(self) -> Division:
        whole, wanted = self._whole, self._wanted
        size = min(wanted.size, max(1, len(whole.train) // 2))
        enough = (
            n
            for n in range(min(wanted.few, len(whole.test)), 0, -1)
            if comb(len(whole.test), n) >= wanted.queries
        )
        few = min(size, next(enough, max(1, len(whole.test) // 2)))
        if len(whole.test) < wanted.held:
            self._words.append(f"{len(whole.test)} + {len(whole.test)} pictures held back")
        if (size, few) != (wanted.size, wanted.few):
            self._words.append(f"subsets of {size} and {few}")
        found = self._subsets(whole.train, TRAIN, SAME, wanted.train, size)
        for setup, number in ((DIFF, few), (SAME, size))[: 1 + wanted.same]:
            for pool, split, many in (
                (whole.train, CALIBRATION, wanted.calibration),
                (whole.validation, VALIDATION, wanted.queries),
                (whole.test, TEST, wanted.queries),
            ):
                found += self._subsets(pool, split, setup, many, number)
        return Division(whole.train, whole.validation, whole.test, tuple(found), tuple(self._words))

    def _subsets(
        self, pool: Sequence[str], split: str, setup: str, many: int, size: int
    ) -> list[Subset]:
        left = comb(len(pool), size) - sum(
            len(one) == size and one <= set(pool) for one in self._drawn
        )
        if left < many:
            what = "training" if split == TRAIN else split
            self._words.append(f"{left or 'no'} {what} LoRAs of {size} pictures")
        found: list[Subset] = []
        attempt = 0
        while len(found) < min(many, left):
            some = _order(pool, self._seed, split, setup, attempt)[:size]
            attempt += 1
            if frozenset(some) not in self._drawn:
                self._drawn.add(frozenset(some))
                found.append(Subset(split, setup, len(found) + 1, tuple(sorted(some))))
        return found


def _order(digests: Collection[str], seed: int, *purpose: str | int) -> list[str]:
    """A random order that is a function of the contents, the seed and the purpose."""

    def key(digest: str) -> bytes:
        said = "/".join(map(str, ("lorafind subsets v1", seed, *purpose, digest)))
        return hashlib.sha256(said.encode()).digest()

    return sorted(digests, key=key)

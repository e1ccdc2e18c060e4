"""Which pictures LoRAs of a data set learn from."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from itertools import combinations
from math import comb, sqrt

import pytest

from lorafind.train.problem import TrainProblem
from lorafind.train.subsets import Division, Wanted, divide


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]


def by_kind(division: Division) -> dict[tuple[str, str], list[set[str]]]:
    found: dict[tuple[str, str], list[set[str]]] = {}
    for subset in division.subsets:
        assert len(set(subset.pictures)) == len(subset.pictures)
        own = found.setdefault((subset.split, subset.setup), [])
        own.append(set(subset.pictures))
        assert subset.number == len(own)
    return found


def test_the_papers_numbers() -> None:
    division = divide(digests(100), Wanted(), seed=0)
    pools = {
        "train": set(division.train),
        "validation": set(division.validation),
        "test": set(division.test),
    }
    assert [len(pool) for pool in pools.values()] == [70, 15, 15]
    assert set().union(*pools.values()) == set(digests(100))
    assert division.words == ()
    found = by_kind(division)
    numbers = {kind: (len(some), {len(one) for one in some}) for kind, some in found.items()}
    assert numbers == {
        ("train", "same"): (30, {10}),
        ("calibration", "diff"): (3, {3}),
        ("validation", "diff"): (5, {3}),
        ("test", "diff"): (5, {3}),
    }
    for (split, _), some in found.items():
        pool = pools["train" if split == "calibration" else split]
        assert all(one <= pool for one in some)
        assert len({frozenset(one) for one in some}) == len(some)


def test_same_ones_on_request_change_nothing_of_the_others() -> None:
    plain = divide(digests(100), Wanted(), seed=0)
    more = divide(digests(100), Wanted(same=True), seed=0)
    assert more.subsets[: len(plain.subsets)] == plain.subsets
    added = Division((), (), (), more.subsets[len(plain.subsets) :])
    numbers = {kind: [len(one) for one in some] for kind, some in by_kind(added).items()}
    assert numbers == {
        ("calibration", "same"): [10] * 3,
        ("validation", "same"): [10] * 5,
        ("test", "same"): [10] * 5,
    }
    held = set(more.validation), set(more.test)
    for subset in added.subsets:
        pool = {"calibration": set(more.train), "validation": held[0], "test": held[1]}
        assert set(subset.pictures) <= pool[subset.split]


def test_a_function_of_contents_and_seed_alone() -> None:
    names = digests(60)
    shuffled = random.Random(1).sample(names, len(names))
    assert divide(names, Wanted(), seed=3) == divide(shuffled, Wanted(), seed=3)
    assert divide(names, Wanted(), seed=3) != divide(names, Wanted(), seed=4)


def test_every_picture_is_as_likely() -> None:
    seeds, names = 300, digests(50)
    held: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    for seed in range(seeds):
        division = divide(names, Wanted(train=1, calibration=0, queries=0), seed)
        held.update(division.test)
        drawn.update(division.subsets[0].pictures)
    for counts, share in ((held, 15 / 50), (drawn, 20 / 50 * 10 / 20)):
        spread = sqrt(seeds * share * (1 - share))
        assert all(abs(counts[name] - seeds * share) < 4.5 * spread for name in names)


def test_overlap() -> None:
    division = divide(digests(100), Wanted(), seed=0)
    shared = []
    trained = [s.pictures for s in division.subsets if s.split == "train"]
    for i in range(len(trained)):
        for j in range(i):
            shared.append(sum(picture in trained[j] for picture in trained[i]))
    assert division.overlap() == (sum(shared) / 435, max(shared))
    # Ten of 70 and another ten of 70 share 10 · 10/70 on average.
    assert division.overlap()[0] == pytest.approx(100 / 70, rel=0.1)
    assert divide(digests(100), Wanted(train=1), seed=0).overlap() == (0, 0)


@pytest.mark.parametrize(
    ("count", "held", "size", "few", "words"),
    [
        (50, 15, 10, 3, ()),
        (49, 14, 10, 3, ("14 + 14 pictures held back",)),
        (20, 6, 4, 3, ("6 + 6 pictures held back", "subsets of 4 and 3")),
    ],
)
def test_fewer_pictures(count: int, held: int, size: int, few: int, words: tuple[str, ...]) -> None:
    division = divide(digests(count), Wanted(), seed=0)
    assert len(division.validation) == len(division.test) == held
    found = by_kind(division)
    assert [len(one) for one in found["train", "same"]] == [size] * 30
    assert [len(one) for one in found["test", "diff"]] == [few] * 5
    assert division.words == words


@pytest.mark.parametrize("count", range(4, 20))
def test_very_few_pictures_give_fewer_loras_but_never_one_twice(count: int) -> None:
    division = divide(digests(count), Wanted(same=True), seed=0)
    assert division.validation and division.test and division.train
    everything = [frozenset(s.pictures) for s in division.subsets]
    assert len(set(everything)) == len(everything)
    size = len(division.subsets[0].pictures)
    possible = comb(len(division.train), size)
    trained = [s for s in division.subsets if s.split == "train"]
    assert len(trained) == min(30, possible)
    if possible < 30:
        assert f"{possible} training LoRAs of {size} pictures" in division.words
    assert not any(
        set(one.pictures) & set(other.pictures)
        for one, other in combinations(division.subsets, 2)
        if {one.split, other.split} == {"validation", "test"}
    )


def test_too_few() -> None:
    with pytest.raises(TrainProblem, match="3 pictures are too few: at least 4 are needed"):
        divide(digests(3), Wanted(), seed=0)
    with pytest.raises(TrainProblem, match="0 for size is too few: at least 1"):
        Wanted(size=0)

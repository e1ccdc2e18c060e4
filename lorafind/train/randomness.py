"""Random numbers that are a function of the seed and of what they are for, of nothing before them.

So a training that goes on after an interruption, one of many at once, and one alone draw the same.
All draws are made on the CPU: other devices have generators of their own.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def generator(seed: int, *what: str | int) -> torch.Generator:
    """A generator for one purpose, such as ``("noise", step, micro)``."""
    said = "/".join(map(str, ("lorafind train v1", seed, *what)))
    number = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number)


def pick(seed: int, what: str, start: int, count: int, size: int) -> list[int]:
    """Places ``start`` to ``start + count`` of an endless walk through ``size`` examples.

    Every pass takes each example once, in an order of its own.
    """
    places = (divmod(place, size) for place in range(start, start + count))
    return [_order(seed, what, epoch, size)[place] for epoch, place in places]


@lru_cache(maxsize=256)
def _order(seed: int, what: str, epoch: int, size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=generator(seed, what, epoch)).tolist()
    return order

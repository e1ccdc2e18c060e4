"""Names with braces: one line of a table stands for many names.

``blocks.{0-27}.attn.{to_q,to_k}``: braces hold a range of numbers (``{0-18}``; every third of them:
``{0-18/3}``) or words to choose from. A pattern can list its names, and it can tell whether a
flattened name is one of them without listing any: names are laid by their *outline*, in which every
number is ``#``, and the numbers are looked at afterwards.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lorafind.formats.names.table import flatten

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"[0-9]+")
#: Stands for a number yet to be chosen.
_SLOT = "\0"
#: No model has blocks with longer numbers; a file can.
_DIGITS = 6


class Outline(NamedTuple):
    """A flattened name as it is looked up: ``#`` for every number, and the numbers."""

    text: str
    numbers: tuple[str, ...]


def outline(flat: str) -> Outline:
    """``blocks_3_attn_to_q`` → ``blocks_#_attn_to_q`` and 3."""
    return Outline(_NUMBER.sub("#", flat), tuple(_NUMBER.findall(flat)))


class Rule(NamedTuple):
    """Names of a pattern that differ by chosen numbers alone.

    slots: what every number of a name must be, itself or a member of a range; chosen: the words
    that the braces chose, None for each number; head: the outline up to the first range, empty
    without any.
    """

    slots: tuple[str | range, ...]
    chosen: tuple[str | None, ...]
    head: str

    def match(self, numbers: Sequence[str]) -> tuple[str, ...] | None:
        """What the braces chose in a name of this outline, None where it is not one of ours."""
        picked = []
        for slot, number in zip(self.slots, numbers, strict=True):
            if isinstance(slot, range):
                if _value(number) not in slot:
                    return None
                picked.append(number)
            elif slot != number:
                return None
        left = iter(picked)
        return tuple(next(left) if word is None else word for word in self.chosen)

    def beyond(self, numbers: Sequence[str]) -> bool:
        """True where nothing but a number past the end of its range keeps a name from matching."""
        past = False
        for slot, number in zip(self.slots, numbers, strict=True):
            if isinstance(slot, str):
                if slot != number:
                    return False
            elif _value(number) not in slot:
                if _value(number) < slot.stop:
                    return False
                past = True
        return past

    def block(self, numbers: Sequence[str]) -> int:
        """The number in the first range."""
        pairs = zip(self.slots, numbers, strict=True)
        return next(_value(number) for slot, number in pairs if isinstance(slot, range))


def _value(number: str) -> int:
    """A number as models write it; −1 for anything else."""
    plain = len(number) <= _DIGITS and (number == "0" or number[0] != "0")
    return int(number) if plain else -1


def expand(pattern: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every name that a pattern stands for, with what its braces chose."""
    texts = _BRACES.split(pattern)
    choices = [[str(choice) for choice in _choices(text)] for text in texts[1::2]]
    for chosen in itertools.product(*choices):
        yield _join(texts, chosen), chosen


def rules(pattern: str) -> Iterator[tuple[str, Rule]]:
    """(outline, rule) for every choice of words.

    Raises ValueError where two numbers stand side by side: they could not be told apart.
    """
    texts = _BRACES.split(pattern)
    choices = [_choices(text) for text in texts[1::2]]
    ranges = [choice for choice in choices if isinstance(choice, range)]
    words = [[None] if isinstance(choice, range) else choice for choice in choices]
    for chosen in itertools.product(*words):
        flat = flatten(_join(texts, [_SLOT if word is None else word for word in chosen]))
        if re.search(f"[0-9{_SLOT}]{_SLOT}|{_SLOT}[0-9]", flat):
            raise ValueError(f"{pattern}: two numbers stand side by side")
        found = re.findall(f"[0-9]+|{_SLOT}", flat)
        left = iter(ranges)
        slots = tuple(next(left) if number == _SLOT else number for number in found)
        head = _NUMBER.sub("#", flat.partition(_SLOT)[0]) if ranges else ""
        yield _NUMBER.sub("#", flat).replace(_SLOT, "#"), Rule(slots, chosen, head)


def fill(text: str, chosen: Sequence[str]) -> str:
    """The braces of a text, one after the other, replaced by what was chosen."""
    values = iter(chosen)
    return _BRACES.sub(lambda _: next(values), text)


def _choices(text: str) -> range | list[str]:
    first, dash, last = text.partition("-")
    if dash:
        last, _, step = last.partition("/")
        return range(int(first), int(last) + 1, int(step or 1))
    return text.split(",")


def _join(texts: Sequence[str], chosen: Sequence[str]) -> str:
    pairs = zip(texts[::2], chosen, strict=False)
    return "".join([*itertools.chain(*pairs), texts[-1]])

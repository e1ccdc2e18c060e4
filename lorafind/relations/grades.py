"""What one adapter can be to another: grades, steps, and the relation that holds them.

No tensor is touched here, so that stored relations can be read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

#: From the strongest to the weakest.
#:
#: file: the same bytes. tensors: the same names, shapes, dtypes and bits; only metadata or the
#: order of keys differ. weights: the same ΔW up to the rounding of the stored dtypes. cast: one
#: rounding of its factors gives the other's bits. scaled: the same after one factor. part: modules
#: or extras were dropped. resized: the best approximation of a lower rank. reweighted: one factor
#: per module. near: cosine of at least 0.98, unproved. kin: a cosine that strangers do not reach.
GRADES = (
    "file",
    "tensors",
    "weights",
    "cast",
    "scaled",
    "part",
    "resized",
    "reweighted",
    "near",
    "kin",
)
#: A dominated file of these grades may be removed.
REMOVABLE = frozenset({"file", "tensors", "weights"})
#: Of these too, where the user names the grade; of the rest never.
REMOVABLE_IF_NAMED = frozenset({"cast", "scaled", "part", "resized"})

Side = Literal["x", "y"]


def removal(grade: str) -> Literal["default", "named", "never"]:
    """Whether a dominated file of this grade may go: by default, if the grade is named, never.

    Raises ValueError for a word that is no grade.
    """
    if grade not in GRADES:
        raise ValueError(f"{grade!r} is not a grade; the grades are {', '.join(GRADES)}")
    if grade in REMOVABLE:
        return "default"
    return "named" if grade in REMOVABLE_IF_NAMED else "never"


def weakest(grades: list[str]) -> str:
    """The grade of several steps together."""
    return max(grades, key=GRADES.index)


@dataclass(frozen=True)
class Step:
    """One thing that was done to the larger adapter to get the smaller one.

    kind: ``dtype`` (within rounding), ``cast`` (bit for bit), ``part``, ``resized``, ``scaled`` or
    ``reweighted``. words: for people, e.g. ``F16``, ``text encoder dropped``, ``resized 16→8``,
    ``×0.5 (use at ×2)``. values: the same for programs.
    """

    kind: str
    words: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def grade(self) -> str:
        """The grade that this step alone amounts to."""
        return "weights" if self.kind == "dtype" else self.kind


@dataclass(frozen=True)
class Relation:
    """A proved relation of two adapters, x and y in the order of the call.

    larger: which of the two the steps start from, because it holds more or is more precise (x where
        it could be either); None without steps where neither holds more, and for near and kin.
    steps: in order, from the larger to the other; empty where nothing happened to ΔW.
    cosine: exact, of ΔW over the modules that both have.
    factor: c of smaller = c · larger; 1 where there is no one factor, 0 for near and kin.
    shares: of ‖x‖² and of ‖y‖², what lies in the modules that both have.
    differs: what is not the same, as [of x, of y]: ``dtype``, ``effective dtype``, ``spelling``,
        ``family``, ``architecture``, ``rank``, ``modules``, ``text encoder``, ``extras``,
        ``unknown keys``, ``factors``, ``metadata``.
    dominates: whether x holds all that y does, and y all that x does: superset of modules and of
        extras, ranks and effective precision at least as high. Both False for near and kin.
    margin: the largest residual of a module over what rounding allows for it (≤ 1); 0 where bits
        were compared.
    chance: sd of the cosine between strangers that share one factor; only for near and kin.
    """

    grade: str
    larger: Side | None
    steps: tuple[Step, ...] = ()
    cosine: float = 1.0
    factor: float = 1.0
    shares: tuple[float, float] = (1.0, 1.0)
    differs: dict[str, list[Any]] = field(default_factory=dict)
    dominates: tuple[bool, bool] = (False, False)
    margin: float = 0.0
    chance: float = 0.0

    @property
    def share(self) -> float:
        """The part of the larger adapter's ‖ΔW‖² that lies in the common modules."""
        if self.larger is None:
            return min(self.shares)
        return self.shares[0] if self.larger == "x" else self.shares[1]

    @property
    def proved(self) -> bool:
        """True where one follows from the other; near and kin are only alike."""
        return self.grade not in ("near", "kin")

    def removable(self, side: Side) -> Literal["default", "named", "never"]:
        """Whether ``side`` may go while the other stays (see :func:`removal`)."""
        keeper = self.dominates[1] if side == "x" else self.dominates[0]
        return removal(self.grade) if keeper else "never"

    def text(self) -> str:
        """Grade and steps in one line, e.g. ``resized: F16, U-Net dropped, resized 16→8``."""
        words = ", ".join(step.words for step in self.steps)
        return f"{self.grade}: {words}" if words else self.grade

    def swapped(self) -> Relation:
        """The same relation with x and y exchanged."""
        larger: dict[Side | None, Side | None] = {"x": "y", "y": "x", None: None}
        return replace(
            self,
            larger=larger[self.larger],
            shares=self.shares[::-1],
            differs={name: pair[::-1] for name, pair in self.differs.items()},
            dominates=self.dominates[::-1],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``; :meth:`from_json` is the inverse."""
        return {
            "grade": self.grade,
            "larger": self.larger,
            "steps": [
                {"kind": step.kind, "words": step.words, **step.values} for step in self.steps
            ],
            "cosine": self.cosine,
            "factor": self.factor,
            "shares": list(self.shares),
            "differs": self.differs,
            "dominates": list(self.dominates),
            "margin": self.margin,
            "chance": self.chance,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Relation:
        """The relation that :meth:`to_json` wrote. Raises KeyError where a field is missing."""
        steps = []
        for entry in stored["steps"]:
            values = dict(entry)
            steps.append(Step(values.pop("kind"), values.pop("words"), values))
        return cls(
            grade=stored["grade"],
            larger=stored["larger"],
            steps=tuple(steps),
            cosine=stored["cosine"],
            factor=stored["factor"],
            shares=(stored["shares"][0], stored["shares"][1]),
            differs=dict(stored["differs"]),
            dominates=(stored["dominates"][0], stored["dominates"][1]),
            margin=stored["margin"],
            chance=stored["chance"],
        )

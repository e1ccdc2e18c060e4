"""The one door to all features: files → a matrix, with what it holds and what it could not take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorafind.bases.problem import BasisProblem
from lorafind.features.matrix import Matrix
from lorafind.features.sources import Refusal, Source, agree, read_sources
from lorafind.features.theta import Frame
from lorafind.formats.groups import GROUPS, mask
from lorafind.index.progress import Progress, Silent

if TYPE_CHECKING:
    from lorafind.index.examine import Lora

#: Name → one line of help. The sketches carry bases; the exact ones are for evaluations.
FEATURES = {
    "style": "every layer at unit norm, from signatures: any rank, spelling and start",
    "delta": "the change ΔW itself, sketched to as many numbers as style",
    "theta": "the paper's: the factors as they are stored; one rank, one layout, one start",
    "canonical": "the factors in a canonical form (QR, then SVD), a function of ΔW alone",
    "style exact": "style without sketching; too long for a basis",
    "delta exact": "ΔW without sketching; too long for a basis",
}


@dataclass(frozen=True)
class Opened:
    """A feature of some files.

    matrix: n rows; rows: which of the paths they are; refused: (path, sentence) of the other paths;
    architecture: of the matrix; architectures: as each file says; layouts: n numbers into
    ``digests``, which name layouts as the index does; contents: of every row.
    """

    matrix: Matrix
    rows: list[int]
    refused: list[Refusal]
    architecture: str
    architectures: list[str]
    layouts: np.ndarray
    digests: list[str]
    contents: list[str]

    @property
    def frame(self) -> Frame | None:
        """What a vector of factors looks like (theta and canonical)."""
        return getattr(self.matrix, "frame", None)


def open_feature(
    feature: str,
    paths: Sequence[str | os.PathLike[str]],
    groups: Sequence[str] = (),
    *,
    pad: bool = False,
    frame: Frame | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    watch: Progress | None = None,
) -> Opened:
    """Read files and lay a feature of them side by side.

    feature: one of FEATURES. groups: words as for ``--by`` or names of GROUPS; U-Net or transformer
    for none. pad: theta of several ranks and layouts, filled up with zeros. frame: of an older
    matrix of theta or canonical whose vectors these are to be compared with. device: for
    signatures, see :func:`lorafind.signatures.device.choose`.

    Files that cannot be read, are of another architecture than most, or have none of the groups are
    refused, with words. Raises BasisProblem where no file is left, and for theta without pad and
    frame where files differ in rank or layout; ValueError for an unknown feature, group or device.
    """
    if feature not in FEATURES:
        raise ValueError(f"{feature!r} is no feature; choose from {', '.join(FEATURES)}")
    wanted = parse_groups(groups)
    collected = None
    linear = feature == "delta"
    if feature in ("style", "delta"):
        from lorafind.features.sketches import Collected

        collected = Collected(wanted, linear)

    def take(source: Source, lora: Lora) -> None:
        if collected is not None and lora.signature is not None:
            collected.add(source.row, lora.signature)

    sources, refused = read_sources(
        paths,
        device=device,
        allow_pickle=allow_pickle,
        linear=linear,
        watch=watch or Silent(),
        take=take,
    )
    if not sources:
        raise BasisProblem(_nothing(len(paths), refused))
    architecture, sources, others = agree(sources)
    refused += others
    for source in sources:
        if not source.has(wanted):
            told = f"{source.name} changes nothing in the groups asked for ({', '.join(wanted)})"
            refused.append((source.path, told))
    sources = [source for source in sources if source.has(wanted)]
    if not sources:
        raise BasisProblem(_nothing(len(paths), refused))
    matrix: Matrix
    unfit: list[Refusal] = []
    if collected is not None:
        matrix = collected.matrix([s.row for s in sources], [s.content for s in sources])
    elif feature == "theta":
        from lorafind.features.theta import open_theta

        matrix, sources, unfit = open_theta(sources, wanted, frame=frame, pad=pad)
    elif feature == "canonical":
        from lorafind.features.canonical import open_canonical

        matrix, sources, unfit = open_canonical(
            sources, wanted, frame=frame, allow_pickle=allow_pickle
        )
    else:
        from lorafind.features.delta import Exact

        style = feature == "style exact"
        matrix = Exact(sources, wanted, style=style, allow_pickle=allow_pickle)
    refused += unfit
    if not sources:
        raise BasisProblem(_nothing(len(paths), refused))
    digests = list(dict.fromkeys(source.layout for source in sources))
    return Opened(
        matrix,
        [source.row for source in sources],
        refused,
        architecture,
        [source.architecture for source in sources],
        np.array([digests.index(source.layout) for source in sources]),
        digests,
        [source.content for source in sources],
    )


def parse_groups(words: Sequence[str]) -> tuple[str, ...]:
    """Groups in their order, from words as for ``--by`` or their own names; U-Net for none.

    Raises ValueError for a word that is none.
    """
    from lorafind.search.similar import Wishes

    own = [word for word in words if word in GROUPS]
    rest = tuple(word for word in words if word not in GROUPS)
    if rest or not own:
        own += Wishes(by=rest).groups(mask(GROUPS))
    return tuple(group for group in GROUPS if group in own)


def _nothing(count: int, refused: Sequence[Refusal]) -> str:
    """What to say where none of the files can be used."""
    why = f": {refused[0][1]}" if refused else ""
    return f"None of {count:,} files can be used{why}"

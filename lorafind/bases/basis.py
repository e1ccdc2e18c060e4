"""A basis ready for use: vectors and scores of LoRAs, and its form in the index.

Parts of a basis (``basis_parts``), per space (``model``, ``text``) and group: ``components``
k × 32,768 float16, ``gram`` k × k, ``means`` layouts × k; per space ``layouts`` (ids, −1 first: the
pooled mean), ``eigenvalues``, and ``fitted`` and ``fresh`` (k each): what coordinates of LoRAs that
were fitted, and of all others, are multiplied with. A published basis has ``centres/<group>`` in
place of ``means`` (rows as the digests in its facts), ``scale`` and ``offset`` (k each).
``contents``, n × 32 bytes: the LoRAs that were fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lorafind.bases.calibration import Calibration
from lorafind.bases.collection import SPACES, WEIGHTS, Space, coordinates, unit_rows
from lorafind.bases.file import means_of
from lorafind.bases.selection import Choice
from lorafind.index.rows import StoredBasis
from lorafind.signatures.constants import SIGNATURE_VERSION

#: What users call the collection's own basis, and the kind that it has in the index.
OWN = "own"
COLLECTION, PUBLISHED = "collection", "published"


@dataclass
class Basis:
    """A basis ready for use.

    spaces: ``model`` and, where the collection has them, ``text``; kind: ``collection`` for its own
    one, ``published`` for one from a file; calibration: of a published basis, None where
    coordinates are used as they are; seen: contents (32 bytes each) of the LoRAs that were fitted,
    whose coordinates differ from those of all others (``Space.choice``, calibration); centres: the
    projected means of a published basis, group → (1 + layouts) × k, in the order of
    ``facts["layouts"]``.
    """

    id: str
    architecture: str
    facts: Mapping[str, Any]
    spaces: dict[str, Space]
    kind: str = COLLECTION
    calibration: Calibration | None = None
    seen: frozenset[bytes] = frozenset()
    centres: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def distinguishes(self) -> bool:
        """True where LoRAs that were fitted are treated otherwise than those that were not."""
        return self.calibration is not None or any(s.choice for s in self.spaces.values())

    @property
    def euclidean(self) -> bool:
        """True where LoRAs are compared by distance, as in the paper, and not by cosine."""
        return self.facts.get("metric") == "euclidean"

    @property
    def feature(self) -> str:
        """The feature that is projected."""
        return str(self.facts.get("feature", "style"))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of all spaces, in the order of ``parts``."""
        return tuple(g for space in self.spaces.values() for g in space.groups)

    @cached_property
    def record(self) -> np.dtype:
        """One row of the ``embedding`` series: bit mask of groups, layout, vector.

        The vector has length 1 where LoRAs are compared by cosine. ``seen`` where that
        makes a difference: 1 for a LoRA that was fitted.
        """
        size = self.spaces["model"].size if "model" in self.spaces else 0
        seen = [("seen", "u1")] if self.distinguishes else []
        return np.dtype([("groups", "u1"), ("layout", "<i4"), *seen, ("vector", "<f4", (size,))])

    @cached_property
    def width(self) -> int:
        """Numbers in a row of the ``parts`` series."""
        return sum(space.size * len(space.groups) for space in self.spaces.values())

    def parts(self, styles: Mapping[str, np.ndarray], layouts: np.ndarray) -> np.ndarray:
        """p_g of n LoRAs side by side, n × width float32.

        styles: group → n × 32,768 int8, rows of zeros where a LoRA lacks the group.
        """
        columns = []
        for space in self.spaces.values():
            for group in space.groups:
                if group not in styles:
                    columns.append(np.zeros((len(layouts), space.size), np.float32))
                    continue
                made = space.project(group, unit_rows(styles[group]))
                made -= np.array([space.centre(group, int(k)) for k in layouts])
                made[~styles[group].any(1)] = 0.0
                columns.append(made)
        return np.concatenate(columns, 1).astype(np.float32)

    def vectors(
        self, parts: np.ndarray, wanted: Sequence[str], seen: np.ndarray | None = None
    ) -> np.ndarray:
        """Vectors over some groups: the spaces side by side, n × Σ k.

        seen: n bools, which LoRAs were fitted (default: none was).
        """
        found, start = [], 0
        for name, space in self.spaces.items():
            size = space.size * len(space.groups)
            block = parts[:, start : start + size].reshape(len(parts), len(space.groups), -1)
            start += size
            if any(group in wanted for group in space.groups):
                made = coordinates(space, block.astype(np.float64), wanted)
                raw = np.zeros(len(made), bool) if seen is None else seen
                if self.calibration is not None and name == "model":
                    made = np.where(raw[:, None], made, self.calibration.apply(made))
                if (choice := space.choice) is not None:
                    made *= np.where(raw[:, None], choice.fitted, choice.fresh)
                found.append(made)
        if not found:
            return np.zeros((len(parts), 0))
        joined = np.concatenate(found, 1)
        if self.euclidean:
            return joined
        length = np.linalg.norm(joined, axis=1, keepdims=True)
        return np.divide(joined, length, out=np.zeros_like(joined), where=length > 0)

    def scores(self, vectors: np.ndarray, one: np.ndarray) -> np.ndarray:
        """n scores of vectors (n × k) against one (k).

        Their cosines; or, by distance, 1 − d/D with D the typical distance between two LoRAs of
        the basis's training: 1 for the same, about 0 for strangers.
        """
        if not self.euclidean:
            return vectors @ one
        apart = vectors - one
        return 1.0 - np.sqrt(np.einsum("ij,ij->i", apart, apart)) / self.facts["distance"]


def to_stored(basis: Basis) -> StoredBasis:
    """For the index."""
    parts: dict[str, np.ndarray] = {}
    for name, space in basis.spaces.items():
        layouts = sorted(space.means)
        if basis.kind == COLLECTION:
            parts[f"{name}/layouts"] = np.array(layouts, np.int64)
        parts[f"{name}/eigenvalues"] = space.eigenvalues
        if space.choice is not None:
            parts[f"{name}/fitted"] = space.choice.fitted
            parts[f"{name}/fresh"] = space.choice.fresh
        for group in space.groups:
            if group in space.components:
                parts[f"{name}/{group}/components"] = space.components[group].astype(np.float16)
            parts[f"{name}/{group}/gram"] = space.grams[group]
            if basis.kind == COLLECTION:
                means = [space.means[k][group] for k in layouts]
                parts[f"{name}/{group}/means"] = np.array(means)
    parts.update({f"centres/{group}": centre for group, centre in basis.centres.items()})
    if basis.calibration is not None:
        parts["scale"], parts["offset"] = basis.calibration.scale, basis.calibration.offset
    if basis.seen:
        parts["contents"] = np.frombuffer(b"".join(sorted(basis.seen)), np.uint8).reshape(-1, 32)
    return StoredBasis(
        basis.id, basis.architecture, basis.kind, SIGNATURE_VERSION, basis.facts, parts
    )


def from_stored(stored: StoredBasis, layouts: Mapping[str, int] | None = None) -> Basis:
    """Inverse of :func:`to_stored`; the components stay float16 until they are used.

    layouts: digest → id, which a published basis needs.
    """
    centres = {
        name.partition("/")[2]: part
        for name, part in stored.parts.items()
        if name.startswith("centres/")
    }
    spaces: dict[str, Space] = {}
    for name, groups in SPACES.items():
        present = tuple(g for g in groups if f"{name}/{g}/gram" in stored.parts)
        if not present:
            continue
        if stored.kind == COLLECTION:
            ids = stored.parts[f"{name}/layouts"].tolist()
            own = {g: stored.parts[f"{name}/{g}/means"] for g in present}
            means = {k: {g: own[g][row] for g in present} for row, k in enumerate(ids)}
        else:
            means = means_of(centres, stored.facts["layouts"], layouts or {})
        spaces[name] = Space(
            present,
            {
                g: c
                for g in present
                if (c := stored.parts.get(f"{name}/{g}/components")) is not None
            },
            {g: stored.parts[f"{name}/{g}/gram"] for g in present},
            means,
            stored.parts[f"{name}/eigenvalues"],
            stored.facts.get("weights", WEIGHTS),
            Choice(stored.parts[f"{name}/fitted"], stored.parts[f"{name}/fresh"])
            if f"{name}/fitted" in stored.parts
            else None,
        )
    calibration = None
    if "scale" in stored.parts:
        calibration = Calibration(stored.parts["scale"], stored.parts["offset"])
    seen = frozenset(row.tobytes() for row in stored.parts.get("contents", ()))
    return Basis(
        stored.id,
        stored.architecture,
        stored.facts,
        spaces,
        stored.kind,
        calibration,
        seen,
        centres,
    )

"""Features from signatures: 32,768 numbers per group, whole in memory as int8.

``style`` is what the index stores, so that it needs no file of a LoRA that is indexed; its rows
have unit length. ``delta`` is the sketch of ΔW itself, made from the files; its rows keep ‖ΔW‖.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from lorafind.bases.stored import by_group, load_styles
from lorafind.features.matrix import Matrix
from lorafind.formats.groups import GROUPS
from lorafind.formats.groups import names as group_names
from lorafind.index.rows import StoredSignature
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION, STYLE

_BLOCK = 256


class Sketches(Matrix):
    """Sketches of n LoRAs.

    styles: group → n × 32,768 int8, rows of zeros where a LoRA lacks the group; lengths: group →
    n, what the rows are scaled to; contents: of every LoRA.
    """

    def __init__(
        self,
        feature: str,
        styles: Mapping[str, np.ndarray],
        lengths: Mapping[str, np.ndarray],
        contents: Sequence[str],
    ) -> None:
        self.feature = feature
        self.count = len(contents)
        self.groups = tuple(g for g in GROUPS if g in styles)
        self.widths = {g: styles[g].shape[1] for g in self.groups}
        self._styles = styles
        self._scales = {}
        self.present = {}
        for group in self.groups:
            norms = _norms(styles[group])
            self.present[group] = norms > 0
            scale = np.divide(lengths[group], norms, out=np.zeros(self.count), where=norms > 0)
            self._scales[group] = scale.astype(np.float32)
        told_of = json.dumps([feature, self.groups, SIGNATURE_VERSION, list(contents)])
        self.fingerprint = hashlib.sha256(told_of.encode()).hexdigest()

    def columns(self, group: str, tile: slice) -> np.ndarray:
        rows = self._styles[group][:, tile].astype(np.float32)
        rows *= self._scales[group][:, None]
        return rows


def _norms(rows: np.ndarray) -> np.ndarray:
    """Length of every int8 row, float64, block by block."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float32)
        found[start : start + _BLOCK] = np.einsum("ij,ij->i", block, block)
    return np.sqrt(found)


def from_store(store: Store, ids: Sequence[int], groups: Sequence[str]) -> Sketches:
    """The style of some LoRAs of an index, in their order; no file is read.

    groups: those wanted, of which the ones that any of the LoRAs has are there.
    """
    styles = {g: rows for g, rows in load_styles(store, ids).items() if g in groups}
    wanted = json.dumps([int(i) for i in ids])
    rows = store.conn.execute(
        "SELECT id, content FROM loras WHERE id IN (SELECT value FROM json_each(?))", (wanted,)
    )
    contents = dict(rows.fetchall())
    ones = {g: np.ones(len(ids)) for g in styles}
    return Sketches("style", styles, ones, [contents[int(i)] for i in ids])


class Collected:
    """Signatures of files as they come, for :func:`from_files`. linear: they are of ΔW itself."""

    def __init__(self, groups: Sequence[str], linear: bool = False) -> None:
        self.linear = linear
        self._groups = groups
        self._rows: dict[str, dict[int, np.ndarray]] = {}
        self._scales: dict[str, dict[int, float]] = {}

    def add(self, row: int, signature: StoredSignature) -> None:
        """Take the signature of file number ``row``."""
        scales = dict(zip(group_names(signature.groups), signature.scales.tolist(), strict=True))
        for group, style in by_group(signature).items():
            if group in self._groups:
                # Copied, so that the groups of a signature can be let go one by one.
                self._rows.setdefault(group, {})[row] = style.copy()
                self._scales.setdefault(group, {})[row] = scales[group]

    def matrix(self, rows: Sequence[int], contents: Sequence[str]) -> Sketches:
        """Sketches of the files with these numbers; what was collected is let go."""
        styles, lengths = {}, {}
        for group in list(self._rows):
            own, scales = self._rows.pop(group), self._scales.pop(group)
            made = np.zeros((len(rows), STYLE), np.int8)
            size = np.ones(len(rows))
            for i, row in enumerate(rows):
                if row in own:
                    made[i] = own.pop(row)
                    if self.linear:
                        size[i] = scales[row] * _norms(made[i : i + 1])[0]
            if made.any():
                styles[group], lengths[group] = made, size
        return Sketches("delta" if self.linear else "style", styles, lengths, contents)

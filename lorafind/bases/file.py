"""A basis as one safetensors file.

Tensors, with k components, groups g of d_g numbers and m layouts: ``components/<g>`` k × d_g
float16; ``mean/<g>`` d_g float32, the mean of the LoRAs that were fitted; ``gram/<g>`` k × k
float64, V_g·V_gᵀ; ``centres/<g>`` (1 + m) × k float32, the projected means, the pooled one first;
``scale``, ``offset`` k float64; ``eigenvalues`` float64; ``contents`` n × 32 uint8, the contents of
the LoRAs that the PCA saw (their coordinates stay as they are, all others are calibrated);
``test`` k float64, the coordinates of the test vector (:func:`self_test`).

Metadata: ``format`` "lorafind-basis", and ``lorafind``, JSON: format, id, name, feature, groups,
weights (ω per group), architecture, base_model, signature_version, components, computed, loras,
artists, calibration, setup, metric, distance (a typical one between two LoRAs of the training),
frame (θ and canonical: what their vectors look like), layouts (digests, as the rows of
``centres``), explained_variance, scales, evaluation, licence, data, made, seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorafind.bases.collection import Space
from lorafind.bases.kernel import solve
from lorafind.bases.problem import BasisProblem
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import Header, TensorInfo, read_header
from lorafind.signatures.constants import SIGNATURE_VERSION
from lorafind.signatures.signs import stream

FORMAT = 1
FEATURES = ("style", "delta", "theta", "canonical")
#: Coordinates of the test vector may differ by this share of their length.
TOLERANCE = 1e-3
_NEEDED = (
    "id",
    "name",
    "feature",
    "groups",
    "weights",
    "architecture",
    "signature_version",
    "components",
    "metric",
    "distance",
    "layouts",
)
#: Columns of the components that are worked on at a time.
STEP = 1 << 18
_KIND = "lorafind-basis"
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class BasisFile:
    """An opened basis file; the components stay on the disk until they are asked for."""

    path: Path
    header: Header
    facts: Mapping[str, Any]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in order."""
        return tuple(self.facts["groups"])

    @property
    def size(self) -> int:
        """k."""
        return int(self.facts["components"])

    def width(self, group: str) -> int:
        """d_g."""
        return self.header.tensors[f"mean/{group}"].shape[0]

    def array(self, name: str) -> np.ndarray:
        """A whole tensor."""
        info = self.header.tensors[name]
        count = int(np.prod(info.shape))
        with self.path.open("rb") as file:
            file.seek(self.header.data_start + info.begin)
            raw = np.fromfile(file, _DTYPES[info.dtype], count)
        return raw.reshape(info.shape)

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """Components restricted to some columns of a group, k × c float32."""
        info = self.header.tensors[f"components/{group}"]
        width, count = info.shape[1], tile.stop - tile.start
        out = np.empty((self.size, count), np.float16)
        start = self.header.data_start + info.begin
        with self.path.open("rb") as file:
            for k in range(self.size):
                file.seek(start + 2 * (k * width + tile.start))
                out[k] = np.fromfile(file, np.float16, count)
        return out.astype(np.float32)

    def space(self, layouts: Mapping[str, int], components: bool = True) -> Space:
        """For queries. layouts: digest → id in an index; components: have them in memory."""
        centres = {g: self.array(f"centres/{g}") for g in self.groups}
        return Space(
            self.groups,
            {g: self.array(f"components/{g}") for g in self.groups if components},
            {g: self.array(f"gram/{g}") for g in self.groups},
            means_of(centres, self.facts["layouts"], layouts),
            self.array("eigenvalues"),
            self.facts["weights"],
        )


def means_of(
    centres: Mapping[str, np.ndarray], digests: Sequence[str], layouts: Mapping[str, int]
) -> dict[int, dict[str, np.ndarray]]:
    """Projected means as :class:`Space` has them: layout id (−1: pooled) → group → k numbers.

    centres: group → (1 + m) × k; digests: of the m layouts; layouts: digest → id in an index.
    Layouts that the index lacks are left out.
    """
    rows = {-1: 0}
    rows.update((layouts[d], 1 + i) for i, d in enumerate(digests) if d in layouts)
    return {layout: {g: c[row] for g, c in centres.items()} for layout, row in rows.items()}


class Writer:
    """Writes a basis file piece by piece; it appears under its name when it is whole.

    resumed: what an interrupted run had written of just this basis is still there.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[type[np.generic], tuple[int, ...]]],
        facts: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        header: dict[str, Any] = {
            "__metadata__": {"format": _KIND, "lorafind": json.dumps(facts, ensure_ascii=False)}
        }
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        end = 0
        # Larger items first, so that every tensor lies on a multiple of its item size.
        for name in sorted(shapes, key=lambda n: (-np.dtype(shapes[n][0]).itemsize, n)):
            dtype, shape = np.dtype(shapes[name][0]), shapes[name][1]
            begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            self._places[name] = begin, dtype, shape
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        head = len(text).to_bytes(8, "little") + text
        self._file = os.open(self.part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        # Components that an interrupted run has written are kept, if they are of this basis.
        whole = os.fstat(self._file).st_size == self._start + end
        self.resumed = whole and os.read(self._file, len(head)) == head
        if not self.resumed:
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, self._start + end)
            self._at(0, head)

    def _at(self, place: int, data: bytes) -> None:
        os.lseek(self._file, place, os.SEEK_SET)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def write(self, name: str, array: np.ndarray) -> None:
        """A whole tensor."""
        begin, dtype, shape = self._places[name]
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}, not {shape}")
        self._at(self._start + begin, np.ascontiguousarray(array, dtype).tobytes())

    def write_columns(self, name: str, tile: slice, block: np.ndarray) -> None:
        """Some columns of a matrix, or of a vector as its one row."""
        begin, dtype, shape = self._places[name]
        rows, width = np.ascontiguousarray(block, dtype), shape[-1]
        for k, row in enumerate(rows):
            self._at(self._start + begin + dtype.itemsize * (k * width + tile.start), row.tobytes())

    def commit(self) -> None:
        """Everything is written: the file gets its name."""
        os.fsync(self._file)
        self.close()
        os.replace(self.part, self.path)

    def close(self) -> None:
        """Let go of the file; what is written of it stays for the next run."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of a basis file, from its header alone. Raises BasisProblem."""
    return dict(load(path).facts)


def load(path: str | os.PathLike[str]) -> BasisFile:
    """Open a basis file and check that it is whole and consistent. Raises BasisProblem."""
    place = Path(path)
    if not place.exists():
        raise BasisProblem(f"There is no file {place}.")
    try:
        header = read_header(place)
    except NotAnAdapter as error:
        raise BasisProblem(f"{place} is no basis: {error.reason}.") from error
    except OSError as error:
        raise BasisProblem(f"{place} cannot be read: {error.strerror}.") from error
    if header.metadata.get("format") != _KIND or "lorafind" not in header.metadata:
        raise BasisProblem(f"{place} is a safetensors file, but no basis of lorafind.")
    try:
        facts = json.loads(header.metadata["lorafind"])
        newest = int(facts["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise BasisProblem(f"{place} is damaged: its facts cannot be read.") from error
    if newest > FORMAT:
        raise BasisProblem(f"{place} is of a newer format ({newest}): update lorafind.")
    found = BasisFile(place, header, facts)
    why = _inconsistent(found)
    if why:
        raise BasisProblem(f"{place} is damaged: {why}.")
    return found


def _inconsistent(basis: BasisFile) -> str:
    """Why facts and tensors do not fit together; empty where they do."""
    facts, tensors = basis.facts, basis.header.tensors
    for name in _NEEDED:
        if name not in facts:
            return f"it does not say {name!r}"
    if facts["feature"] not in FEATURES or facts["metric"] not in ("cosine", "euclidean"):
        return f"feature {facts['feature']!r} with metric {facts['metric']!r} is not known"
    k, rows = int(facts["components"]), 1 + len(facts["layouts"])
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "scale": ("F64", (k,)),
        "offset": ("F64", (k,)),
        "test": ("F64", (k,)),
    }
    for group in facts["groups"]:
        mean = tensors.get(f"mean/{group}")
        if mean is None or len(mean.shape) != 1:
            return f"the mean of {group} is missing"
        wanted[f"components/{group}"] = "F16", (k, mean.shape[0])
        wanted[f"gram/{group}"] = "F64", (k, k)
        wanted[f"centres/{group}"] = "F32", (rows, k)
    for name, (dtype, shape) in wanted.items():
        info: TensorInfo | None = tensors.get(name)
        if info is None or info.dtype != dtype or info.shape != shape:
            return f"{name} is not {dtype} {list(shape)}"
    return ""


def test_row(group: str, width: int, tile: slice) -> np.ndarray:
    """Some columns of the test vector of a group: fixed signs over √d_g, so that it has length 1.

    The signs are the stream SHAKE-128("lorafind/test/v1/<group>") that ``signatures/signs.py``
    makes.
    """
    signs = stream("test", group, width)[tile]
    return signs.astype(np.float32) / np.float32(np.sqrt(width))


def test_coordinates(basis: BasisFile) -> np.ndarray:
    """The calibrated coordinates of the test vector, k float64, from what the file holds."""
    parts = np.zeros((1, len(basis.groups), basis.size))
    for position, group in enumerate(basis.groups):
        width = basis.width(group)
        made = np.zeros(basis.size)
        for start in range(0, width, STEP):
            tile = slice(start, min(start + STEP, width))
            made += basis.columns(group, tile) @ test_row(group, width, tile)
        centre = basis.array(f"centres/{group}")[0]
        parts[0, position] = basis.facts["weights"][group] * made - centre
    grams = [basis.array(f"gram/{group}") for group in basis.groups]
    everything = np.ones((1, len(basis.groups)), bool)
    found = solve(grams, parts, everything, basis.size)[0]
    return found * basis.array("scale") + basis.array("offset")


def self_test(path: str | os.PathLike[str]) -> None:
    """Compute the coordinates of the test vector anew and compare them with those stored.

    Raises BasisProblem where they differ, or the file is no basis.
    """
    basis = load(path)
    stored, found = basis.array("test"), test_coordinates(basis)
    if not np.linalg.norm(found - stored) <= TOLERANCE * np.linalg.norm(stored) + 1e-9:
        raise BasisProblem(
            f"{path} fails its self-test: what it computes is not what it says that it should; "
            "fetch or make it again."
        )


def fits(basis: BasisFile) -> None:
    """Raises BasisProblem where this version of lorafind makes other signatures."""
    version = basis.facts["signature_version"]
    if basis.facts["feature"] in ("style", "delta") and version != SIGNATURE_VERSION:
        raise BasisProblem(
            f"{basis.path} stands on signatures of version {version}, this lorafind makes version "
            f"{SIGNATURE_VERSION}: get a basis made for it."
        )


def contents(hashes: Sequence[str]) -> np.ndarray:
    """SHA-256 contents in hex → sorted n × 32 uint8."""
    rows = [np.frombuffer(bytes.fromhex(one), np.uint8) for one in sorted(set(hashes))]
    return np.stack(rows) if rows else np.zeros((0, 32), np.uint8)

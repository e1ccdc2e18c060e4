"""What goes into the index and comes out of it, as plain records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

_SURROGATE = re.compile("[\ud800-\udfff]")


class Known(NamedTuple):
    """A row of ``files``, as :mod:`lorafind.index.reconcile` compares it (see ``schema.py``)."""

    id: int
    root: bytes
    path: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int
    is_link: bool
    probe: bytes | None
    status: str
    reason: str
    sha256: str | None
    lora_id: int | None
    version: int
    read_ns: int
    presence: str


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the reading of a file gave.

    status: ``lora`` or the outcome that kept it out, with its reason. version: of reader and
    signature; files of another one are read again. read_ns: ``time.time_ns()`` before the file
    was opened. probe: see ``files/scan.py``; without one a file is not known again after a move.
    """

    status: str
    version: int
    read_ns: int
    reason: str = ""
    sha256: str | None = None
    probe: bytes | None = None
    lora_id: int | None = None


class Module(NamedTuple):
    """One module of a layout; a Place and its shape."""

    name: str
    group: str
    o: int
    n: int
    vector: bool
    late: bool


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """A row of ``loras`` (see ``schema.py``); ``norms``: ‖ΔW_m‖², one per module of the layout."""

    content: str
    data_sha256: str
    architecture: str
    family: str
    spelling: str
    ranks: Any
    alphas: Any
    dtype: str
    effective_dtype: str
    layout: int
    norm: float
    norms: np.ndarray
    version: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    unknown_keys: Sequence[str] = ()
    extras: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredSignature:
    """The style signature of a LoRA as it is stored; G = number of bits in ``groups``.

    scales: G × float32. votes: G × float64. style: G × 32,768 int8.
    """

    version: int
    groups: int
    scales: np.ndarray
    votes: np.ndarray
    style: np.ndarray


@dataclass(frozen=True, slots=True)
class Relation:
    """What was proved of a pair x < y; ``grade`` is empty where there was nothing."""

    x: int
    y: int
    version: int
    grade: str = ""
    direction: int = 0
    steps: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredBasis:
    """A basis: its facts and its arrays by name."""

    id: str
    architecture: str
    kind: str
    version: int
    facts: Mapping[str, Any]
    parts: Mapping[str, np.ndarray]
    made_ns: int = 0


def to_text(value: Any) -> str:
    """JSON for a column; NaN and infinities become null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    # An escape of its own would be undone by SQLite's JSON functions, to no valid text.
    return _SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def readable(text: str) -> str:
    """``text`` with lone surrogates (undecodable bytes of names) written as escapes."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

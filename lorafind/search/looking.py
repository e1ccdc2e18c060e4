"""One file looked at: its header, or every number and byte of it, before anything is told."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorafind.files import hashes, safetensors, sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import Header
from lorafind.files.sniff import is_pickled
from lorafind.formats.adapter import ModulePlan, Plan
from lorafind.formats.plan import plan_of

if TYPE_CHECKING:
    from lorafind.formats.adapter import Adapter
    from lorafind.formats.delta import Delta
    from lorafind.formats.read import Reading


@dataclass(frozen=True)
class Weighed:
    """A module's numbers that only its tensors tell. square: ‖ΔW‖², or of its parameters."""

    scale: float
    square: float
    alpha: float | None = None


@dataclass
class Looked:
    """What the reading of a file gave; None or empty what it did not.

    outcome, reason as in :class:`lorafind.formats.read.Reading`; whole: True where every byte was
    read; weighed: by module; magnitudes: extra → norm of DoRA's magnitudes (NaN as they are).
    """

    path: Path | str
    outcome: str = ""
    reason: str = ""
    whole: bool = False
    header: Header | None = None
    plan: Plan | None = None
    adapter: Adapter | None = None
    data_sha256: str | None = None
    digests: hashes.Hashes | None = None
    weighed: dict[str, Weighed] = field(default_factory=dict)
    magnitudes: dict[str, float] = field(default_factory=dict)

    def recorded(self, claims: dict[str, str]) -> list[hashes.Recorded]:
        """Each claimed hash beside the bytes; see :func:`hashes.recorded`."""
        if self.header is None:
            return hashes.recorded(claims, self.digests)
        by_name = partial(hashes.by_sorted_name, self.path, self.header)
        try:
            return hashes.recorded(claims, self.digests, by_name)
        except NotAnAdapter:
            # It has changed since: of what was read, nothing can be told of the claims.
            return hashes.recorded(claims, None)


def header_of(path: Path | str) -> Looked:
    """Header and plan, without torch. Never raises for a bad file."""
    looked = Looked(path)
    try:
        if is_pickled(path):
            why = f"{os.path.basename(path)} is a PyTorch file, which has no header to read"
            raise NotAnAdapter("pickle", why)
        looked.header = safetensors.read_header(path)
        looked.plan = plan_of(looked.header, sidecars.adapter_config(path))
        looked.outcome = "lora"
    except NotAnAdapter as error:
        looked.outcome, looked.reason = error.outcome, error.reason
    return looked


def all_of(path: Path | str, allow_pickle: bool = False) -> Looked:
    """Every number and every byte. Never raises for a bad file."""
    from lorafind.formats.read import read
    from lorafind.signatures.constants import TOO_LARGE

    looked = Looked(path, whole=True)
    deltas: dict[str, tuple[float, float]] = {}

    def weigh(module: ModulePlan, delta: Delta) -> None:
        deltas[module.name] = delta.scale, 0.0 if delta.is_zero else delta.squared_norm()

    reading = read(path, allow_pickle, visit=weigh)
    plan, adapter = reading.plan, reading.adapter
    try:
        if plan is not None and adapter is not None:
            if reading.outcome == "zero":
                for module in plan.modules:
                    weigh(module, adapter.modules[module.name])
            _weigh_all(looked, plan, adapter, deltas)
            looked.adapter = adapter
        looked.outcome, looked.reason, looked.plan = reading.outcome, reading.reason, plan
        if bad := next((n for n, w in looked.weighed.items() if not w.square < TOO_LARGE), None):
            looked.outcome = "invalid"
            looked.reason = f"its numbers at {bad} are too large to be weights: it is broken"
            looked.adapter, looked.weighed = None, {}
    except NotAnAdapter as error:
        # A large file is read again for what does not fit the one pass: it may be another by then.
        looked.outcome, looked.reason = error.outcome, error.reason
    looked.data_sha256 = reading.data_sha256
    _hash(looked, reading)
    return looked


def _weigh_all(
    looked: Looked, plan: Plan, adapter: Adapter, deltas: dict[str, tuple[float, float]]
) -> None:
    alphas: dict[str, float] = {}
    for module in plan.modules:
        key = module.alpha
        if key is not None and key not in alphas:
            alphas[key] = float(adapter.fetch(key).item())
        alpha = None if key is None else alphas[key]
        looked.weighed[module.name] = Weighed(*deltas[module.name], alpha)
    for name in magnitudes_of(plan):
        looked.magnitudes[name] = float(adapter.extra(name).double().norm())


def magnitudes_of(plan: Plan) -> Iterator[str]:
    """The extras of a plan that are DoRA's magnitudes."""
    for name in plan.extras:
        if name.endswith((".dora_scale", ".dora_scale.input")):
            yield name


def finite(value: float | None) -> float | None:
    """The value, None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _hash(looked: Looked, reading: Reading) -> None:
    stored = None
    try:
        if not is_pickled(looked.path):
            stored = reading.header or safetensors.read_header(looked.path)
    except NotAnAdapter:
        # No safetensors file: of its hashes those of the plain bytes remain.
        stored = None
    looked.header = reading.header or stored
    try:
        # A PyTorch file has no data section of its own.
        data = reading.data_sha256 if stored is not None else None
        looked.digests = hashes.hashes(looked.path, stored, reading.sha256, data)
    except NotAnAdapter:
        # The reason stands in the outcome: what cannot be read has no hash.
        looked.digests = None

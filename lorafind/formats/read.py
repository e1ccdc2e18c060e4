"""A path → an Adapter, or the honest word for what the file is."""

from __future__ import annotations

import os
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from torch import Tensor

from lorafind.files import pickled, safetensors, sidecars
from lorafind.files.outcome import NotAnAdapter, one_line
from lorafind.files.place import is_remote, state
from lorafind.files.safetensors import (
    FLOATS,
    STREAM_ABOVE,
    Header,
    Path,
)
from lorafind.files.sniff import is_pickled
from lorafind.files.tensors import (
    all_finite,
    as_tensor,
    effective_dtype,
    fetch_stored,
    runs,
)
from lorafind.formats.adapter import Adapter, Fetch, ModulePlan, Plan
from lorafind.formats.delta import Delta
from lorafind.formats.plan import plan_of, weights_of

#: Tensors up to this many bytes (alphas above all) are kept while a large file is streamed: each
#: is wanted again, and to open the file for it costs more than its bytes.
SMALL = 1024

Visit = Callable[[ModulePlan, Delta], None]


@dataclass(frozen=True)
class Reading:
    """What became of one file.

    outcome: ``lora``, ``zero`` (ΔW = 0), ``invalid`` (NaN, Inf, contradictory shapes), or what the
    file is instead; reason: one sentence, empty for ``lora``. The digests are SHA-256 in hex: of
    the file, of its data section (AutoV3 is its beginning), and the content (Header.content); None
    where the file was not read to its end.
    """

    outcome: str
    reason: str = ""
    plan: Plan | None = None
    adapter: Adapter | None = None
    header: Header | None = None
    sha256: str | None = None
    data_sha256: str | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason))


def read(
    path: Path,
    allow_pickle: bool = False,
    buffer: bytearray | None = None,
    visit: Visit | None = None,
    size: int | None = None,
) -> Reading:
    """Read a file once: header, both digests, every number looked at. Never raises for bad input.

    The adapter's tensors are in memory, in ``buffer`` where one is given (they change with the next
    file that is read into it); those of a file above STREAM_ABOVE are read again from the disk by
    each access. visit: called with every module and its ΔW, for a large file during the one pass.
    size: in bytes, where the caller knows it: a store is then not asked for it.
    """
    try:
        config = sidecars.adapter_config(path)
        if is_pickled(path):
            return _read_pickled(path, allow_pickle, config, visit)
        if (state(path).st_size if size is None else size) > STREAM_ABOVE:
            return _read_stream(path, config, visit)
        return _read_whole(path, config, buffer, visit)
    except NotAnAdapter as error:
        return Reading(error.outcome, error.reason)
    except OSError as error:
        told = safetensors.refused(path, error)
        return Reading(told.outcome, told.reason)


def open_adapter(path: Path, allow_pickle: bool = False) -> Adapter:
    """An adapter that reads each tensor from the disk when it is asked for.

    An object in a store is copied to this machine first (:mod:`lorafind.files.spool`). Raises
    NotAnAdapter; values (NaN, zero) are not looked at.
    """
    config = sidecars.adapter_config(path)
    if is_remote(path):
        return _open_copy(path, allow_pickle, config)
    if is_pickled(path):
        found = pickled.load(path, allow_pickle)
        return _adapter(plan_of(found.header, config), found.header, found.tensors.__getitem__)
    header = safetensors.read_header(path)
    return _adapter(plan_of(header, config), header, _positional(path, header))


def _open_copy(path: Path, allow_pickle: bool, config: Mapping[str, Any] | None) -> Adapter:
    from lorafind.files.spool import copy_of

    def check() -> None:
        # What holds no adapter is told by its header, before all of it is loaded.
        if not is_pickled(path):
            plan_of(safetensors.read_header(path), config)

    try:
        copy = copy_of(os.fspath(path), check)
    except OSError as error:
        raise safetensors.refused(path, error) from error
    if is_pickled(path):
        found = pickled.load(copy.path, allow_pickle)
        return _adapter(plan_of(found.header, config), found.header, found.tensors.__getitem__)
    header = safetensors.read_header(copy.path)
    # Through ``copy`` itself at each call: it is there as long as something holds it.
    return _adapter(
        plan_of(header, config), header, lambda key: _positional(copy.path, header)(key)
    )


# ---------------------------------------------------------------------------- the three ways


def _read_whole(
    path: Path,
    config: Mapping[str, Any] | None,
    buffer: bytearray | None,
    visit: Visit | None,
) -> Reading:
    plan: Plan

    def check(header: Header) -> None:
        nonlocal plan
        if header.size > STREAM_ABOVE:
            why = f"{PurePath(path).name} grew while it was looked at: index it again"
            raise NotAnAdapter("changing", why)
        plan = plan_of(header, config)

    stored = safetensors.load(path, buffer, check)
    keys = dict.fromkeys(key for module in plan.modules for key in module.keys)
    finite = all(all_finite(t) for t in runs(stored.header, stored.data, keys))
    reading = Reading(
        "lora",
        header=stored.header,
        sha256=stored.sha256,
        data_sha256=stored.data_sha256,
        content=stored.content,
    )
    return _judge(reading, plan, stored.header, fetch_stored(stored), finite, visit)


def _read_pickled(
    path: Path, allow_pickle: bool, config: Mapping[str, Any] | None, visit: Visit | None
) -> Reading:
    found = pickled.load(path, allow_pickle)
    plan = plan_of(found.header, config)
    fetch = found.tensors.__getitem__
    keys = dict.fromkeys(key for module in plan.modules for key in module.keys)
    finite = all(all_finite(fetch(k)) for k in keys if found.header.tensors[k].dtype in FLOATS)
    reading = Reading(
        "lora",
        header=found.header,
        sha256=found.sha256,
        data_sha256=found.data_sha256,
        content=found.content,
    )
    return _judge(reading, plan, found.header, fetch, finite, visit)


def _read_stream(path: Path, config: Mapping[str, Any] | None, visit: Visit | None) -> Reading:
    stream = safetensors.stream(path)
    header = stream.header
    plan = plan_of(header, config)
    owners: dict[str, list[ModulePlan]] = {}
    missing: dict[str, int] = {}
    for module in plan.modules:
        missing[module.name] = len(module.keys)
        for key in module.keys:
            owners.setdefault(key, []).append(module)
    # The parts of a fused layer share their tensors: the last one lets go of them.
    wanted = {key: len(modules) for key, modules in owners.items()}
    held: dict[str, Tensor] = {}
    small: dict[str, Tensor] = {}
    finite = True
    for key, raw in stream.read(owners):
        tensor = as_tensor(header.tensors[key], raw)
        finite = finite and (header.tensors[key].dtype not in FLOATS or all_finite(tensor))
        held[key] = tensor
        if len(raw) <= SMALL:
            small[key] = tensor
        for module in owners[key]:
            missing[module.name] -= 1
            if missing[module.name] == 0:
                if visit is not None:
                    visit(module, module.bind(_or_disk(ChainMap(held, small), path, header)))
                for used in module.keys:
                    wanted[used] -= 1
                    if not wanted[used]:
                        del held[used]
    reading = Reading(
        "lora",
        header=header,
        sha256=stream.sha256,
        data_sha256=stream.data_sha256,
        content=stream.content,
    )
    return _judge(reading, plan, header, _or_disk(small, path, header), finite, None)


def _or_disk(held: Mapping[str, Tensor], path: Path, header: Header) -> Fetch:
    """From memory, or again from the disk."""
    disk = _positional(path, header)

    def fetch(key: str) -> Tensor:
        return held[key] if key in held else disk(key)

    return fetch


def _judge(
    reading: Reading, plan: Plan, header: Header, fetch: Fetch, finite: bool, visit: Visit | None
) -> Reading:
    """The outcome by the values, with the adapter."""
    if not finite:
        bad = next((m.name for m in plan.modules if not m.bind(fetch).is_finite()), "a module")
        why = f"its numbers at {bad} are not all finite (NaN or infinite): it is broken"
        return replace(reading, outcome="invalid", reason=why, plan=plan)
    alphas = Counter(m.alpha for m in plan.modules if m.alpha is not None)
    off = sum(count for alpha, count in alphas.items() if fetch(alpha).item() == 0)
    if off:
        said = f"alpha is 0 in {off} modules: read as alpha = rank, which is what trainers mean"
        plan = replace(plan, notes=(*plan.notes, said))
    adapter = _adapter(plan, header, fetch)
    if all(module.bind(fetch).is_zero for module in plan.modules):
        why = "its ΔW is zero: it changes nothing (saved before the first step?)"
        return replace(reading, outcome="zero", reason=why, plan=plan, adapter=adapter)
    if visit is not None:
        for module in plan.modules:
            visit(module, module.bind(fetch))
    return replace(reading, plan=plan, adapter=adapter)


# ---------------------------------------------------------------------------- dtypes


def _positional(path: Path, header: Header) -> Fetch:
    raw = safetensors.fetch_from(path, header)
    return lambda key: as_tensor(header.tensors[key], raw(key))


def _adapter(plan: Plan, header: Header, fetch: Fetch) -> Adapter:
    weights, dtype = weights_of(plan, header)
    return Adapter(plan, fetch, dtype, effective_dtype(_Lazily(weights, fetch), dtype))


class _Lazily(Sequence[Tensor]):
    """Tensors that are fetched when they are looked at: a sample seldom needs them all."""

    def __init__(self, keys: Sequence[str], fetch: Fetch) -> None:
        self._keys = keys
        self._fetch = fetch

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return _Lazily(self._keys[item], self._fetch)
        return self._fetch(self._keys[item])

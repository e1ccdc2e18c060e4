"""What is tried with an input, and what must hold whatever it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from lorafind.files.header import DTYPE_BITS, Header, TensorInfo, parse_header
from lorafind.files.outcome import MAX_REASON, OUTCOMES, NotAnAdapter
from lorafind.files.tensors import DTYPES, as_tensor
from lorafind.formats.adapter import ModulePlan, Plan
from lorafind.formats.delta import Delta
from lorafind.formats.plan import plan_of, understand
from lorafind.formats.read import Reading, read
from lorafind.search.info import KINDS, info
from lorafind.signatures.constants import TOO_LARGE
from lorafind.signatures.features import Signature, signature
from lorafind.signatures.sketch import Sketcher
from tests.fuzz import grammar
from tests.fuzz.source import Source
from tests.fuzz.watch import watched

#: Numbers in the pool from which tensors are filled.
POOL = 2**18
#: A file of more bytes is made no tensors for.
MOST_BYTES = 2**20
#: A ΔW of more numbers is not made dense to check it.
MOST_NUMBERS = 2**16
#: A few bytes of Kronecker factors stand for a ΔW of any size, which takes its time to sketch.
MOST_DENSE = 2**20


def file(path: Path, allow_pickle: bool = False) -> str:
    """Read a file in every way; returns its outcome."""
    with watched():
        reading = read(path, allow_pickle)
    _sentence(reading.outcome, reading.reason)
    if reading.plan is not None and reading.header is not None:
        accounted(reading.plan, list(reading.header.tensors))
        if reading.adapter is not None and _large(reading.plan, reading.adapter.fetch):
            return "large"
    assert (reading.adapter is not None) == (reading.outcome in ("lora", "zero"))
    with watched(2.0):
        row = info(path, allow_pickle=allow_pickle, keys=True, modules=True)
    json.dumps(row, allow_nan=False)
    assert row["outcome"] in (reading.outcome, "invalid"), (row["outcome"], reading.outcome)
    if reading.outcome == "lora":
        _sketched(reading)
    return reading.outcome


def bytes_of_header(data: bytes) -> str:
    """Check a header as the reference implementation does; returns the outcome."""
    with watched():
        try:
            header = parse_header(data, len(data))
            outcome = "lora"
        except NotAnAdapter as error:
            outcome = error.outcome
            _sentence(outcome, error.reason)
        except ValueError:
            # The header is longer than what was given of the file.
            assert len(data) < 8 + int.from_bytes(data[:8], "little")
            outcome = "unreadable"
    reference = _reference(data)
    if outcome in ("lora", "empty"):
        assert reference is not None, "more lenient than the reference"
    if outcome == "lora":
        assert reference is not None
        shapes = {name: tuple(entry["shape"]) for name, entry in reference.items()}
        assert {name: i.shape for name, i in header.tensors.items()} == shapes
    elif reference:
        assert outcome == "unsupported" or any(len(e["shape"]) > 64 for e in reference.values())
    return outcome


def _reference(data: bytes) -> dict[str, Any] | None:
    try:
        return dict(safetensors.deserialize(data))
    except Exception:
        # Its one exception is made in Rust and has no common base with others.
        return None


def names(source: Source) -> str:
    """Understand made-up tensors, bind and sketch them; returns the outcome."""
    # The arithmetic takes most of the time, and the understanding has most of the branches.
    thorough = not source.number(0, 3)
    tensors = grammar.tensors(source)
    texts, settings = grammar.metadata(source), grammar.settings(source)
    config = settings if source.seldom(3) else None
    try:
        with watched():
            plan = understand(tensors, texts, config)
    except NotAnAdapter as error:
        _sentence(error.outcome, error.reason)
        return error.outcome
    accounted(plan, list(tensors))
    header = _stored(tensors, texts)
    if header is None:
        return "large"
    again = plan_of(header, config)
    assert (again.architecture, again.family) == (plan.architecture, plan.family)
    fetch = filled(source, header)
    try:
        with watched():
            deltas = [(m, m.bind(fetch)) for m in plan.modules]
            finite = all(delta.is_finite() for _, delta in deltas)
    except NotAnAdapter as error:
        # A flag beside the weights has a dtype that torch lacks.
        assert error.outcome == "unsupported"
        return error.outcome
    if not thorough:
        return "understood"
    if _large(plan, fetch):
        return "large"
    for module, delta in deltas:
        _alike(module, delta)
    if not finite:
        return "invalid"
    with watched(2.0):
        zero = [delta.is_zero for _, delta in deltas]
        made = _signature([(m, d) for m, d in deltas])
    _weighed(deltas, zero, made)
    return "zero" if all(zero) else "lora"


def _stored(tensors: grammar.Tensors, texts: Mapping[str, str]) -> Header | None:
    """The header of a file of these tensors; None where it would be large or cannot be."""
    infos: dict[str, TensorInfo] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits > 8 * MOST_BYTES or bits % 8:
            return None
        infos[name] = TensorInfo(dtype, shape, at, at + bits // 8)
        at += bits // 8
    return Header(infos, dict(texts), 0, at) if at <= MOST_BYTES else None


_pool = torch.randn(POOL, generator=torch.Generator().manual_seed(1))
_halves = _pool.half().numpy().tobytes()


def numbers(size: int) -> bytes:
    """Bytes that are ordinary numbers in float16 and bfloat16."""
    return (_halves * (size // len(_halves) + 1))[:size]


FILLINGS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t,
    lambda t: t * 0,
    lambda t: t * 1e-3,
    lambda t: t.abs() + 1,
    lambda t: t * 1e18,
    lambda t: t * 1e-40,
    lambda t: torch.where(t > 2.5, torch.tensor(math.nan), t),
    lambda t: torch.where(t > 2.5, torch.tensor(math.inf), t),
)


def filled(source: Source, header: Header) -> Callable[[str], Tensor]:
    """Numbers for the tensors of a header: mostly ordinary ones."""
    chosen = {
        key: source.pick(FILLINGS) if source.seldom(12) else FILLINGS[0] for key in header.tensors
    }
    made: dict[str, Tensor] = {}

    def fetch(key: str) -> Tensor:
        if key not in made:
            dtype, shape, begin, end = header.tensors[key]
            count = math.prod(shape)
            if dtype not in DTYPES:
                return as_tensor(header.tensors[key], bytearray(end - begin))
            start = begin % 1000
            numbers = chosen[key](_pool[start : start + count].clone())
            if count > len(numbers):
                numbers = numbers.repeat(-(-count // max(1, len(numbers))))[:count]
            made[key] = numbers.reshape(shape).to(DTYPES[dtype])
        return made[key]

    return fetch


def _large(plan: Plan, fetch: Callable[[str], Tensor]) -> bool:
    """True where a ΔW has no factors and many numbers."""
    large = (m for m in plan.modules if math.prod(m.shape) > MOST_DENSE)
    return any(m.bind(fetch).factors(torch.float32) is None for m in large)


# ---------------------------------------------------------------------------- what must hold


def _sentence(outcome: str, reason: str) -> None:
    assert outcome in OUTCOMES, outcome
    assert (outcome == "lora") == (not reason), reason
    assert "\n" not in reason and len(reason) <= MAX_REASON
    assert "Traceback" not in reason and "Error:" not in reason, reason


def accounted(plan: Plan, keys: list[str]) -> None:
    """Every key has one fate, every module one name."""
    assert plan.keys.keys() == set(keys)
    assert all(how.partition(":")[0] in KINDS for how in plan.keys.values())
    assert plan.modules and len({m.name for m in plan.modules}) == len(plan.modules)
    for module in plan.modules:
        assert all(plan.keys[key].startswith("module:") for key in module.keys), module.name
        assert min(module.shape) > 0 and module.rank > 0, module
        assert module.place.component and module.name.count("/") >= 1, module.name
    assert set(plan.extras.values()) <= set(keys)
    assert all(isinstance(note, str) and note for note in plan.notes)


def _alike(module: ModulePlan, delta: Delta) -> None:
    """A ΔW is what its plan says."""
    assert delta.shape == module.shape, (module.name, delta.shape, module.shape)
    assert delta.tensors()
    o, n = delta.shape
    if o * n > MOST_NUMBERS or not delta.is_finite():
        return
    dense = delta.dense()
    assert dense.shape == (o, n)
    pair = delta.factors()
    if pair is not None:
        assert _near(pair[0] @ pair[1], dense), module.name
    square = float(dense.square().sum())
    if math.isfinite(square):
        # What cancels, or is below what a double holds to full precision.
        cancelled = 1e-20 * _largest(pair) if pair is not None else 1e-300
        assert math.isclose(delta.squared_norm(), square, rel_tol=1e-6, abs_tol=cancelled), (
            module.name
        )
    if o > 1:
        middle = o // 2
        try:
            part = delta.rows(0, middle)
        except ValueError:
            # What cannot be cut says so.
            return
        assert _near(part.dense(), dense[:middle]), module.name


def _largest(pair: tuple[Tensor, Tensor]) -> float:
    """What ‖B·A‖² is at most: the size of what may cancel in it."""
    return float(pair[0].square().sum() * pair[1].square().sum())


def _near(x: Tensor, y: Tensor) -> bool:
    size = float(y.abs().max()) if y.numel() else 0.0
    return not math.isfinite(size) or bool(((x - y).abs() <= 1e-6 * size + 1e-300).all())


def _signature(deltas: list[tuple[ModulePlan, Delta]]) -> Signature:
    sketcher = Sketcher(torch.device("cpu"))
    sketcher.add((module.place, delta) for module, delta in deltas)
    return signature(sketcher)


def _weighed(deltas: list[tuple[ModulePlan, Delta]], zero: list[bool], made: Signature) -> None:
    """The exact norms of a signature, made in float32, are those of the ΔW."""
    norms = dict(zip((p.name for p in made.places), made.norms, strict=True))
    assert norms.keys() == {m.name for m, _ in deltas}
    for (module, delta), none in zip(deltas, zero, strict=True):
        found = norms[module.name]
        if none:
            assert not found > 0, module.name
            continue
        if math.prod(module.shape) <= MOST_NUMBERS:
            true = delta.squared_norm()
            pair = delta.factors()
            limit = _largest(pair) if pair is not None else true
            if true > 1e-25 and limit < 1e25:
                assert math.isclose(found, true, rel_tol=1e-4, abs_tol=1e-5 * limit), module.name
    if (made.norms < TOO_LARGE).all():
        assert all(np.isfinite(sketch).all() for sketch in made.style.values())
        assert np.isfinite(made.identity).all()


def _sketched(reading: Reading) -> None:
    """Sketch what a file holds, where that is no great work."""
    assert reading.adapter is not None and reading.plan is not None
    if sum(m.rank * sum(m.shape) for m in reading.plan.modules) > 2**20:
        return
    with watched(2.0):
        deltas = [(m, m.bind(reading.adapter.fetch)) for m in reading.plan.modules]
        _signature(deltas)
    for module, delta in deltas:
        _alike(module, delta)


def length(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8

"""The trace of every LoRA of an index: sketches tell which are worth a look, then one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lorafind.files.outcome import NotAnAdapter
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.index.relate import place_of
from lorafind.index.store import Store
from lorafind.signatures.constants import DIMENSIONS
from lorafind.trace.origin import Parent, Trace, of_lora, shelf_of
from lorafind.trace.pursuit import SURVEY, Scan

#: The two keys of :func:`lorafind.index.classes.series_of`.
SERIES = ("sd", "other")
#: Seconds of tracing after which the rest is estimated, and estimates that are worth telling.
TRIAL, LONG = 3.0, 60.0
#: LoRAs that are compared with as many at once.
_BLOCK = 1024


def everything(store: Store, watch: Progress | None = None) -> Iterator[Trace]:
    """The trace of every LoRA of the index, those that cannot be read left out with a note.

    LoRAs that no other resembles by SURVEY.first standard deviations of the sketch are not read.
    Of the descents that would make a circle the last is left open (``likely``).
    """
    watch = watch or Silent()
    rows = [
        lora
        for (lora,) in store.conn.execute(
            "SELECT DISTINCT lora FROM files WHERE lora IS NOT NULL AND presence = 'here' "
            "ORDER BY lora"
        )
    ]
    wanted = {lora for pair in store.conn.execute("SELECT x, y FROM relations") for lora in pair}
    watch.stage("Comparing sketches", len(rows), 0)
    for key in SERIES:
        wanted |= resembling(
            lambda key=key: store.chunks.scan("identity", key),  # type: ignore[misc]
            lambda count: watch.advance(count, 0),
        )
    todo = [lora for lora in rows if lora in wanted]
    if len(todo) < len(rows):
        watch.note(
            f"{len(rows) - len(todo):,} of {len(rows):,} LoRAs resemble no other beyond chance and "
            "are not measured; tracing such a file by name looks closer."
        )
    watch.stage("Tracing", len(todo), 0)
    shelf, known = shelf_of(store), Descent()
    began, told = time.monotonic(), False
    done = 0
    for lora in rows:
        place = place_of(store, lora)
        if place is None:
            continue
        if lora not in wanted:
            yield Trace(place[0], lora, explained=0.0, left=1.0)
            continue
        try:
            yield known.joined(of_lora(store, lora, place[0], Silent(), shelf, SURVEY))
        except (IndexProblem, NotAnAdapter, OSError) as error:
            watch.note(str(error))
        done += 1
        watch.advance(1, 0)
        passed = time.monotonic() - began
        if not told and passed > TRIAL:
            told = True
            rest = (len(todo) - done) * passed / done
            if rest > LONG:
                watch.note(
                    f"The other {len(todo) - done:,} LoRAs will take about {rest / 60:.0f} minutes "
                    f"(an estimate from the first {done}); Ctrl-C shows what was found until then."
                )


def resembling(scan: Scan, tick: Callable[[int], None]) -> set[int]:
    """LoRAs with another whose sketch agrees by SURVEY.first standard deviations or more.

    The standard deviation between strangers is that of :func:`lorafind.trace.pursuit.shortlist`.
    Two blocks of the index are in memory at once.
    """
    found: set[int] = set()
    for ids, x, x_square in _blocks(scan()):
        for others, y, y_square in _blocks(scan()):
            variance = x_square @ y_square.T / DIMENSIONS
            near = (x @ y.T) ** 2 >= SURVEY.first**2 * variance
            near &= (variance > 0) & (ids[:, None] != others[None])
            found |= set(ids[near.any(1)].tolist())
        tick(len(ids))
    return found


def _blocks(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, sketches n × segments·128, squared norms n × segments), float32, LoRAs at ‖·‖ = 1."""
    for ids, rows in chunks:
        for start in range(0, len(ids), _BLOCK):
            part = rows[start : start + _BLOCK]
            norms = part["norms"].astype(np.float64)
            size = np.sqrt((norms**2).sum(1, keepdims=True))
            unit = np.divide(norms, size, out=np.zeros_like(norms), where=size > 0)
            sketch = part["sketch"].astype(np.float32) * unit.astype(np.float32)[:, :, None]
            square = (unit**2).astype(np.float32)
            yield ids[start : start + _BLOCK], sketch.reshape(len(part), -1), square


class Descent:
    """What is known to come from what; a circle is never closed."""

    def __init__(self) -> None:
        self._parents: dict[int, list[int]] = {}

    def joined(self, trace: Trace) -> Trace:
        """The trace with parents that come from it themselves moved to ``likely``."""
        if trace.lora is None:
            return trace
        kept = [p for p in trace.parents if not self._comes_from(p.lora, trace.lora)]
        self._parents[trace.lora] = [p.lora for p in kept]
        if len(kept) == len(trace.parents):
            return trace
        open_ = [_open(p) for p in trace.parents if p not in kept]
        return replace(trace, parents=kept, likely=[*trace.likely, *open_])

    def _comes_from(self, lora: int, ancestor: int) -> bool:
        seen, waiting = set(), [lora]
        while waiting:
            one = waiting.pop()
            if one == ancestor:
                return True
            if one not in seen:
                seen.add(one)
                waiting += self._parents.get(one, [])
        return False


def _open(p: Parent) -> dict[str, Any]:
    return {"path": p.path, "lora": p.lora, "weight": p.weight, "explained": p.explained or 0.0}

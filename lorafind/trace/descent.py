"""The descent of a whole collection: traces as a forest for people, as DOT for Graphviz."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorafind.trace.origin import Trace


@dataclass(frozen=True)
class Line:
    """One line of the tree. depth: 0 for a file that comes from no other; kind and weight: of the
    way from the file above; again: True where its own children stand elsewhere in the tree."""

    path: str
    depth: int
    kind: str = ""
    weight: float | None = None
    again: bool = False


def tree(traces: Iterable[Trace]) -> Iterator[Line]:
    """Parents with what was made of them below; a merge stands below each of its parents.

    Only files that have parents or children. What comes below is shown in full once.
    """
    below: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
    children: set[str] = set()
    for trace in traces:
        for parent in trace.parents:
            below[parent.path].append((trace.path, parent.kind, parent.weight))
            children.add(trace.path)
    # Two that claim to come from one another would have no root.
    roots = [path for path in below if path not in children]
    shown: set[str] = set()
    for start in [*sorted(roots), *sorted(below)]:
        if start in shown:
            continue
        stack: list[Line] = [Line(start, 0)]
        while stack:
            line = stack.pop()
            again = line.path in shown and line.path in below
            yield Line(line.path, line.depth, line.kind, line.weight, again)
            if again:
                continue
            shown.add(line.path)
            stack += [
                Line(path, line.depth + 1, kind, weight)
                for path, kind, weight in sorted(below.get(line.path, ()), reverse=True)
            ]


def dot(traces: Iterable[Trace]) -> Iterator[str]:
    """The lines of a Graphviz digraph, an edge from every parent to what was made of it."""
    yield "digraph descent {"
    yield "  rankdir=LR; node [shape=box];"
    named: set[str] = set()
    for trace in traces:
        for parent in trace.parents:
            for path in (parent.path, trace.path):
                if path not in named:
                    named.add(path)
                    yield f"  {_quoted(path)} [label={_quoted(os.path.basename(path))}];"
            label = _quoted(f"{parent.kind} {parent.weight:.3g}")
            yield f"  {_quoted(parent.path)} -> {_quoted(trace.path)} [label={label}];"
    yield "}"


def _quoted(text: str) -> str:
    # Undecodable bytes of names stay readable; DOT knows no escape but the quote's and backslash's.
    safe = text.encode("utf-8", "backslashreplace").decode()
    return json.dumps(safe, ensure_ascii=False)

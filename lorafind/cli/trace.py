"""``lorafind trace``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command, targets
from lorafind.cli.output import Column, Mode, clean, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.api import Index
    from lorafind.trace.origin import Trace

COLUMNS = (
    Column("path", "File", nearby),
    Column("parent", "Parent", nearby),
    Column("weight", "Weight", ".4g", "right", digits=6),
    Column("sd", "± (est.)", ".1g", "right", digits=6),
    Column("explained", "Explained", ".2%", "right", digits=6),
    Column("kind", "Kind"),
    Column("text", "How"),
)
TREE = (
    Column("tree", "Descent"),
    Column("kind", "Kind"),
    Column("weight", "Weight", ".4g", "right", digits=6),
)


@command
def trace(
    session: Session,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, names in the index, or - for a list on stdin.",
            metavar="TARGET",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every LoRA of the index; for people as a tree.")
    ] = False,
    as_dot: Annotated[
        bool, typer.Option("--dot", help="With --all: a graph for Graphviz on stdout.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin and .ckpt targets.")
    ] = False,
) -> int | None:
    """Which LoRAs of the index a file was merged, resized or cut from, with what weights.

    A parent is named only where the weights prove it: the sum of all parents leaves nothing but
    rounding (kind sum, factor sum), or the parent alone lies in the file to rounding while others
    are missing (part). What explains much without a proof is told as an estimate, and kin, such as
    epochs of one run, apart; neither is a parent. Weights multiply ΔW; of a factor sum (kohya's
    merge) it is the ratio, which stands in both factors. Explained: the share of ‖ΔW‖² that goes
    without this parent. ± is an estimate. With --all, Ctrl-C gives what was found until then.
    """
    if everything == bool(names):
        raise typer.BadParameter("name files, or give --all, and not both")
    if as_dot and not everything:
        raise typer.BadParameter("--dot needs --all")
    if as_dot and session.sink.mode not in (Mode.TABLE, Mode.TSV):
        raise typer.BadParameter("--dot has a form of its own: leave the other one out")
    from lorafind.api import Index

    found = _Found(session)
    with Index.open(session.db) as index, Watch(session.sink) as watch:
        if everything:
            traces = found.until_interrupted(index.trace_all(watch))
        else:
            traces = found.named(index, names or [], allow_pickle, watch)
        if as_dot:
            from lorafind.trace.descent import dot

            for line in dot(traces):
                sys.stdout.write(clean(line) + "\n")
                session.sink.count += "->" in line
        elif everything and session.sink.mode is Mode.TABLE:
            session.sink.rows(TREE, _tree(traces))
        elif session.sink.mode in (Mode.JSON, Mode.JSONL):
            session.sink.rows(COLUMNS, (t.to_json() for t in traces if t.parents or not everything))
        elif session.sink.mode is Mode.PATHS:
            session.sink.rows(COLUMNS, ({"path": p.path} for t in traces for p in t.parents))
        else:
            session.sink.rows(COLUMNS, found.rows(traces, tell=not everything))
    if found.code == Code.INTERRUPTED:
        session.sink.warn(
            f"Interrupted after {found.count:,} LoRAs: this is what was found until then."
        )
    elif everything and not session.sink.count:
        session.sink.note("No parent found for any LoRA of the index.")
    return found.code


class _Found:
    """Traces of what the user wants. code: the exit code so far; count: traces of ``--all``."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.code: int | None = None
        self.count = 0

    def until_interrupted(self, traces: Iterator[Trace]) -> Iterator[Trace]:
        """The traces until Ctrl-C, so that a tree, a graph or a document ends as it should."""
        try:
            for trace in traces:
                self.count += 1
                yield trace
        except KeyboardInterrupt:
            self.code = Code.INTERRUPTED

    def named(
        self, index: Index, names: list[str], allow_pickle: bool, watch: Watch
    ) -> Iterator[Trace]:
        """A trace per target; what cannot be traced is told."""
        from lorafind.files.outcome import NotAnAdapter
        from lorafind.index.problem import IndexProblem

        several = targets(names)
        for target in several:
            try:
                yield index.trace(target, allow_pickle, watch)
            except (IndexProblem, NotAnAdapter) as error:
                if len(several) == 1:
                    raise
                self.session.sink.warn(str(error))
                self.code = Code.PARTIAL

    def rows(self, traces: Iterator[Trace], tell: bool) -> Iterator[dict[str, Any]]:
        """One row per parent; ``tell``: what has no row is told on stderr."""
        for trace in traces:
            for parent in trace.to_json()["parents"]:
                yield {**parent, "path": trace.path, "parent": parent["path"]}
            if tell:
                for sentence in told(trace):
                    self.session.sink.note(sentence)


def told(trace: Trace) -> Iterator[str]:
    """What people should know of a trace beside its parents."""
    name = nearby(trace.path)
    if trace.copies:
        others = ", ".join(nearby(path) for path in trace.copies[:3])
        yield f"{name}: the same ΔW is in {others}; see `lorafind dupes`."
    if not trace.parents:
        yield f"{name}: no parent found."
    elif trace.explained is not None and trace.left is not None:
        missing = "" if trace.complete else ": a parent is missing from the index, or more"
        yield f"{name}: {trace.explained:.2%} of ‖ΔW‖² explained, {trace.left:.2g} left{missing}."
    if trace.limit is not None:
        yield (
            f"Parents of the usual strength below a weight of about {trace.limit:.2g} could be "
            "missed (an estimate)."
        )
    for other in trace.likely:
        yield (
            f"Not proved, an estimate: {other['weight']:.2g} × {nearby(other['path'])} would "
            f"explain {other['explained']:.0%} of ‖ΔW‖²: another state of one run, or an "
            "ingredient (or its sibling) of a merge that was cut down afterwards."
        )
    for other in trace.related:
        yield (
            f"Alike, but no proof of descent: {nearby(other['path'])} (cosine "
            f"{other['cosine']:.3f}: one run or one start; weights do not tell which came first)."
        )
    if trace.unread:
        yield f"{trace.unread} LoRAs that might be parents are out of reach and were not looked at."


def _tree(traces: Iterator[Trace]) -> Iterator[dict[str, Any]]:
    from lorafind.trace.descent import tree

    for line in tree(traces):
        again = " (see above)" if line.again else ""
        yield {
            "tree": "   " * line.depth + ("└─ " if line.depth else "") + nearby(line.path) + again,
            "kind": line.kind,
            "weight": line.weight,
        }

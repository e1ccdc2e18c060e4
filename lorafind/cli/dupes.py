"""``lorafind dupes``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.options import Session, command, targets
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch, duration

if TYPE_CHECKING:
    from lorafind.index.relate import Outlook
    from lorafind.search.dupes import Group

#: A full comparison that takes more seconds than this is not begun on a terminal without asking.
ASK_ABOVE = 60.0

COLUMNS = (
    Column("path", "File", nearby),
    Column("group", "Group", "d", "right"),
    Column("grade", "Grade"),
    Column("bytes", "Bytes", ",d", "right"),
    Column("removable", "May go"),
    Column("text", "How"),
)


@command
def dupes(
    session: Session,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Only groups with these files or folders, of which alone files may go; - for "
            "stdin.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    grade: Annotated[
        str,
        typer.Option(
            help="Grades to show, with commas, or all: file, tensors, weights, cast, scaled, part, "
            "resized, reweighted, near, kin. Default: all that are proved (not near and kin).",
            show_default=False,
        ),
    ] = "",
    keep: Annotated[
        str,
        typer.Option(
            help="Which file stays among those that hold all that the others do: newest, oldest, "
            "largest, smallest, highest-rank, shortest-path, or a pattern for paths."
        ),
    ] = "oldest",
    protect: Annotated[
        list[str] | None,
        typer.Option(help="A folder whose files always stay (repeat it).", show_default=False),
    ] = None,
    others: Annotated[
        bool,
        typer.Option(
            "--others",
            help="Only the files that may go: proved to be held by the keeper. Grades file, "
            "tensors and weights; cast, scaled, part and resized only if --grade names them.",
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Write what may go as a plan (JSON) to read and edit, for `lorafind apply`.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Compare all LoRAs with all, for every grade, however many there are. Tells how "
            "long it will take before it begins; goes on where it was interrupted.",
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --deep: begin without asking, however long.")
    ] = False,
) -> int | None:
    """The same LoRA under other names, spellings, dtypes, scales, ranks; nothing is changed.

    Every group has one keeper; the grade of a file says what was proved about it and the keeper.
    """
    from lorafind.api import Index
    from lorafind.index.problem import IndexProblem
    from lorafind.relations.buckets import COPIES
    from lorafind.relations.grades import GRADES
    from lorafind.search.dupes import PROVED, Choice

    named = [word for word in grade.split(",") if word]
    if wrong := [word for word in named if word not in (*GRADES, "all")]:
        raise typer.BadParameter(f"{wrong[0]!r} is no grade; choose from {', '.join(GRADES)}, all")
    within = targets(names or [])
    choice = Choice(
        GRADES if "all" in named else named or PROVED,
        [word for word in named if word != "all"],
        keep,
        protect or (),
        within,
    )
    with Index.open(session.db) as index:
        late = index.unfinished
        left = index.outlook() if deep else []
    if left and _agreed(session, left, yes):
        with Index.open(session.db, write=True) as index, Watch(session.sink) as watch:
            index.compare_all(watch)
            late = False
    elif late:
        try:
            with Index.open(session.db, write=True) as index, Watch(session.sink) as watch:
                index.finish(watch)
                late = False
        except IndexProblem as error:
            # Another process is indexing, or the index is read-only: what is proved still holds.
            session.sink.warn(f"{error} Relations of the newest LoRAs are not proved yet.")
    with Index.open(session.db) as index:
        done, total = index.compared_in_full
        if not late and done < total and set(choice.grades) - set(COPIES):
            session.sink.note(
                f"{done:,d} of {total:,d} LoRAs are compared in full; of the others only "
                f"{', '.join(COPIES)} were looked for: `lorafind dupes --deep` does the rest."
            )
        found = index.dupes(choice)
        if others or session.sink.mode is Mode.PATHS:
            rows: Iterator[dict[str, Any]] = _members(found)
            if others:
                rows = (row for row in rows if row["removable"])
            session.sink.rows(COLUMNS, rows)
        elif session.sink.mode in (Mode.JSON, Mode.JSONL):
            session.sink.rows(COLUMNS, (group.to_json() for group in found))
        else:
            freed = 0

            def counted() -> Iterator[Group]:
                nonlocal freed
                for group in found:
                    freed += group.freed_bytes
                    yield group

            session.sink.rows(COLUMNS, _members(counted()))
            if freed and plan is None:
                session.sink.note(
                    f"{freed / 1e6:,.1f} MB could be freed; `lorafind dupes -0 --others` lists "
                    "what may go."
                )
        if plan is not None:
            made = index.plan(plan.expanduser(), choice)
            session.sink.note(
                f"The plan {plan} lets {made.files:,d} files of {made.groups:,d} groups go, "
                f"{made.bytes / 1e6:,.1f} MB. Read and edit it; nothing is done before "
                "`lorafind apply`."
            )
            session.sink.hint(f"lorafind apply {shlex.quote(str(plan))} --to-trash")
    return None


def _agreed(session: Session, left: list[Outlook], yes: bool) -> bool:
    """Say how long the full comparison takes; whether to begin it."""
    seconds = sum(series.seconds for series in left)
    count = sum(series.left for series in left)
    if seconds >= 1:
        session.sink.note(
            f"Comparing {count:,d} LoRAs with all of {sum(s.loras for s in left):,d} takes about "
            f"{duration(seconds)} (an estimate, from a measurement on some of them), and the "
            "proofs of what it finds. It can be interrupted and goes on by `lorafind dupes --deep`."
        )
    if yes or seconds <= ASK_ABOVE or not _terminal():
        return True
    return typer.confirm("Begin?", err=True)


def _terminal() -> bool:
    """True where somebody can answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _members(groups: Iterator[Group]) -> Iterator[dict[str, Any]]:
    """One row per file."""
    for number, group in enumerate(groups, 1):
        for row in group.to_json()["files"]:
            words = [*row["steps"]]
            words += [
                f"{what}: {a} → {b}"
                for what, (a, b) in row["differs"].items()
                if what not in ("modules", "rank", "effective dtype") or not row["steps"]
            ]
            if row["stays"] and row["grade"] != "keeper":
                words.append(f"stays: {row['stays']}")
            yield {**row, "group": number, "keeper": group.keeper, "text": "; ".join(words)}

"""``lorafind index``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.index.build import Summary

COLUMNS = (
    Column("path", "File", nearby),
    Column("outcome", "What it is"),
    Column("reason", "Why it is not indexed"),
)


@command
def index(
    session: Session,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders and files; none: every folder that is known.", metavar="PATH"),
    ] = None,
    comfyui: Annotated[
        Path | None,
        typer.Option(
            help="A ComfyUI folder: index the LoRA folders of its extra_model_paths.yaml too.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to do the arithmetic: auto, cpu, cuda or mps.")
    ] = "auto",
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Also read .pt, .bin and .ckpt (never executed)."),
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Forget files that are gone (never offline ones).")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --prune: even where over half of a folder is gone.")
    ] = False,
    forget: Annotated[
        list[Path] | None,
        typer.Option(help="A folder to take out of the index (repeat it).", show_default=False),
    ] = None,
    relations: Annotated[
        bool,
        typer.Option("--relations/--no-relations", help="Prove relations and fit bases now."),
    ] = True,
) -> int | None:
    """Bring the index up to date: new and changed files are read, all others only looked at.

    Safe to interrupt: the next run goes on where this one was. Lists the files that hold no LoRA,
    with the reason; the summary goes to stderr, with --json everything is one object.
    """
    from lorafind.api import Index
    from lorafind.files.comfyui import comfyui_lora_paths

    wanted: list[str | bytes | os.PathLike[str]] = list(paths or [])
    if comfyui is not None:
        found = comfyui_lora_paths(comfyui)
        if not found:
            raise typer.BadParameter(f"{comfyui} names no folder of LoRAs")
        wanted += found
    with Index.open(session.db, write=True) as made, Watch(session.sink) as watch:
        for folder in forget or ():
            if not made.forget(folder):
                raise typer.BadParameter(f"{folder} is no folder of the index")
            session.sink.note(f"{folder} is no longer in the index; its files are untouched.")
        if forget and not wanted and not made.store.roots():
            return None
        summary = made.build(
            wanted,
            device=device,
            allow_pickle=allow_pickle,
            prune=prune,
            force_prune=yes,
            relate=relations,
            progress=watch,
        )
    rows = [
        {"path": os.fsdecode(r.path), "outcome": r.outcome, "reason": r.reason}
        for r in summary.refused
    ]
    if session.sink.mode in (Mode.JSON, Mode.JSONL):
        session.sink.record(COLUMNS, _as_json(summary, rows))
    else:
        session.sink.rows(COLUMNS, rows)
        _tell(session, summary)
    return Code.PARTIAL if any(r["outcome"] in BROKEN for r in rows) else None


#: Outcomes that mean that a file could not be read, not that it is something else.
BROKEN = frozenset({"unreadable", "inaccessible", "invalid", "changing", "vanished", "failed"})


def _as_json(summary: Summary, rows: list[dict[str, str]]) -> dict[str, Any]:
    """The one object of ``index --json``."""
    return {
        "added": summary.added,
        "refreshed": summary.refreshed,
        "unchanged": summary.unchanged,
        "moved": summary.moved,
        "linked": summary.linked,
        "gone": summary.gone,
        "pruned": summary.pruned,
        "refused": rows,
        "passed": summary.passed,
        "offline": {os.fsdecode(k): v for k, v in summary.offline.items()},
        "unreachable": {os.fsdecode(k): v for k, v in summary.unreachable.items()},
        "relations": summary.relations,
        "seconds": round(summary.seconds, 3),
        "bytes": summary.bytes,
    }


def _tell(session: Session, summary: Summary) -> None:
    counts = {
        "added": summary.added,
        "refreshed": summary.refreshed,
        "moved (not read again)": summary.moved,
        "linked": summary.linked,
        "unchanged": summary.unchanged,
        "gone": summary.gone,
        "pruned": summary.pruned,
        "not indexed": len(summary.refused),
        "passed over (part files, trash)": summary.passed,
    }
    said = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n) or "nothing found"
    size = f"{summary.bytes / 1e6:,.0f} MB in " if summary.bytes else ""
    session.sink.note(f"{said}; {size}{summary.seconds:.1f} s.")
    if summary.relations:
        session.sink.note(f"{summary.relations:,} new relations: `lorafind dupes` shows copies.")
    for place, why in {**summary.offline, **summary.unreachable}.items():
        session.sink.warn(f"{os.fsdecode(place)}: {why}; what the index knows of it is kept.")
    for root, (gone, every) in summary.held.items():
        session.sink.warn(
            f"{gone} of {every} files of {os.fsdecode(root)} are gone: --prune leaves them in the "
            "index unless --yes says that this is right."
        )

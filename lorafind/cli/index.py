"""``lorafind index``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.index.build import Summary
    from lorafind.index.shard import Shard

BEYOND = "Beyond one machine"


class Engine(StrEnum):
    """What reads files and computes."""

    LOCAL = "local"
    RAY = "ray"


COLUMNS = (
    Column("path", "File", nearby),
    Column("outcome", "What it is"),
    Column("reason", "Why it is not indexed"),
)


@command
def index(
    session: Session,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, files and URLs (s3://bucket/loras); none: every one that is known.",
            metavar="PATH",
        ),
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
        list[str] | None,
        typer.Option(
            help="A folder or URL to take out of the index (repeat it).", show_default=False
        ),
    ] = None,
    relations: Annotated[
        bool,
        typer.Option("--relations/--no-relations", help="Prove relations and fit bases now."),
    ] = True,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Index the i-th of n parts only, each in an index of its own, for `lorafind "
            "merge`; relations are left to it.",
            metavar="I/N",
            show_default=False,
            rich_help_panel=BEYOND,
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="What reads the files.", rich_help_panel=BEYOND)
    ] = Engine.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster to join with --engine ray; none: that of RAY_ADDRESS, else one "
            "on this machine for the time of the run.",
            metavar="ADDRESS",
            show_default=False,
            rich_help_panel=BEYOND,
        ),
    ] = None,
) -> int | None:
    """Bring the index up to date: new and changed files are read, all others only looked at.

    Safe to interrupt: the next run goes on where this one was. Lists the files that hold no LoRA,
    with the reason; the summary goes to stderr, with --json everything is one object.
    """
    from lorafind.api import Index
    from lorafind.files.comfyui import comfyui_lora_paths

    part = _shard(shard)
    if engine is Engine.LOCAL and ray_address is not None:
        raise typer.BadParameter("--ray-address needs --engine ray")
    if engine is Engine.RAY and device not in ("auto", "cpu"):
        raise typer.BadParameter(f"--engine ray computes on CPUs: leave out --device {device}")
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
            engine=engine.value,
            ray_address=ray_address,
            shard=part,
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
        if part is not None:
            session.sink.note(
                f"This is shard {part}, without relations and bases: `lorafind merge` brings all "
                "shards together and finds them."
            )
    return Code.PARTIAL if any(r["outcome"] in BROKEN for r in rows) else None


def _shard(text: str | None) -> Shard | None:
    from lorafind.index.shard import Shard

    if text is None:
        return None
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


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
        "elsewhere": summary.elsewhere,
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
        "left to other shards": summary.elsewhere,
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

"""Pictures as targets of ``similar``: a LoRA is trained on them first, where none is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from lorafind.cli import errors
from lorafind.cli.output import Sink
from lorafind.cli.training import TrainWatch, needed, tell
from lorafind.cli.watch import duration
from lorafind.files.sniff import PICKLED

#: Endings that are never pictures, so that no look at the others is needed.
_LORAS = PICKLED | {".safetensors"}


@dataclass(frozen=True)
class Wish:
    """How a query LoRA is to be trained. settings: those that are not the paper's, by name; yes:
    without asking."""

    settings: Mapping[str, Any]
    caption: str
    device: str
    offline: bool
    yes: bool


def sorted_out(targets: Sequence[str]) -> Iterator[str | list[Path]]:
    """Targets that are no pictures, and pictures: those of a folder, or all single ones."""
    single: list[Path] = []
    for target in targets:
        path = Path(target).expanduser()
        if not _pictures(path):
            yield target
        elif path.is_dir():
            yield [path]
        else:
            single.append(path)
    if single:
        yield single


def trained(sink: Sink, sources: Sequence[Path], wish: Wish) -> Path | None:
    """The LoRA of some pictures, from the cache or trained now; None where that was refused.

    Raises TrainProblem; typer.BadParameter for a wrong option, and where nobody can be asked.
    """
    needed()
    from lorafind.signatures.device import choose
    from lorafind.train.captions import HOW, gather
    from lorafind.train.loop import Stopped
    from lorafind.train.model import load_base
    from lorafind.train.plan import make_plan
    from lorafind.train.problem import TrainProblem
    from lorafind.train.query import query_file, train_query
    from lorafind.train.seeds import of_pictures
    from lorafind.train.settings import Settings

    if wish.caption not in HOW:
        raise typer.BadParameter(f"--caption is one of {', '.join(HOW)}")
    try:
        place = str(choose(wish.device))
        settings = Settings(**wish.settings)
    except (TrainProblem, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    name = str(sources[0]) if len(sources) == 1 else f"{len(sources)} pictures"
    with TrainWatch(sink) as watch:
        found = gather(sources, wish.caption, resolution=settings.resolution, watch=watch)
        for sentence in found.warnings:
            sink.warn(sentence)
        settings = replace(settings, seed=of_pictures(found.pictures))
        path = query_file(found.pictures, settings)
        if path.is_file():
            sink.note(f"The LoRA of {name} is in the cache: {path}")
            return path
        base = load_base(settings.model, settings.precision, place, wish.offline)
        # A model of the Hub may have come just now.
        path = query_file(found.pictures, settings)
        plan = make_plan(base, found.pictures, settings)
    tell(sink, plan)
    if not wish.yes:
        took = duration(plan.seconds + plan.class_seconds)
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise typer.BadParameter(
                f"to search with {name} a LoRA has to be trained, which takes about {took}: agree "
                "to it with --yes"
            )
        if not typer.confirm(f"Train a LoRA of {name}, in about {took}?", err=True):
            return None
    try:
        with TrainWatch(sink) as watch:
            train_query(base, found.pictures, settings, path, watch, title=Path(name).name)
    except Stopped as error:
        errors.say(str(error))
        raise
    return path


def _pictures(path: Path) -> bool:
    if path.suffix.lower() in _LORAS or not os.path.exists(path):
        return False
    from lorafind.train.query import holds_pictures

    return holds_pictures(path)

"""``lorafind train``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli import errors
from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby
from lorafind.cli.training import Asked, TrainWatch, planned, tell, trains

if TYPE_CHECKING:
    from lorafind.cli.output import Sink
    from lorafind.train.captions import Gathered

PLAN = (
    Column("pictures", "Pictures", ",d", "right"),
    Column("captions", "Captions", ",d", "right"),
    Column("loras", "LoRAs", ",d", "right"),
    Column("steps", "Steps", ",d", "right"),
    Column("parameters", "Parameters", ",d", "right"),
    Column("memory", "Bytes of memory", ",d", "right"),
    Column("seconds", "Seconds", ".0f", "right", digits=1),
    Column("class_images", "Class images", ",d", "right"),
    Column("class_seconds", "Seconds for them", ".0f", "right", digits=1),
)
#: Neighbours that are printed.
COUNT = 3


def _neighbours(found: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['score']:.3f} {nearby(one['path'])}" for one in found)


COLUMNS = (
    Column("path", "File", nearby),
    Column("word", "Trigger word"),
    Column("pictures", "Pictures", ",d"),
    Column("steps", "Steps", ",d"),
    Column("seed", "Seed", "d"),
    Column("loss_first", "Loss, first tenth", ".4f"),
    Column("loss_last", "Loss, last tenth", ".4f"),
    Column("nearest", "Nearest", _neighbours),
)
_WAY = "On the way"


def _way(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_WAY, show_default=False)


@command
@trains
def train(
    session: Session,
    asked: Asked,
    images: Annotated[
        list[Path],
        typer.Argument(help="Folders of pictures, or pictures.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was interrupted.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and stop before training.")
    ] = False,
    title: Annotated[
        str, typer.Option(help="A name for people, inside the file.", show_default=False)
    ] = "",
    indexed: Annotated[
        bool,
        typer.Option("--index/--no-index", help="Add the file to the index, if there is one."),
    ] = True,
    write_captions: Annotated[
        bool, typer.Option("--write-captions", help="Write BLIP's captions beside the pictures.")
    ] = False,
    save_every: Annotated[
        int | None, _way(help="Save the LoRA after so many steps, and again.")
    ] = None,
    save_from: Annotated[int, _way(help="The first step to save at.")] = 0,
    keep_last: Annotated[int | None, _way(help="Keep only so many of these.")] = None,
    sample: Annotated[
        list[str] | None, _way("--sample", help="A prompt to draw a picture of (repeat it).")
    ] = None,
    sample_every: Annotated[
        int | None, _way(help="Draw after so many steps. Default: at the end.")
    ] = None,
) -> int | None:
    """Train a LoRA of Stable Diffusion 1.5 on pictures; by default as in the paper.

    All linear layers of self-attention, cross-attention and feed-forward of the U-Net, rank 16,
    alpha 8, 1760 steps of Adam at 5e-4, at 512 × 512, with prior preservation; the text encoder
    stays as it is. A plan comes first. Ctrl-C keeps what was trained; --resume goes on. The file is
    then added to the index, if there is one, and its nearest neighbours are printed.
    """
    from lorafind.train.cache import prepare
    from lorafind.train.captions import write_beside
    from lorafind.train.loop import Stopped
    from lorafind.train.loop import train as run
    from lorafind.train.plan import make_plan
    from lorafind.train.problem import TrainProblem
    from lorafind.train.seeds import of_pictures

    if output is None and not dry_run:
        raise typer.BadParameter("name the file to write: -o out.safetensors")
    try:
        settings = replace(
            asked.settings,
            save_every=save_every,
            save_from=save_from,
            keep_last=keep_last,
            sample_prompts=tuple(sample or ()),
            sample_every=sample_every,
        )
    except TrainProblem as error:
        raise typer.BadParameter(str(error)) from error
    sink = session.sink
    if output is not None and not dry_run:
        _free(output, force, resume)
    try:
        with ExitStack() as after, TrainWatch(sink) as watch:
            found = asked.gather(images, watch)
            _warn(sink, found)
            if not asked.seeded:
                settings = replace(settings, seed=of_pictures(found.pictures))
            base = asked.base()
            plan = make_plan(base, found.pictures, settings)
            tell(sink, plan)
            if dry_run or output is None:
                # The table comes when the progress has left the terminal.
                after.callback(sink.record, PLAN, planned(plan))
                return None
            if write_captions:
                written = write_beside(found.pictures)
                sink.note(f"{len(written):,} captions written beside their pictures.")
            prepared = prepare(base, found.pictures, settings, watch)
            for sentence in prepared.warnings:
                sink.warn(sentence)
            if not settings.sample_prompts:
                base.drop_encoders()
            done = run(
                base,
                prepared,
                settings,
                output,
                watch,
                asked.output(force),
                resume=resume,
                title=title,
            )
            nearest = _index(session, output, watch) if indexed else []
    except Stopped as error:
        errors.say(str(error))
        return Code.INTERRUPTED
    tenth = max(1, len(done.losses) // 10)
    row = {
        "path": str(output.absolute()),
        "word": prepared.token,
        "pictures": len(found.pictures),
        "steps": settings.steps,
        "seed": settings.seed,
        "loss_first": sum(done.losses[:tenth]) / tenth,
        "loss_last": sum(done.losses[-tenth:]) / tenth,
        "nearest": nearest,
    }
    sink.record(COLUMNS, row)
    return Code.PARTIAL if found.skipped else None


def _free(output: Path, force: bool, resume: bool) -> None:
    """Before anything is read: may the file be written? The training looks again."""
    from lorafind.train import checkpoint
    from lorafind.train.problem import TrainProblem

    if not output.absolute().parent.is_dir():
        raise TrainProblem(f"There is no folder {output.parent} to write {output.name} to.")
    kept = checkpoint.path(output)
    begun = kept.is_file()
    if resume and not begun:
        raise TrainProblem(f"There is nothing to go on with: no training is kept in {kept}.")
    if begun and not (resume or force):
        raise TrainProblem(
            f"A training that was interrupted is kept in {kept}: go on with it (--resume), or "
            "begin again (--force)."
        )
    if output.exists() and not force:
        raise TrainProblem(f"{output} exists: name another file (-o), or write over it (--force).")


def _warn(sink: Sink, found: Gathered) -> None:
    for sentence in found.warnings:
        sink.warn(sentence)
    for path, why in found.skipped:
        sink.warn(f"{path} is left out: {why}.")


def _index(session: Session, path: Path, watch: TrainWatch) -> list[dict[str, Any]]:
    """Add a file to the index, if there is one; its nearest neighbours."""
    from lorafind.api import Index
    from lorafind.files.outcome import NotAnAdapter
    from lorafind.index.opening import location
    from lorafind.index.problem import IndexProblem
    from lorafind.search.similar import Wishes

    if not location(session.db).is_file():
        session.sink.note("There is no index: the file was not added to one.")
        return []
    try:
        with Index.open(session.db, write=True) as index:
            index.build([path.absolute()], progress=watch)
            found = [n.to_json() for n in index.similar(str(path), Wishes(COUNT))]
    except (IndexProblem, NotAnAdapter) as error:
        session.sink.warn(f"{path} was written, but cannot be searched with: {error}")
        return []
    if not found:
        session.sink.note("It is the first of its kind in the index: there is nothing to compare.")
    return found

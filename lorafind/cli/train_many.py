"""``lorafind train-many``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli import errors
from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column
from lorafind.cli.training import Asked, TrainWatch, tell, trains

if TYPE_CHECKING:
    from lorafind.train.dataset import Share
    from lorafind.train.many import Outcome

COLUMNS = (
    Column("artist", "Artist"),
    Column("genre", "Genre"),
    Column("pictures", "Pictures", ",d", "right"),
    Column("training", "For training", ",d", "right"),
    Column("validation", "Validation", ",d", "right"),
    Column("test", "Test", ",d", "right"),
    Column("loras", "LoRAs", ",d", "right"),
    Column("done", "Done", ",d", "right"),
    Column("overlap", "Shared", ".1f", "right", digits=2),
    Column("overlap_most", "At most", "d", "right"),
    Column("reason", "What is wrong"),
)
_SET = "Data set"


def _set(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_SET)


@command
@trains
def train_many(
    session: Session,
    asked: Asked,
    root: Annotated[
        Path,
        typer.Argument(
            help="A folder with a folder of pictures per artist, or per genre and artist.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The folder for the LoRAs.", show_default=False),
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="Train anew what was made of other pictures or settings."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and stop before training.")
    ] = False,
    parallel: Annotated[
        int,
        typer.Option(
            min=1, help="LoRAs that are trained in one pass; more need more memory, less time."
        ),
    ] = 1,
    loras: Annotated[int, _set(help="Training LoRAs per artist.")] = 30,
    size: Annotated[int, _set(help="Pictures of each.")] = 10,
    calibration: Annotated[
        int, _set(help="Calibration LoRAs per artist, of --few of the training pictures.")
    ] = 3,
    queries: Annotated[
        int, _set(help="Validation LoRAs per artist, and as many for test, of --few held back.")
    ] = 5,
    few: Annotated[int, _set(help="Pictures of each of these.")] = 3,
    held: Annotated[
        int, _set("--held-back", help="Pictures held back for validation, and as many for test.")
    ] = 15,
    same: Annotated[
        bool,
        _set("--same", help="As many calibration LoRAs and queries of --size pictures on top."),
    ] = False,
    names: Annotated[
        str,
        _set(
            help="Where captions name their artist: refuse the artist, drop these pictures, or "
            "allow it."
        ),
    ] = "refuse",
    one_seed: Annotated[
        bool,
        _set(
            "--one-seed",
            help="One seed, and so one start, for all: the paper's feature (theta) needs it. "
            "Default: each its own, as files of strangers have.",
        ),
    ] = False,
) -> int | None:
    """Train the LoRAs of a data set as in the paper, for rebuild-basis and eval.

    Per artist, 15 + 15 pictures are held back for validation and test; 30 LoRAs learn from random
    ten of the others, 3 for calibration from random three of them, 5 + 5 queries from random three
    that were held back. Genres come from the folders, or from a genres.csv (artist, genre) in ROOT.
    What is done is not done again: after an interruption the same command goes on. Prints a line
    per artist, with how many pictures two of its training LoRAs share (on average, at most).
    """
    from lorafind.train.captions import gather
    from lorafind.train.dataset import plan
    from lorafind.train.loop import Stopped
    from lorafind.train.many import Outcome, waiting
    from lorafind.train.many import train_many as run
    from lorafind.train.plan import make_plan
    from lorafind.train.problem import TrainProblem
    from lorafind.train.subsets import Wanted

    sink = session.sink
    try:
        wanted = Wanted(loras, size, calibration, queries, few, held, same)
    except TrainProblem as error:
        raise typer.BadParameter(str(error)) from error
    if output.resolve().is_relative_to(root.resolve()):
        raise typer.BadParameter("the LoRAs cannot lie among the pictures: name another folder")
    try:
        with ExitStack() as after, TrainWatch(sink) as watch:
            if given := asked.settings.class_images:
                # Or every LoRA would find out by itself that something is wrong with them.
                gather([given], "none", resolution=asked.settings.resolution, watch=watch)
            shares = plan(
                root,
                wanted,
                asked.settings,
                lambda folder: asked.gather([folder]),
                names=names,
                one_seed=one_seed,
                watch=watch,
            )
            for share in shares:
                for sentence in (*share.warnings, *([share.reason] if share.reason else ())):
                    sink.warn(f"{share.artist.name}: {sentence}")
            if not any(share.loras for share in shares):
                raise TrainProblem(f"Of no artist of {root} can LoRAs be trained.")
            base = asked.base()
            writing = asked.output(force)
            todo, done = waiting(base.sha256, shares, output, writing)
            if done:
                sink.note(f"{len(done):,} LoRAs are done already.")
            if todo:
                pictures = {p.digest: p for lora in todo for p in lora.pictures}
                tell(
                    sink,
                    make_plan(
                        base,
                        list(pictures.values()),
                        asked.settings,
                        loras=len(todo),
                        parallel=parallel,
                        encoders=True,
                    ),
                )
            if dry_run:
                before = Outcome(
                    [lora.file for lora in done],
                    failed={share.artist.name: share.reason for share in shares if share.reason},
                )
                # The table comes when the progress has left the terminal.
                after.callback(sink.rows, COLUMNS, _rows(shares, before))
                return Code.PARTIAL if before.failed else None
            output.mkdir(parents=True, exist_ok=True)
            outcome = run(base, shares, output, watch, writing, parallel=parallel)
    except Stopped as error:
        errors.say(str(error))
        return Code.INTERRUPTED
    sink.note(f"{len(outcome.trained):,} LoRAs trained; {output} holds {len(outcome.done):,}.")
    if outcome.strangers:
        sink.note(
            f"{len(outcome.strangers):,} LoRAs of an earlier run lie there too, which are not of "
            f"this data set and not in labels.csv, such as {outcome.strangers[0]}."
        )
    for file, why in outcome.failed.items():
        if file.endswith(".safetensors"):
            sink.warn(f"{file}: {why}")
    sink.rows(COLUMNS, _rows(shares, outcome))
    return Code.PARTIAL if outcome.failed else None


def _rows(shares: Sequence[Share], outcome: Outcome) -> Iterator[dict[str, Any]]:
    done = set(outcome.done)
    for share in shares:
        parts = share.division
        mean, most = parts.overlap() if parts else (None, None)
        failed = [outcome.failed[o.file] for o in share.loras if o.file in outcome.failed]
        yield {
            "artist": share.artist.name,
            "genre": share.artist.genre,
            "folder": str(share.artist.folder),
            "pictures": share.pictures,
            "training": len(parts.train) if parts else 0,
            "validation": len(parts.validation) if parts else 0,
            "test": len(parts.test) if parts else 0,
            "loras": len(share.loras),
            "done": sum(lora.file in done for lora in share.loras),
            "overlap": mean,
            "overlap_most": most,
            "reason": share.reason or " ".join(dict.fromkeys(failed)),
            "warnings": share.warnings,
        }

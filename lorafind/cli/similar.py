"""``lorafind similar``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, Targets, command, targets
from lorafind.cli.output import Column, nearby
from lorafind.cli.query import Wish, sorted_out, trained

COLUMNS = (
    Column("path", "File", nearby),
    Column("score", "Score", ".3f", "right"),
    Column("z", "z", ".1f", "right"),
    Column("chance", "Chance", ".2g", "right", digits=9),
    Column("relation", "Relation"),
    Column("variants", "Variants", "d", "right"),
)


def _train(*names: str, help: str) -> Any:
    return typer.Option(
        *names, help=help, rich_help_panel="Targets that are pictures", show_default=False
    )


@command
def similar(
    session: Session,
    names: Targets,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="Neighbours per target.")] = 10,
    by: Annotated[
        str,
        typer.Option(
            help="Groups to compare by, with commas: self, cross, attn, ff, conv, other, unet, "
            "text, all. Default: all of the U-Net or transformer."
        ),
    ] = "",
    min_score: Annotated[
        float | None, typer.Option(help="Leave out scores below this.", show_default=False)
    ] = None,
    min_z: Annotated[
        float | None,
        typer.Option(help="Leave out what is nearer to strangers than this.", show_default=False),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="One row for every LoRA, not one per family.")
    ] = False,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Only LoRAs that name the same base model.")
    ] = False,
    basis: Annotated[
        str,
        typer.Option(
            help="Compare in this basis: own (the collection's), plain (none), a basis of the "
            "index, a file, or hf:owner/name@revision. Default: the one in use.",
            show_default=False,
        ),
    ] = "",
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Take bases and models of the Hub from the cache only."),
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin and .ckpt targets.")
    ] = False,
    yes: Annotated[bool, _train("--yes", help="Train without asking.")] = False,
    model: Annotated[
        str, _train(help="The base model, as for train. Default: Stable Diffusion 1.5.")
    ] = "",
    caption: Annotated[str, _train(help="files (the default), blip or none, as for train.")] = "",
    steps: Annotated[int | None, _train(help="Default: 1760.")] = None,
    resolution: Annotated[int | None, _train(help="Pixels. Default: 512.")] = None,
    prior_weight: Annotated[
        float | None, _train(help="0 does without class images. Default: 1.")
    ] = None,
    device: Annotated[str, _train(help="auto (the default), cpu, cuda or mps.")] = "auto",
) -> int | None:
    """The LoRAs that are nearest in training effect, style and subject together.

    A target may also be a folder of pictures, or several pictures: a LoRA is trained on them first,
    as in the paper, and kept, so that the next time takes no training.

    Score: cosine of style in the basis in use (by default the collection's own), an estimate from
    the stored signatures; in a calibrated basis 1 less the distance over a typical one.
    z: distance from unrelated LoRAs of the same kind, in their standard deviations. Chance: how
    many unrelated LoRAs of this collection would score as high. Relation: proved ones in words;
    ~likely where the sketches suggest one. Variants: kin that are not shown (--all shows them).
    """
    from lorafind.api import Index
    from lorafind.bases.problem import BasisProblem
    from lorafind.files.outcome import NotAnAdapter
    from lorafind.index.problem import IndexProblem
    from lorafind.search.similar import Wishes
    from lorafind.train.problem import TrainProblem

    words = [w for w in by.split(",") if w]
    wishes = Wishes(count, words, min_score, min_z, every, same_base)
    try:
        wishes.groups(0)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    asked_for = {
        "model": model,
        "steps": steps,
        "resolution": resolution,
        "prior_weight": prior_weight,
    }
    wish = Wish(
        {name: value for name, value in asked_for.items() if value not in ("", None)},
        caption or "files",
        device,
        offline,
        yes,
    )
    code = None
    with Index.open(session.db) as index:
        if basis:
            wishes = replace(wishes, basis=index.basis(basis, offline))

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal code
            for target in sorted_out(targets(names)):
                none = True
                try:
                    if isinstance(target, str):
                        asked = index.ask(target, allow_pickle)
                    else:
                        lora = trained(session.sink, target, wish)
                        if lora is None:
                            continue
                        asked = replace(index.ask(str(lora)), path=os.path.abspath(target[0]))
                    for neighbour in index.similar(asked, wishes):
                        none = False
                        yield neighbour.to_json()
                except (NotAnAdapter, IndexProblem, BasisProblem, TrainProblem) as error:
                    session.sink.warn(str(error))
                    code = Code.PARTIAL
                    continue
                if none:
                    session.sink.note(
                        f"Nothing in the index can be compared with {asked.path} "
                        f"({asked.query.architecture})."
                    )

        session.sink.rows(COLUMNS, rows())
    return code

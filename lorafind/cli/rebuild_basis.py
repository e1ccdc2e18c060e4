"""``lorafind rebuild-basis``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column
from lorafind.cli.watch import Watch

COLUMNS = (
    Column("split", "Split"),
    Column("queries", "Queries", "d", "right"),
    Column("plain", "No basis", ".1f", "right", digits=2),
    Column("cosine", "Cosine", ".1f", "right", digits=2),
    Column("cosine_calibrated", "calibrated", ".1f", "right", digits=2),
    Column("euclidean", "Distance", ".1f", "right", digits=2),
    Column("euclidean_calibrated", "calibrated", ".1f", "right", digits=2),
)


@command
def rebuild_basis(
    session: Session,
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A folder of LoRAs: one sub-folder per artist, or with a labels.csv.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path(
        "basis.safetensors"
    ),
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
    from_index: Annotated[
        bool,
        typer.Option(
            "--from-index", help="Build on the index's stored signatures; no LoRA is read."
        ),
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file: file, artist and, where known, genre, split, images.",
            show_default=False,
        ),
    ] = None,
    by_folder: Annotated[
        bool,
        typer.Option("--by-folder", help="With --from-index: the folder of a file is its artist."),
    ] = False,
    feature: Annotated[
        str,
        typer.Option(
            help="style (any rank), delta (ΔW, any rank), theta (the paper's: one rank, one "
            "layout) or canonical (factors in canonical form)."
        ),
    ] = "style",
    groups: Annotated[
        str,
        typer.Option(
            help="Only these, with commas: self, cross, attn, ff, conv, other. Default: all.",
            show_default=False,
        ),
    ] = "",
    architecture: Annotated[
        str,
        typer.Option(
            "--arch",
            help="Only LoRAs for this model. Default: the most frequent.",
            show_default=False,
        ),
    ] = "",
    components: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many. Default: the best on validation; without labels by the eigenvalues.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Calibrate where there are labels.")
    ] = True,
    scale_only: Annotated[
        bool, typer.Option("--scale-only", help="Calibrate with scales and no offsets.")
    ] = False,
    setup: Annotated[
        str,
        typer.Option(
            help="Calibrate on the LoRAs trained on as many pictures as the training ones (same) "
            "or on the others (diff). Default: on all.",
            show_default=False,
        ),
    ] = "",
    metric: Annotated[
        str,
        typer.Option(
            help="cosine, or euclidean as in the paper. Default: the better one on validation.",
            show_default=False,
        ),
    ] = "",
    name: Annotated[
        str,
        typer.Option(
            help="What the basis is called. Default: the folder's name.", show_default=False
        ),
    ] = "",
    base_model: Annotated[
        str,
        typer.Option(help="Hub id of the base model, for the card.", show_default=False),
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="A sentence on the LoRAs and their pictures.", show_default=False),
    ] = "",
    licence: Annotated[
        str, typer.Option("--license", help="Licence of the basis.", show_default=False)
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the splits, where none are named.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin and .ckpt files.")
    ] = False,
) -> int | None:
    """Principal components of LoRAs as a basis to compare in, calibrated and judged.

    Prints how well queries find the LoRAs of their artist, as mean average precision in percent:
    with no basis, and by cosine and by distance on the components, with queries as they are and
    calibrated.
    Splits come from the labels; where none are named, the LoRAs of every artist are divided 21 : 3
    : 3 : 3 into training, calibration, validation and test. An interrupted run goes on where it
    was.
    """
    from lorafind.bases.basis import OWN
    from lorafind.bases.gather import Wanted, from_folder, gather_index
    from lorafind.bases.judge import Settings
    from lorafind.bases.problem import BasisProblem
    from lorafind.bases.rebuild import rebuild
    from lorafind.features.opening import parse_groups
    from lorafind.search.similar import PLAIN
    from lorafind.signatures.device import choose

    if (folder is None) != from_index:
        raise typer.BadParameter("name a folder, or --from-index")
    for option, value, known in (
        ("--feature", feature, ("style", "delta", "theta", "canonical")),
        ("--setup", setup, ("", "same", "diff")),
        ("--metric", metric, ("", "euclidean", "cosine")),
    ):
        if value not in known:
            raise typer.BadParameter(f"{option} is one of {', '.join(filter(None, known))}")
    if from_index and feature != "style":
        raise typer.BadParameter("the index keeps signatures of style only: name a folder")
    words = tuple(word for word in groups.split(",") if word)
    try:
        place = str(choose(device))
        if "text" in parse_groups(words):
            raise ValueError("a basis is over the U-Net or transformer: leave out text")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if name in (OWN, PLAIN):
        raise typer.BadParameter(f"--name {name} stands for another basis already")
    if not output.absolute().parent.is_dir():
        raise BasisProblem(f"There is no folder {output.parent} to write {output.name} to.")
    if output.exists() and not force:
        raise BasisProblem(f"{output} exists: name another file (-o), or write over it (--force).")
    wanted = Wanted(feature, words, architecture, seed)
    code = None
    with Watch(session.sink) as watch:
        if folder is None:
            from lorafind.api import Index

            with Index.open(session.db) as index:
                material = gather_index(index.store, wanted, labels, by_folder, watch)
        else:
            material, refused = from_folder(folder, wanted, labels, place, allow_pickle, watch)
            for _, reason in refused:
                session.sink.warn(reason)
                code = Code.PARTIAL
        settings = Settings(
            name or _name(folder, material.architecture),
            components,
            calibrate,
            scale_only,
            metric,
            setup,
            licence,
            data,
            base_model,
            place,
        )
        built = rebuild(material, output, settings, watch)
    facts = built.facts
    session.sink.note(
        f"{output}: {facts['components']} components of {facts['loras']} LoRAs, "
        f"{facts['feature']} over {', '.join(facts['groups'])}, for {facts['architecture']}; "
        f"calibration: {facts['calibration']}."
    )
    for sentence in built.verdict:
        session.sink.note(sentence)
    session.sink.rows(COLUMNS, facts["evaluation"])
    return code


def _name(folder: Path | None, architecture: str) -> str:
    found = folder.resolve().name if folder else architecture
    # These two stand for something else where a basis is named.
    return f"{found} basis" if found in ("own", "plain", "") else found

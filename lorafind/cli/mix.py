"""``lorafind mix``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.mix.merge import Merged
    from lorafind.mix.mix import Mix

COLUMNS = (
    Column("path", "File", nearby),
    Column("weight", "Weight", ".4f", "right", 4),
    Column("score", "Alone", ".3f", "right"),
    Column("mix_score", "Mix", ".3f", "right"),
)
#: A difference of scores that is worth a sentence.
TOLD = 0.005


@command
def mix(
    session: Session,
    target: Annotated[
        str, typer.Argument(help="A file, or a name in the index.", show_default=False)
    ],
    terms: Annotated[int, typer.Option(min=1, max=16, help="At most so many LoRAs.")] = 8,
    signed: Annotated[
        bool, typer.Option("--signed", help="Weights may be negative as well.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Write the sum as one LoRA file.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With -o: the best approximation of this rank; without it the ranks add up and "
            "nothing is lost.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="With -o: F32, F16 or BF16.")] = "F32",
    force: Annotated[
        bool, typer.Option("--force", help="With -o: in the place of a file that is there.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="The target may be a .pt, .bin or .ckpt.")
    ] = False,
) -> int | None:
    """The combination of LoRAs of the index that comes nearest to a target in style.

    Alone is the score of a LoRA to the target by itself, Mix that of the sum of all at these
    weights, measured on the sum: style gives every layer one vote, so that it does not simply add
    up. The target and its copies are left out. Weights are such that the mix is about as strong as
    what it is made of; use it stronger or weaker as a whole. Nearer in score means a more similar
    effect of training, as far as the signature shows it; no picture was looked at.
    """
    from lorafind.index.store import Store
    from lorafind.mix.merge import DTYPES, merge, refuse_taken
    from lorafind.mix.mix import Wishes, score_of
    from lorafind.mix.mix import mix as find_mix
    from lorafind.search.query import ask

    if dtype.upper() not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is no dtype; choose from {', '.join(DTYPES)}")
    if out is None and (rank is not None or force):
        raise typer.BadParameter("--rank and --force are for a file that -o names")
    place = out.expanduser().absolute() if out is not None else None
    if place is not None:
        refuse_taken(place, force)
    merged = of_file = None
    with Store.open(session.db) as store, Watch(session.sink) as watch:
        asked = ask(store, target, allow_pickle)
        found = find_mix(store, asked, Wishes(terms, signed), watch)
        if place is not None:
            merged = merge(
                found.terms,
                place,
                rank,
                dtype.upper(),
                force,
                [found.target, *(one.path for one in found.ingredients)],
                {"lorafind_basis": found.basis},
                watch,
            )
            of_file = score_of(store, asked, merged.path)
    _tell(session, found, merged, of_file)
    return None


def _tell(session: Session, found: Mix, merged: Merged | None, of_file: float | None) -> None:
    sink = session.sink
    if sink.mode in (Mode.JSON, Mode.JSONL):
        file = {**asdict(merged), "score": of_file} if merged else None
        whole = {**found.to_json(), "file": file}
        sink.record(COLUMNS, whole)
        return
    sink.rows(COLUMNS, _rows(found))
    for skipped in found.skipped[:3]:
        sink.note(f"Left out: {skipped}")
    sink.note(f"A1111: {found.a1111}")
    for name in found.unsaid:
        sink.note(
            f"A1111 cannot read the name {name}, as it has one of : < > in it: rename the file."
        )
    sink.note(
        "ComfyUI: "
        + ", ".join(f"{row['lora_name']} {row['strength_model']:g}" for row in found.comfyui)
    )
    sink.note(
        f"The mix has a score of {found.score:.3f} to {nearby(found.target)} (the linear model "
        f"says {found.model:.3f}), the nearest single LoRA {found.nearest:.3f}."
    )
    if found.apart:
        sink.note(
            "Left out, as they have no layers in common with the target (a text encoder alone, "
            f"for instance): {found.apart}."
        )
    if merged is not None:
        low, high = merged.ranks
        ranks = str(low) if low == high else f"{low}–{high}"
        lost = f"; {merged.lost:.2%} of ‖ΔW‖² left out by the rank" if merged.lost else ""
        sink.note(f"{nearby(merged.path)}: {merged.modules} modules, rank {ranks}{lost}.")
    later = found.fresh if of_file is None else of_file
    if abs(later - found.score) >= TOLD:
        why = (
            "with what the rank left out"
            if merged is not None and merged.lost
            else "as the basis was fitted without it, but with the LoRAs whose noise is in it"
        )
        sink.note(f"Once the file is indexed, in `similar` its score is {later:.3f}, {why}.")


def _rows(found: Mix) -> list[dict[str, Any]]:
    return [
        {
            "path": one.path,
            "weight": one.weight,
            "score": one.score,
            "mix_score": found.score,
        }
        for one in found.ingredients
    ]

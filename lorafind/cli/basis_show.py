"""``lorafind basis show``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, Row, nearby

COLUMNS = (
    Column("name", "Name"),
    Column("id", "Id"),
    Column("architecture", "Architecture"),
    Column("feature", "Feature"),
    Column("groups", "Groups"),
    Column("components", "Components"),
    Column("loras", "LoRAs"),
    Column("artists", "Artists"),
    Column("calibration", "Calibration"),
    Column("metric", "Metric"),
    Column("rank", "Rank"),
    Column("signature_version", "Signature version"),
    Column("licence", "Licence"),
    Column("made", "Made"),
    Column("source", "From"),
    Column("in_use", "In use"),
    Column("path", "File"),
)

Name = Annotated[
    str,
    typer.Argument(
        help="own (the collection's), a basis of the index, a file, a basis of your folder, or "
        "hf:owner/name or hf:owner/name@revision."
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is here already.")]
Token = Annotated[
    str | None,
    typer.Option(
        help="For a private repository. Default: HF_TOKEN, or what `hf auth login` has saved.",
        show_default=False,
    ),
]


@command
def show(
    session: Session,
    name: Name,
    offline: Offline = False,
    token: Token = None,
) -> None:
    """All facts of a basis: from what it was made, how it is compared in, how good it is.

    Of a basis that only the Hub has, its config.json is fetched and not the basis itself; it leaves
    out the explained variance and the scales.
    """
    from lorafind.hub.known import describe

    rows = describe(session.db, name, offline, token)
    if not rows:
        session.sink.note(
            "The collection has no basis of its own yet: it takes 30 LoRAs of a kind."
        )
    if session.sink.mode is Mode.TABLE:
        session.sink.rows(PEOPLE, map(_told, rows), blocks=True)
    else:
        session.sink.rows(COLUMNS, rows)


# ---------------------------------------------------------------------------- for people

PEOPLE = tuple(
    Column(title, title)
    for title in (
        *("Name", "Id", "From", "In use", "Architecture", "Base model", "Feature", "Groups"),
        *("Components", "Explained", "Made from", "Data", "Licence", "Calibration", "Metric"),
        *("Scales", "Rank", "Evaluation", "Signatures", "Made", "File"),
    )
)


def _told(row: Row) -> Row:
    """The fields in words; what is empty is left out."""
    chosen = row.get("components")
    if isinstance(chosen, Mapping):
        chosen = ", ".join(f"{number} for the {space}" for space, number in chosen.items())
    computed = row.get("computed")
    file = str(row["path"] or "")
    made = [(row.get(key), key) for key in ("loras", "families", "artists")]
    return {
        "Name": row.get("name"),
        "Id": row.get("id"),
        "From": None if row["source"] == file else row["source"],
        "In use": row["in_use"],
        "Architecture": row.get("architecture"),
        "Base model": row.get("base_model"),
        "Feature": row.get("feature"),
        "Groups": row.get("groups"),
        "Components": f"{chosen} of {computed} computed" if computed else chosen,
        "Explained": _explained(row),
        "Made from": ", ".join(
            f"{number} {'LoRAs' if key == 'loras' else key}" for number, key in made if number
        ),
        "Data": row.get("data"),
        "Licence": row.get("licence"),
        "Calibration": row.get("calibration"),
        "Metric": row.get("metric"),
        "Scales": _ends(row.get("scales") or ()),
        "Rank": row.get("rank"),
        "Evaluation": "; ".join(map(_figures, row.get("evaluation") or ())),
        "Signatures": f"version {row['signature_version']}",
        "Made": row.get("made"),
        "File": file and nearby(file),
    }


def _explained(row: Row) -> str:
    shares, chosen = row.get("explained_variance"), row.get("components")
    if not shares or not isinstance(chosen, int):
        return ""
    return f"{sum(shares[:chosen]):.1%} of the variance by the {chosen} chosen components"


def _ends(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ", ".join(f"{value:.3f}" for value in values)
    return f"{values[0]:.3f} for the first component, {values[-1]:.3f} for the last"


def _figures(row: Mapping[str, Any]) -> str:
    """A row of the evaluation: all its numbers by name."""
    told = [f"{key} {value:g}" for key, value in row.items() if isinstance(value, int | float)]
    return f"{row.get('split')}: {row.get('metric')} {', '.join(told)}"

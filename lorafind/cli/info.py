"""``lorafind info``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, Targets, command, targets
from lorafind.cli.output import Column, Mode, Row, nearby

COLUMNS = (
    Column("path", "File", nearby),
    Column("outcome", "Is"),
    Column("reason", "Why"),
    Column("architecture", "Architecture"),
    Column("family", "Family"),
    Column("spelling", "Spelling"),
    Column("ranks", "Ranks"),
    Column("alphas", "Alphas"),
    Column("modules", "Modules"),
    Column("norm", "Norm"),
    Column("dtype", "Dtype"),
    Column("effective_dtype", "Effective dtype"),
    Column("sha256", "SHA-256"),
)
KEYS = (
    Column("path", "File", nearby),
    Column("key", "Key"),
    Column("understood", "Understood as"),
    Column("dtype", "Dtype"),
    Column("shape", "Shape", lambda shape: "×".join(map(str, shape)), "right"),
)
MODULES = (
    Column("path", "File", nearby),
    Column("name", "Module"),
    Column("group", "Group"),
    Column("family", "Family"),
    Column("shape", "Shape", lambda shape: "×".join(map(str, shape)), "right"),
    Column("rank", "Rank", "d", "right"),
    Column("alpha", "Alpha", "g", "right"),
    Column("scale", "Scale", "g", "right"),
    Column("norm", "Norm", ".4g", "right"),
    Column("magnitude", "Magnitude", ".4g", "right"),
    Column("parameters", "Parameters"),
)


@command
def info(
    session: Session,
    names: Targets,
    header_only: Annotated[
        bool, typer.Option("--header-only", help="Read only the header: quick, without norms.")
    ] = False,
    keys: Annotated[
        bool, typer.Option("--keys", help="Show how every key of the file was understood.")
    ] = False,
    modules: Annotated[
        bool, typer.Option("--modules", help="Show every module with its rank, alpha and norm.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin, .ckpt and .pth files.")
    ] = False,
) -> int | None:
    """What a file is: architecture, rank, alpha, norms, training facts, hashes.

    Every number comes from the weights. What the header's texts and the sidecars say is shown as
    theirs; recorded hashes that are not those of these bytes are marked as stale.
    """
    from lorafind.index.problem import IndexProblem
    from lorafind.search.info import UNDERSTOOD
    from lorafind.search.info import info as describe
    from lorafind.search.paths import path_of

    sink = session.sink
    if keys and modules and sink.mode not in (Mode.JSON, Mode.JSONL):
        raise typer.BadParameter("only one of --keys and --modules can be used without --json")
    code: int | None = None

    given = targets(names)

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal code
        for name in given:
            try:
                path = path_of(session.db, name)
            except IndexProblem as error:
                session.sink.warn(str(error))
                code = Code.PARTIAL
                continue
            row = describe(
                path,
                header_only=header_only,
                allow_pickle=allow_pickle,
                keys=keys,
                modules=modules,
            )
            if row["outcome"] not in UNDERSTOOD:
                code = Code.PARTIAL
            yield row

    if sink.mode in (Mode.JSON, Mode.JSONL, Mode.PATHS):
        sink.rows((), rows())
    elif keys or modules:
        columns = KEYS if keys else MODULES
        # People who ask for one file need not read its name in every line.
        narrow = sink.mode is Mode.TABLE and len(given) == 1
        sink.rows(columns[1:] if narrow else columns, _split(rows(), keys, sink.warn))
    elif sink.mode is Mode.TABLE:
        sink.rows(PEOPLE, map(_told, rows()), blocks=True)
    else:
        sink.rows(COLUMNS, ({**row, "sha256": row["hashes"].get("sha256")} for row in rows()))
    return code


def _split(rows: Iterator[Row], keys: bool, warn: Callable[[str], None]) -> Iterator[Row]:
    """One row per key, or per module."""
    for row in rows:
        if row["outcome"] != "lora":
            warn(f"{row['path']}: {row['outcome']}: {row['reason']}")
        if keys:
            for key, how in row["keys"].items():
                tensor = row["tensors"][key]
                yield {"path": row["path"], "key": key, "understood": how, **tensor}
        else:
            for module in row["per_module"]:
                yield {"path": row["path"], **module}


# ---------------------------------------------------------------------------- for people


PEOPLE = tuple(
    Column(title, title)
    for title in (
        *("File", "Is", "Name", "Architecture", "Family", "Rank", "Alpha", "Modules", "Groups"),
        *("Norm", "Dtype", "Base model", "Trained", "Session", "Settings", "Trigger words", "Tags"),
        *("Comment", "Merged from", "Configuration", "Sidecars", "Notes of the sidecar", "Preview"),
        *(
            "Embeddings",
            "DoRA",
            "Extras",
            "Not understood",
            "Not read",
            "SHA-256",
            "AutoV1",
            "AutoV2",
            "AutoV3",
        ),
        *("Data", "Legacy", "Recorded", "Notes"),
    )
)


def _told(row: Row) -> Row:
    """The fields in words; what is empty is left out."""
    facts, beside, hashes = row["facts"], row["sidecar"], row["hashes"]
    return {
        "File": row["path"],
        "Is": f"{row['outcome']}: {row['reason']}" if row["reason"] else row["outcome"],
        "Name": row["name"],
        "Architecture": row["architecture"],
        "Family": row["family"] and f"{row['family']}, in {row['spelling']} names",
        "Rank": _counted(row["ranks"]),
        "Alpha": _alpha(row),
        "Modules": _modules(row),
        "Groups": "; ".join(_group(name, part) for name, part in row["groups"].items()),
        "Norm": None if row["norm"] is None else f"{row['norm']:.6g}",
        "Dtype": _dtype(row),
        "Base model": _joined(
            facts["base_model"],
            facts["base_model_name"],
            facts["prediction"],
            beside["base_model"] and f"{beside['base_model']} (sidecar)",
        ),
        "Trained": _trained(facts),
        "Session": _joined(facts["session_id"], facts["seed"] and f"seed {facts['seed']}"),
        "Settings": _joined(
            facts["network_module"],
            facts["dim"] and f"rank {facts['dim']}",
            facts["alpha"] and f"alpha {facts['alpha']}",
        ),
        "Trigger words": ", ".join((*facts["trigger_words"], *beside["trigger_words"])),
        "Tags": ", ".join(f"{tag} ({count})" for tag, count in facts["tags"][:8]),
        "Comment": facts["comment"],
        "Merged from": facts["merged_from"],
        "Configuration": ", ".join(f"{k} {v}" for k, v in row["config"].items()),
        "Sidecars": ", ".join(beside["files"]),
        "Notes of the sidecar": beside["notes"],
        "Preview": beside["preview"],
        "Embeddings": ", ".join(
            f"{e['name']} ({e['vectors']} × {e['width']})" for e in row["embeddings"]
        ),
        "DoRA": _magnitudes(row["magnitudes"]),
        "Extras": _some(list(row["extras"])),
        "Not understood": _some(row["unknown_keys"]),
        "Not read": _some([k for k in row["unread_keys"] if k not in set(row["unknown_keys"])]),
        "SHA-256": hashes.get("sha256"),
        "AutoV1": _hash(hashes.get("autov1")),
        "AutoV2": hashes.get("autov2"),
        "AutoV3": hashes.get("autov3"),
        "Data": hashes.get("sshs_model_hash"),
        "Legacy": _hash(hashes.get("sshs_legacy_hash")),
        "Recorded": ", ".join(
            f"{c['name']} {_hash(c['value'])} ({_STALE[c['stale']]})" for c in row["recorded"]
        ),
        "Notes": "; ".join(row["notes"]),
    }


#: SHA-256 of nothing, as old short hashes of small files are.
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_STALE = {True: "stale", False: "right", None: "cannot be checked"}


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _counted(counts: Mapping[str, int]) -> str:
    """``16``, or ``4 (in 12 modules), 8 (in 180)``."""
    if len(counts) < 2:
        return "".join(counts)
    first, *rest = counts.items()
    return ", ".join([f"{first[0]} (in {first[1]} modules)", *(f"{v} (in {n})" for v, n in rest)])


def _modules(row: Row) -> str | None:
    if row["modules"] is None:
        return None
    zero, parameters = row["zero_modules"], row["parameters"]
    return _joined(
        str(row["modules"]),
        f"{zero} of them zero" if zero else None,
        f"{parameters} of them parameters" if parameters else None,
    )


def _magnitudes(rows: list[Mapping[str, Any]]) -> str:
    """How many magnitudes there are, and how long."""
    norms = [row["norm"] for row in rows if row["norm"] is not None]
    text = f"magnitudes of {len(rows)} modules" if rows else ""
    return f"{text}, norms {min(norms):.4g} to {max(norms):.4g}" if norms else text


def _alpha(row: Row) -> str:
    scale = row["scale"]
    return _counted(row["alphas"]) + (f" (scale {scale:g})" if scale not in (None, 1.0) else "")


def _group(name: str, part: Mapping[str, Any]) -> str:
    text = f"{name}: {part['modules']}"
    if part["norm"] is None:
        return text
    share = f", {part['share']:.1%}" if part["share"] is not None else ""
    return f"{text}, norm {part['norm']:.4g}{share}"


def _hash(value: str | None) -> str | None:
    """A hash; what is no more than the hash of nothing is marked as such."""
    return value and (f"{value} (of no bytes, says nothing)" if _EMPTY.startswith(value) else value)


def _dtype(row: Row) -> str | None:
    dtype, effective = row["dtype"], row["effective_dtype"]
    if effective in (None, dtype):
        return dtype
    return f"{dtype}, but every number is one of {effective}"


def _trained(facts: Mapping[str, Any]) -> str:
    from datetime import UTC, datetime

    when = facts["finished_at"] or facts["started_at"]
    return _joined(
        f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC" if when else None,
        None if facts["epoch"] is None else f"epoch {facts['epoch']}",
        None if facts["steps"] is None else f"{facts['steps']} steps",
    )


def _some(names: list[str]) -> str:
    """The first few of a list and how many there are."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{len(names)}: {', '.join(names[:3])}, …"

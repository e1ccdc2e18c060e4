"""All bases that can be named: of the index, the user's folder, the Hub's cache, the registry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafind.bases.basis import COLLECTION, OWN
from lorafind.bases.file import read_facts
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import in_use
from lorafind.hub import cache, folder, registry
from lorafind.hub.address import Address, Found
from lorafind.hub.client import Hub
from lorafind.hub.names import locate
from lorafind.index.opening import location
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION

_LISTED = ("id", "architecture", "feature", "components", "loras", "artists")


def known(db: Path | None) -> Iterator[dict[str, Any]]:
    """Every basis, one row each.

    Fields: ``name`` that commands take, ``id``, ``architecture``, ``feature``, ``components``,
    ``loras``, ``artists``, ``where`` (``index``, ``folder``, ``cache`` or ``registry``), ``in_use``
    (of the index only), ``path``; None for what is not known. A file that cannot be read gives a
    row with ``problem``, a sentence, alone.

    db: the index, None for the default one; one that does not exist has no bases. Raises
    IndexProblem for one that cannot be used.
    """
    for facts in _stored(db):
        yield _row(facts, facts["name"], "index", facts["in_use"], facts["path"])
    for path in folder.files():
        yield _of_file(path, path.stem, "folder")
    for address, path in cache.everything():
        yield _of_file(path, str(address), "cache")
    for entry in registry.entries():
        facts = {"architecture": entry.architecture, "feature": entry.feature}
        yield _row(facts, str(Address(entry.repository, entry.revision)), "registry")


def describe(
    db: Path | None, name: str, offline: bool = False, token: str | None = None
) -> list[dict[str, Any]]:
    """All facts of what a name stands for, with ``source`` (``index``, a path, or
    ``hf:owner/name@commit``), ``in_use`` (of the index only) and ``path``.

    name: id or name of a basis of the index, or ``own`` (one row per architecture), or as in
    :func:`lorafind.hub.names.resolve`. Of a basis that the Hub alone has, ``config.json`` is
    fetched, which leaves out the facts with one entry per component. Raises BasisProblem and
    IndexProblem.
    """
    here = [f for f in _stored(db) if name in (f["id"], f["name"]) or (name == OWN and f["own"])]
    if here or name == OWN:
        return here
    found, _ = locate(name)
    if isinstance(found, Found):
        return [{**read_facts(found), "source": found.name, "in_use": None, "path": found.path}]
    facts, pinned, path = Hub(token=token, offline=offline).facts(found)
    return [{**facts, "source": str(pinned), "in_use": None, "path": path}]


def _stored(db: Path | None) -> Iterator[dict[str, Any]]:
    """Facts of the bases of an index, the newest first."""
    if not location(db).exists():
        return
    with Store.open(db) as store:
        rows = store.conn.execute(
            "SELECT id, architecture, kind, version, facts FROM bases ORDER BY made_ns DESC, id"
        ).fetchall()
        chosen = {row[1]: store.get_meta(in_use(row[1]), OWN) for row in rows}
    for name, architecture, kind, version, text in rows:
        own, facts = kind == COLLECTION, json.loads(text)
        names = (name, facts.get("name"), OWN if own else None)
        yield {
            "feature": "style",
            "path": None,
            "name": name,
            **facts,
            "id": name,
            "architecture": architecture,
            "own": own,
            "source": "index",
            "in_use": version == SIGNATURE_VERSION and chosen[architecture] in names,
        }


def _of_file(path: Path, name: str, where: str) -> dict[str, Any]:
    try:
        return _row(read_facts(path), name, where, None, path)
    except BasisProblem as error:
        return {"problem": str(error)}


def _row(
    facts: Mapping[str, Any],
    name: str,
    where: str,
    in_use: bool | None = None,
    path: Path | str | None = None,
) -> dict[str, Any]:
    row = {"name": name, **{key: facts.get(key) for key in _LISTED}}
    if isinstance(row["components"], Mapping):
        # The collection's own has one number for the model and one for the text encoders.
        row["components"] = row["components"].get("model")
    return {**row, "where": where, "in_use": in_use, "path": path}

"""A target → what it is compared by: from the index, or from its file if the index lacks it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import absolute
from lorafind.index.problem import IndexProblem
from lorafind.index.rows import Module
from lorafind.index.store import Store
from lorafind.search.scores import Query
from lorafind.search.targets import find
from lorafind.signatures.constants import SIGNATURE_VERSION

if TYPE_CHECKING:
    from lorafind.index.examine import Lora


@dataclass(frozen=True)
class Asked:
    """A target that can be compared. path: as shown; lora: its content where it was read now."""

    target: str
    path: str
    query: Query
    lora: Lora | None = None


def ask(store: Store, target: str, allow_pickle: bool = False, device: str = "cpu") -> Asked:
    """Find or read a target.

    Raises NoSuchTarget; NotAnAdapter with the reason where the file is no LoRA, has ΔW = 0 or
    numbers that are not finite.
    """
    hit = find(store, target)
    if hit is not None and hit.lora is not None:
        return Asked(target, hit.path, stored_query(store, hit.lora, hit.path))
    if hit is not None and hit.status != "pickle":
        raise NotAnAdapter(hit.status, hit.reason)
    path = absolute(target) if hit is None else hit.path
    lora = examine_file(path, allow_pickle, device)
    known = store.find_lora(lora.content)
    if known is not None and known[1] is not None:
        row = store.conn.execute(
            "SELECT 1 FROM signatures WHERE lora = ? AND version = ?", (known[0], SIGNATURE_VERSION)
        ).fetchone()
        if row:
            return Asked(target, path, stored_query(store, known[0], path), lora)
    return Asked(target, path, fresh_query(store, lora, path), lora)


def stored_query(store: Store, lora: int, path: str = "") -> Query:
    """The Query of an indexed LoRA; no file is read."""
    architecture, layout, content = store.conn.execute(
        "SELECT architecture, layout, content FROM loras WHERE id = ?", (lora,)
    ).fetchone()
    found = next(iter(store.signatures(SIGNATURE_VERSION, [lora])), None)
    if found is None:
        raise IndexProblem("its signature is of another version of lorafind: run `lorafind index`.")
    signature = found[1]
    return Query(lora, architecture, layout, store.layout(layout)[1], signature, content, path)


def examine_file(path: str, allow_pickle: bool = False, device: str = "cpu") -> Lora:
    """Read a file that is not in the index; raises NotAnAdapter."""
    from lorafind.files.scan import ScanReport, Target, scan
    from lorafind.index.examine import examine
    from lorafind.signatures.device import choose

    if os.path.isdir(path):
        raise NotAnAdapter("not-a-file", f"{path} is a folder: name the files in it")
    target = Target(os.fsencode(path), b"", True)
    report = ScanReport()
    found = next(scan([target], report, allow_pickle), None)
    if found is None:
        why = report.missing.get(target.root)
        outcome = "inaccessible" if why else "vanished"
        raise NotAnAdapter(outcome, f"{path}: {why or 'nothing is there'}")
    if found.outcome:
        raise NotAnAdapter(found.outcome, f"{os.path.basename(path)}: {found.reason}")
    done = examine(
        found,
        (),
        device=choose(device),
        allow_pickle=allow_pickle,
        buffer=bytearray(),
        gate=nullcontext(),
        is_known=lambda content: False,
    )
    if done.lora is None:
        name = os.path.basename(path)
        text = done.reason if name in done.reason else f"{name}: {done.reason}"
        raise NotAnAdapter(done.outcome, text)
    return done.lora


def fresh_query(store: Store, lora: Lora, path: str = "") -> Query:
    """The Query of a LoRA that the index lacks: its layout there, and its model if unknown."""
    from lorafind.index import classes

    assert lora.modules is not None and lora.signature is not None
    architecture = lora.architecture
    if architecture.startswith(classes.OTHER):
        models, _ = classes.models(store)
        architecture = next((m.name for m in models if m.takes(lora.modules)), architecture)
    return Query(
        None,
        architecture,
        _layout(store, lora.architecture, lora.modules),
        lora.modules,
        lora.signature,
        lora.content,
        path,
    )


def _layout(store: Store, architecture: str, modules: list[Module]) -> int:
    """The id of a layout, −1 where the index has none like it."""
    from lorafind.index.store import layout_digest

    row = store.conn.execute(
        "SELECT id FROM layouts WHERE digest = ?", (layout_digest(architecture, modules),)
    ).fetchone()
    return int(row[0]) if row else -1

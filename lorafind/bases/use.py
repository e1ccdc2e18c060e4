"""A basis file in an index: checked, embedded with every LoRA that it fits, made the one in use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafind.bases import file as basis_file
from lorafind.bases.basis import OWN, PUBLISHED, Basis, to_stored
from lorafind.bases.calibration import Calibration
from lorafind.bases.collection import unit_rows
from lorafind.bases.file import BasisFile
from lorafind.bases.kernel import RCOND
from lorafind.bases.problem import BasisProblem
from lorafind.bases.selection import KEEPS, VIEWED, keeps
from lorafind.bases.stored import (
    current,
    embed_all,
    has_seen,
    in_use,
    load_styles,
    members,
    open_stored,
    records,
)
from lorafind.formats import groups as group_bits
from lorafind.index.classes import kinds
from lorafind.index.progress import Progress, Silent
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION

#: What the collection's own basis may be ahead by without being the better one.
FLATTERED = 0.1
#: LoRAs on which a basis is tried.
SAMPLED = 256

if TYPE_CHECKING:
    from lorafind.features.opening import Opened


@dataclass(frozen=True)
class Used:
    """What became of :func:`use`.

    embedded: how many LoRAs of the index have coordinates in the basis; refused: (path, reason) of
    the LoRAs of its architecture that have none; kept, own_kept: how much of what one group of
    layers tells about the others is left in the basis, and in the collection's own
    (:func:`lorafind.bases.selection.keeps`); None where too few LoRAs or groups can tell. artists:
    how many the basis was made from, 0 where that is not known.
    """

    id: str
    name: str
    architecture: str
    embedded: int
    refused: list[tuple[str, str]] = field(default_factory=list)
    kept: float | None = None
    own_kept: float | None = None
    artists: int = 0

    @property
    def serves(self) -> bool | None:
        """Whether the basis knows the styles of the collection; None where nothing can tell."""
        if self.kept is None:
            return None
        # The own basis was fitted to these very LoRAs, which flatters it a little.
        own = self.own_kept
        return self.kept >= KEEPS and (own is None or self.kept >= own - FLATTERED)

    @property
    def verdict(self) -> str:
        """Whether the basis serves this collection, in a sentence; empty where nothing can tell."""
        if self.kept is None:
            return ""
        told = f"Likeness in one group of layers tells {self.kept:.0%} of what it tells without"
        if self.own_kept is not None:
            told += f", in the collection's own basis {self.own_kept:.0%}"
        if self.serves:
            return f"{told}: the basis knows the styles of this collection."
        return (
            f"{told}: much in this collection is new to the basis, and `lorafind basis use own` "
            "is likely to answer better."
        )


def open_basis(path: str | os.PathLike[str], store: Store | None = None) -> Basis:
    """A basis file, ready to compare with. store: whose layouts its means are matched to.

    The components of a basis over style are in memory; those of others stay in the file. Raises
    BasisProblem where the file is no basis, damaged, or made for other signatures.
    """
    opened = basis_file.load(path)
    basis_file.fits(opened)
    layouts = _layouts(store) if store else {}
    space = opened.space(layouts, opened.facts["feature"] == "style")
    calibration = None
    if opened.facts.get("calibration", "none") != "none":
        calibration = Calibration(opened.array("scale"), opened.array("offset"))
    seen = opened.array("contents") if "contents" in opened.header.tensors else ()
    facts = {**opened.facts, "path": str(Path(path).absolute())}
    return Basis(
        opened.facts["id"],
        opened.facts["architecture"],
        facts,
        {"model": space},
        PUBLISHED,
        calibration,
        frozenset(row.tobytes() for row in seen),
        {group: opened.array(f"centres/{group}") for group in opened.groups},
    )


def _layouts(store: Store) -> Mapping[str, int]:
    return dict(store.conn.execute("SELECT digest, id FROM layouts").fetchall())


def use(store: Store, path: str | os.PathLike[str], watch: Progress | None = None) -> Used:
    """Make a basis file the one in use for its architecture, and embed every LoRA with it.

    A basis over style works from the stored signatures; any other reads every file again. Raises
    BasisProblem where the basis does not fit the index.
    """
    watch = watch or Silent()
    basis_file.self_test(path)
    basis = open_basis(path, store)
    ids, layouts, _ = members(store, basis.architecture)
    if not len(ids):
        have = sorted({a for (a,) in store.conn.execute("SELECT architecture FROM loras")})
        raise BasisProblem(
            f"{path} is a basis for {basis.architecture}; the index holds "
            f"{', '.join(have) or 'no LoRA at all'}."
        )
    with store.batch():
        store.put_basis(to_stored(basis))
        store.set_meta(_left_out(basis.id), [])
        if basis.feature == "style":
            watch.stage(f"Embedding in {basis.facts['name']}", len(ids), 0)
            embed_all(store, basis, ids, layouts)
            watch.advance(len(ids), 0)
            refused = _without_groups(store, basis)
        else:
            refused = _embed_files(store, basis, ids, layouts, watch)
        store.set_meta(in_use(basis.architecture), basis.id)
    embedded = len(ids) - len(refused)
    name = str(basis.facts["name"])
    kept = own_kept = None
    if basis.feature == "style":
        own = current(store, basis.architecture, wanted=OWN)
        kept = kept_by(store, basis, ids, layouts)
        own_kept = kept_by(store, own, ids, layouts) if own else None
    artists = int(basis.facts.get("artists") or 0)
    return Used(basis.id, name, basis.architecture, embedded, refused, kept, own_kept, artists)


def kept_by(store: Store, basis: Basis, ids: np.ndarray, layouts: np.ndarray) -> float | None:
    """How much of what one group of layers tells about the others is left in a basis over style.

    On a sample of LoRAs that have all groups of the basis's U-Net or transformer; None with fewer
    than two groups or VIEWED LoRAs. The mean that is taken off first is that of the sample.
    """
    space = basis.spaces["model"]
    if len(space.groups) < 2:
        return None
    some = np.unique(np.linspace(0, len(ids) - 1, min(SAMPLED, len(ids))).astype(int))
    styles = load_styles(store, ids[some])
    if any(group not in styles for group in space.groups):
        return None
    has = np.logical_and.reduce([styles[group].any(1) for group in space.groups])
    if has.sum() < VIEWED:
        return None
    raw, projected = [], []
    for group in space.groups:
        rows = unit_rows(styles[group][has])
        rows -= rows.mean(0)
        raw.append((rows @ rows.T).astype(np.float64))
        v = space.components[group].astype(np.float32)
        found = (rows @ v.T).astype(np.float64)
        own = np.linalg.pinv(space.grams[group], rcond=RCOND, hermitian=True)
        found = found @ own.T
        projected.append(found @ found.T)
    return keeps(raw, projected)


def choose(store: Store, name: str) -> list[str]:
    """Make a basis of the index the one in use, by id or name; ``own``: the collection's own.

    Returns the architectures for which that holds. Raises BasisProblem for an unknown name.
    """
    if name == OWN:
        keys = [
            key
            for (key,) in store.conn.execute("SELECT key FROM meta WHERE key LIKE 'basis:%'")
            if store.get_meta(key) != OWN
        ]
        with store.batch():
            for key in keys:
                store.set_meta(key, OWN)
        return [key.partition(":")[2] for key in keys]
    rows = store.conn.execute(
        "SELECT id, architecture FROM bases WHERE version = ?1 AND "
        "(id = ?2 OR json_extract(facts, '$.name') = ?2) ORDER BY made_ns DESC LIMIT 1",
        (SIGNATURE_VERSION, name),
    ).fetchall()
    if not rows:
        raise BasisProblem(f"The index has no basis {name!r}: `lorafind basis list` names them.")
    with store.batch():
        for found, architecture in rows:
            store.set_meta(in_use(architecture), found)
    return [architecture for _, architecture in rows]


def _without_groups(store: Store, basis: Basis) -> list[tuple[str, str]]:
    """LoRAs that have none of the groups of a basis."""
    wanted = group_bits.mask(basis.groups)
    bare = [
        int(lora)
        for block, rows in store.chunks.scan("embedding", basis.id)
        for lora in block[(rows["groups"] & wanted) == 0]
    ]
    names = ", ".join(basis.groups)
    return [(path, f"it has none of the basis's groups ({names})") for path in _paths(store, bare)]


def _paths(store: Store, ids: list[int]) -> list[str]:
    """A path of each LoRA, empty where none is within reach."""
    found = []
    for lora in ids:
        row = store.conn.execute(
            "SELECT r.path, r.single, f.path FROM files f JOIN roots r ON r.id = f.root "
            "WHERE f.lora = ? ORDER BY f.presence != 'here', f.id LIMIT 1",
            (lora,),
        ).fetchone()
        if row is None:
            found.append("")
        else:
            root, single, relative = row
            found.append(os.fsdecode(root if single else os.path.join(root, relative)))
    return found


def catch_up(store: Store, watch: Progress) -> None:
    """Embed the LoRAs that have come since, for bases that read files; stale rows go.

    LoRAs that did not fit are not tried again.
    """
    rows = store.conn.execute(
        "SELECT id, architecture FROM bases WHERE kind = ? AND version = ? AND "
        "json_extract(facts, '$.feature') != 'style'",
        (PUBLISHED, SIGNATURE_VERSION),
    ).fetchall()
    for name, architecture in rows:
        ids, layouts, _ = members(store, architecture)
        done = store.chunks.ids("embedding", name)
        fresh = ~np.isin(ids, np.union1d(done, store.get_meta(_left_out(name), [])))
        stale = np.setdiff1d(done, ids)
        if not fresh.any() and not len(stale):
            continue
        basis = open_stored(store, name)
        assert basis is not None
        with store.batch():
            store.chunks.delete(stale.tolist(), "embedding", name)
            store.chunks.delete(stale.tolist(), "parts", name)
            if fresh.any():
                _embed_files(store, basis, ids[fresh], layouts[fresh], watch)


def _left_out(basis: str) -> str:
    """The key of ``meta`` for the LoRAs that a basis cannot embed."""
    return f"left-out:{basis}"


def _embed_files(
    store: Store, basis: Basis, ids: np.ndarray, layouts: np.ndarray, watch: Progress
) -> list[tuple[str, str]]:
    """Embed LoRAs from their files, for a basis that is not over style. Inside a batch.

    Returns (path, reason) of those that cannot be embedded.
    """
    paths = _paths(store, ids.tolist())
    try:
        held = _held(basis)
    except BasisProblem as error:
        return [(path, str(error)) for path in paths]
    there = [i for i, path in enumerate(paths) if path and os.path.exists(path)]
    refused = [(path, "the file is out of reach") for path in paths if not os.path.exists(path)]
    if not there:
        return refused
    try:
        opened = _open(basis, [paths[i] for i in there], watch)
    except BasisProblem as error:
        _leave_out(store, basis, ids[there])
        return [*refused, *((paths[i], str(error)) for i in there)]
    parts = project(held, opened, watch).astype(np.float32)
    rows = np.array(there)[opened.rows]
    groups = np.zeros(len(rows), np.uint8)
    for group, has in opened.matrix.present.items():
        groups[has] |= group_bits.mask((group,))
    seen = has_seen(store, basis, ids[rows])
    made = records(basis, parts, groups, layouts[rows], seen)
    store.chunks.append_many("embedding", basis.id, ids[rows], made)
    store.chunks.append_many("parts", basis.id, ids[rows], parts)
    _leave_out(store, basis, ids[sorted(set(there) - set(rows.tolist()))])
    return refused + list(opened.refused)


def _leave_out(store: Store, basis: Basis, ids: np.ndarray) -> None:
    before = store.get_meta(_left_out(basis.id), [])
    store.set_meta(_left_out(basis.id), sorted({*before, *ids.tolist()}))


def _held(basis: Basis) -> BasisFile:
    """The file of a basis that is not over style; raises BasisProblem where it is another now."""
    found = basis_file.load(basis.facts["path"])
    if found.facts["id"] != basis.id:
        raise BasisProblem(
            f"{found.path} is no longer the basis {basis.facts['name']} ({basis.id}): "
            "`lorafind basis use` it again."
        )
    return found


def parts_of_file(basis: Basis, path: str) -> np.ndarray:
    """p_g of one file, 1 × width, for a basis that is not over style.

    Raises BasisProblem where the file does not fit the basis.
    """
    opened = _open(basis, [path], Silent())
    return project(_held(basis), opened).astype(np.float32)


def _open(basis: Basis, paths: list[str], watch: Progress) -> Opened:
    from lorafind.features.opening import open_feature
    from lorafind.features.theta import Frame

    frame = basis.facts.get("frame")
    opened = open_feature(
        basis.feature,
        paths,
        basis.groups,
        frame=Frame.from_json(frame) if frame else None,
        watch=watch,
    )
    if basis.architecture not in kinds(opened.architecture):
        raise BasisProblem(
            f"The basis {basis.facts['name']} is for {basis.architecture}; {paths[0]} is for "
            f"{opened.architecture}."
        )
    return opened


def project(basis: BasisFile, opened: Opened, watch: Progress | None = None) -> np.ndarray:
    """p_g of some LoRAs, n × (groups · k): one pass over their feature and over the file."""
    watch = watch or Silent()
    matrix = opened.matrix
    place = {digest: 1 + row for row, digest in enumerate(basis.facts["layouts"])}
    centre_of = np.array([place.get(digest, 0) for digest in opened.digests])[opened.layouts]
    out = np.zeros((matrix.count, len(basis.groups), basis.size))
    for position, group in enumerate(basis.groups):
        if group not in matrix.groups:
            continue
        for tile, block in matrix.walk(group):
            out[:, position] += block @ basis.columns(group, tile).T
            watch.advance(1, block.nbytes)
        out[:, position] *= basis.facts["weights"][group]
        out[:, position] -= basis.array(f"centres/{group}")[centre_of]
        out[~matrix.present[group], position] = 0.0
    return out.reshape(matrix.count, -1)

"""Planted indexes: rows as ``lorafind index`` would write them, without any file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorafind.bases.basis import Basis, to_stored
from lorafind.bases.collection import Space
from lorafind.index.rows import Module, StoredSignature
from lorafind.index.store import Store
from lorafind.signatures.constants import (
    DIMENSIONS,
    IDENTITY,
    SEGMENTS,
    SIGNATURE_VERSION,
    STYLE,
    VERSION,
)
from tests.benchmarks.files import modules

GROUPS = ("self_attn", "cross_attn", "ff")
COMPONENTS = 64


def layout() -> list[Module]:
    """The modules of an SD1.5 LoRA."""
    found = []
    for name, o, n in modules("sd1"):
        kind = {"attn1": "self_attn", "attn2": "cross_attn", "ff_net": "ff"}
        group = next((g for sign, g in kind.items() if sign in name), "other")
        found.append(Module(f"unet/{name}", group, o, n, False, name.startswith(("mid", "up"))))
    return found


def identities(n: int, seed: int, norms: int = 192) -> tuple[np.ndarray, np.ndarray]:
    """n random identity records of SD1.5 U-Nets, and their module norms."""
    rng = np.random.default_rng(seed)
    record = np.zeros(n, IDENTITY)
    used = [k for k, name in enumerate(SEGMENTS) if not name.startswith("te")]
    for start in range(0, n, 4096):
        block = record[start : start + 4096]
        size = (len(block), len(used), DIMENSIONS)
        block["sketch"][:, used] = rng.standard_normal(size, np.float32) / DIMENSIONS**0.5
        block["norms"][:, used] = rng.uniform(0.5, 2.0, (len(block), len(used)))
    return record, rng.uniform(0.1, 1.0, (n, norms)).astype(np.float32)


def blocks(n: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, identity records, module norms) of n LoRAs with copies among them, 4,096 at a time.

    Every hundredth LoRA is a copy of the one before it, rounded as BF16 rounds; a hundredth of each
    block's 4,096 (10,000 of a million) are copies of the very first LoRA.
    """
    first: tuple[np.ndarray, np.ndarray] | None = None
    for start in range(0, n, 4096):
        size = min(4096, n - start)
        record, norms = identities(size, 1000 + start)
        if first is None:
            first = record[0].copy(), norms[0].copy()
        for k in range(50, size, 100):
            record[k], norms[k] = rounded(record[k - 1], norms[k - 1], start + k)
        for k in range(99, size, 100):
            record[k], norms[k] = rounded(*first, start + k)
        yield np.arange(start, start + size) + 1, record, norms


def planted_pairs(n: int) -> set[tuple[int, int]]:
    """The ids of the copies of :func:`blocks` that are no copies of the first."""
    return {
        (k, k + 1)
        for start in range(0, n, 4096)
        for k in range(start + 50, min(start + 4096, n), 100)
    }


def rounded(record: np.ndarray, norms: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same LoRA as BF16 keeps it: off by 0.23 % of ‖ΔW‖."""
    rng = np.random.default_rng(seed)
    made = record.copy()
    noise = rng.standard_normal(made["sketch"].shape, np.float32) * (2.3e-3 / DIMENSIONS**0.5)
    made["sketch"] = np.where(made["sketch"] != 0, made["sketch"] + noise, 0)
    made["norms"] *= 1 + 2e-5 * rng.standard_normal(len(made["norms"]))
    return made, norms * (1 + 1e-4 * rng.standard_normal(len(norms), np.float32))


def fill(
    db: Path,
    n: int,
    folder: Path,
    styles: int = 64,
    with_identity: bool = True,
    with_basis: bool = True,
) -> None:
    """An index of n LoRAs of one architecture; ``styles`` of them can be queries."""
    rng = np.random.default_rng(1)
    with Store.open(db, "write") as store:
        store.targets([folder])
        with store.batch():
            where = store.put_layout("sd1", layout())
        if with_identity:
            for ids, record, norms in blocks(n):
                rows(store, int(ids[0]) - 1, int(ids[-1]), where, norms)
                with store.batch():
                    store.chunks.append_many("identity", "sd", ids, record)
        else:
            rows(store, 0, n, where, None)
        for start in range(0, min(styles, n), 1024):
            with store.batch():
                for k in range(start, min(start + 1024, styles, n)):
                    store.put_signature(k + 1, signature(rng))
        if with_basis:
            _basis(store, n, where, rng)


def signature(rng: np.random.Generator) -> StoredSignature:
    """A random style signature."""
    style = rng.integers(-127, 128, (len(GROUPS), STYLE)).astype(np.int8)
    return StoredSignature(
        SIGNATURE_VERSION, 0b111, np.ones(3, np.float32), np.full(3, 64.0), style
    )


def rows(store: Store, first: int, last: int, where: int, norms: np.ndarray | None) -> None:
    """LoRAs first … last − 1 (from 0) and a file of each, in bulk; norms: of these alone."""
    (root,) = store.conn.execute("SELECT id FROM roots").fetchone()
    ones = np.ones(192, np.float32).tobytes()
    with store.batch():
        store.conn.executemany(
            "INSERT INTO loras VALUES (?, ?, ?, 'sd1', 'lora', 'kohya', '{\"16\": 192}', "
            "'{\"8\": 192}', 'F16', 'F16', ?, 1.0, ?, ?, '[]', '[]', '{}', ?)",
            (
                (
                    k + 1,
                    f"{k:064x}",
                    f"{k:064x}",
                    where,
                    ones if norms is None else norms[k - first].tobytes(),
                    f'{{"name": "lora {k}"}}',
                    VERSION,
                )
                for k in range(first, last)
            ),
        )
        store.conn.executemany(
            "INSERT INTO files VALUES (NULL, ?, ?, 12000000, 1, 1, 1, ?, 0, NULL, 'lora', '', ?, "
            "?, ?, 1000000000000000000, 'here')",
            (
                (root, f"{k}.safetensors".encode(), k + 1, f"{k:064x}", k + 1, VERSION)
                for k in range(first, last)
            ),
        )


def _basis(store: Store, n: int, where: int, rng: np.random.Generator) -> None:
    components = {g: rng.standard_normal((COMPONENTS, STYLE), np.float32) for g in GROUPS}
    space = Space(
        GROUPS,
        components,
        {g: np.eye(COMPONENTS) / 3 for g in GROUPS},
        {-1: {g: np.zeros(COMPONENTS, np.float32) for g in GROUPS}},
        np.ones(COMPONENTS),
    )
    basis = Basis("own:sd1:planted", "sd1", {"families": n}, {"model": space})
    with store.batch():
        store.put_basis(to_stored(basis))
    for start in range(0, n, 4096):
        ids = np.arange(start, min(start + 4096, n)) + 1
        records = np.zeros(len(ids), basis.record)
        records["groups"], records["layout"] = 0b111, where
        vectors = rng.standard_normal((len(ids), COMPONENTS), np.float32)
        records["vector"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        with store.batch():
            store.chunks.append_many("embedding", basis.id, ids, records)
            if not start:
                parts = rng.standard_normal((len(ids), basis.width), np.float32)
                store.chunks.append_many("parts", basis.id, ids, parts)


def settle(db: Path) -> None:
    """Mark every LoRA as compared, so that queries find nothing to prove."""
    from lorafind.index.relate import mark_of

    with Store.open(db, "write") as store, store.batch():
        (newest,) = store.conn.execute("SELECT max(id) FROM loras").fetchone()
        store.set_meta(mark_of("sd"), newest)


def offline(db: Path) -> None:
    """The drive with the files is away."""
    with Store.open(db, "write") as store, store.batch():
        store.conn.execute("UPDATE files SET presence = 'offline'")


def tiny_files(folder: Path, n: int) -> None:
    """n small LoRA files in folders of 500."""
    import torch
    from safetensors.torch import save

    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for k in range(n):
        place = folder / f"{k // 500:03}"
        place.mkdir(parents=True, exist_ok=True)
        g = torch.Generator().manual_seed(k)
        data = save(
            {
                f"{name}.lora_down.weight": torch.randn(1, 1280, generator=g).half(),
                f"{name}.lora_up.weight": torch.randn(1280, 1, generator=g).half(),
            }
        )
        (place / f"{k}.safetensors").write_bytes(data)
        os.utime(place / f"{k}.safetensors", (1, 1))

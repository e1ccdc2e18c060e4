"""A million planted LoRAs in one index: building it, ``similar``, copies, memory and disk.

Planted are a file row, norms of 192 modules, the identity sketch and the embedding of each, as
``index`` writes them, and a hundredth each of copies in pairs and of copies of one LoRA. Style
sketches (98 kB per LoRA with three groups, 98 GB in all) are left out but for a sample, from which
the time of embedding is extrapolated.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks.__main__ import Line, lorafind, process, timed
from tests.benchmarks.planted import COMPONENTS, fill, offline, planted_pairs, settle

#: LoRAs with style sketches; at most 2 GB of them.
STYLES = 20_000
MIB = 2**20


def million(place: Path, scale: float) -> Iterator[Line]:
    """The table of the README."""
    n = int(1_000_000 * scale)
    folder, db = place / "files", place / "x.db"
    folder.mkdir()
    began = time.perf_counter()
    # Too few with style sketches for a basis of their own, so that finishing fits none.
    fill(db, n, folder, styles=8)
    took = time.perf_counter() - began
    size = db.stat().st_size
    yield Line(f"plant {n:,} LoRAs", f"{took:.0f} s", "")
    yield Line("… rows a second", f"{n / took:,.0f}", "")
    yield Line("… / writing as many bytes to a file", f"{took / _written(place, size):.1f}", "")
    yield Line("… on disk, without style sketches", f"{size / 1e9:.2f} GB", "")
    yield from _similar(db, folder, n)
    yield from _copies(db, n)
    yield from _embedding(place, int(STYLES * scale), n)


def _written(place: Path, size: int) -> float:
    """Seconds for so many bytes in pieces of 16 MiB, in the file system when it ends."""
    piece = os.urandom(16 * MIB)
    began = time.perf_counter()
    with (place / "plain").open("wb") as file:
        for _ in range(size // len(piece) + 1):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    (place / "plain").unlink()
    return took


def _similar(db: Path, folder: Path, n: int) -> Iterator[Line]:
    from lorafind.bases.stored import current
    from lorafind.index.store import Store
    from lorafind.search.query import ask
    from lorafind.search.scores import by_basis

    settle(db)
    with Store.open(db) as store:
        asked = ask(store, str(folder / "3.safetensors"))
        basis = current(store, "sd1")
        assert basis is not None
        wanted = ("self_attn", "cross_attn", "ff")
        scores = timed(lambda: by_basis(store, basis, asked.query, wanted), 5)
        size = n * basis.record.itemsize

        def product() -> None:
            # The same chunks out of SQLite, and one product over each.
            vector = np.ones(COMPONENTS, np.float32)
            for _, rows in store.chunks.scan("embedding", basis.id):
                rows["vector"] @ vector

        floor = timed(product, 5)
    bare = _in_memory(n)
    took, peak = process(*lorafind("--db", str(db), "similar", str(folder / "3.safetensors")))
    start, _ = process(*lorafind("--db", str(db), "--help"))
    yield Line(f"scores at {n:,} ({size / 1e6:,.0f} MB of embeddings)", f"{scores:.2f} s", "")
    yield Line(
        "… / numpy product over the same rows read from the index", f"{scores / floor:.2f}", "≤ 1.2"
    )
    yield Line("… / numpy product over the same bytes in memory", f"{scores / bare:.1f}", "")
    yield Line(f"similar FILE at {n:,}, whole process", f"{took:.2f} s", "")
    yield Line("… / (lorafind --help and that product)", f"{took / (start + floor):.2f}", "")
    yield Line("… peak memory", f"{peak / MIB:.0f} MiB", "< 1024 MiB")


def _in_memory(rows: int) -> float:
    """One numpy product over as many bytes that are in memory already."""
    matrix, vector = np.ones((rows, COMPONENTS), np.float32), np.ones(COMPONENTS, np.float32)
    return timed(lambda: matrix @ vector, 5)


def _copies(db: Path, n: int) -> Iterator[Line]:
    """The whole of ``dupes``; nothing can be proved of files that are not there."""
    offline(db)
    with sqlite3.connect(db) as conn:
        conn.execute("DELETE FROM meta WHERE key LIKE 'related/%'")
    conn.close()
    command = lorafind("--db", str(db), "dupes")
    took, peak = process(*command, repeat=0)
    with sqlite3.connect(db) as conn:
        found = set(conn.execute("SELECT x, y FROM relations WHERE grade = 'likely'").fetchall())
    conn.close()
    planted = planted_pairs(n)
    crowd = _crowd(n) & {k for pair in found for k in pair}
    yield Line(f"dupes at {n:,} by buckets, first time, without proofs", f"{took:.0f} s", "")
    yield Line("… peak memory", f"{peak / MIB:.0f} MiB", "< 1024 MiB")
    yield Line(f"… of {len(planted):,} planted pairs missed", f"{len(planted - found)}", "0")
    yield Line(
        f"… of {len(_crowd(n)):,} copies of one LoRA missed", f"{len(_crowd(n) - crowd)}", "0"
    )
    yield Line("… pairs to prove", f"{len(found):,}", "")
    again, peak = process(*command, repeat=1)
    yield Line("dupes again, nothing new", f"{again:.2f} s", "")
    from lorafind.index.relate import outlook
    from lorafind.index.store import Store

    with Store.open(db) as store:
        began = time.perf_counter()
        left = sum(series.seconds for series in outlook(store))
        measuring = time.perf_counter() - began
    yield Line("dupes --deep, an estimate", f"{left / 3600:.1f} h", "")
    yield Line("… seconds to make the estimate", f"{measuring:.1f} s", "")
    if left:
        yield Line("dupes by buckets / dupes --deep (estimate)", f"{took / left:.4f}", "")


def _crowd(n: int) -> set[int]:
    """Ids of the copies of the first LoRA."""
    return {
        k + 1 for start in range(0, n, 4096) for k in range(start + 99, min(start + 4096, n), 100)
    }


def _embedding(place: Path, n: int, whole: int) -> Iterator[Line]:
    """Fit a basis and embed n LoRAs with style sketches, and what that says of a million."""
    from lorafind.bases import stored
    from lorafind.bases.basis import to_stored
    from lorafind.bases.collection import FEWEST, SAMPLE
    from lorafind.index.store import Store

    if n < FEWEST:
        return
    (place / "styles").mkdir()
    db = place / "styles.db"
    fill(db, n, place / "styles", styles=n, with_identity=False, with_basis=False)
    with Store.open(db, "write") as store:
        ids, layouts, families = stored.members(store, "sd1")
        began = time.perf_counter()
        basis = stored._fit(store, "sd1", ids, layouts, families)
        fit = time.perf_counter() - began
        with store.batch():
            store.put_basis(to_stored(basis))
        began = time.perf_counter()
        stored._catch_up(store, basis, ids, layouts)
        embed = time.perf_counter() - began
        read = timed(
            lambda: sum(len(row[0]) for row in store.conn.execute("SELECT style FROM signatures"))
        )
    size = db.stat().st_size
    yield Line(f"basis from a sample of {min(n, SAMPLE):,}", f"{fit:.0f} s", "")
    yield Line(f"embed {n:,} LoRAs of three groups", f"{embed:.0f} s", "")
    yield Line("… / reading their style sketches", f"{embed / read:.1f}", "")
    yield Line(f"… extrapolated to {whole:,}", f"{embed * whole / n / 60:.0f} min", "")
    yield Line("… with style sketches on disk", f"{size / n * whole / 1e9:.0f} GB", "")

"""One run, one table: what lorafind takes against the least that the task could take.

``python -m tests.benchmarks [NAME …]`` runs all of index, reindex, similar, million, dupes,
memory, rebuild, pca, paper and train, or those named; ``--small`` takes a tenth of each size.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """A row of the table; goal: what is asked for, empty where only the figure is wanted."""

    what: str
    value: str
    goal: str


def timed(call: Callable[[], object], repeat: int = 1) -> float:
    """The median of several runs, seconds."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


#: Runs a command and prints its wall time and peak memory. A process of its own, because a child's
#: peak begins with that of the process which started it.
_RUNNER = """
import resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
took = time.perf_counter() - began
print(done.returncode, took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def process(*command: str, repeat: int = 5) -> tuple[float, int]:
    """Median wall time (s) and largest peak memory (bytes) of a process, after a warm-up."""
    times, peak = [], 0
    for _ in range(repeat + 1):
        runner = [sys.executable, "-c", _RUNNER, *command]
        told = subprocess.run(runner, capture_output=True, text=True, check=True).stdout.split()
        if told[0] not in ("0", "3"):
            raise RuntimeError(f"{command} failed with {told[0]}")
        times.append(float(told[1]))
        peak = max(peak, int(told[2]))
    return statistics.median(times[1:] or times), peak


def lorafind(*arguments: str) -> tuple[str, ...]:
    """The command line of this interpreter's lorafind."""
    return (sys.executable, "-m", "lorafind", *arguments)


def index(place: Path, scale: float) -> Iterator[Line]:
    """Index real shapes against hashing and reading the same bytes."""
    from lorafind.index.build import build
    from lorafind.index.store import Store
    from tests.benchmarks.files import write

    folder = place / "files"
    folder.mkdir()
    for k in range(int(200 * scale)):
        write(folder / f"sd1-{k}.safetensors", "sd1", 16, k)
    for k in range(max(1, int(8 * scale))):
        write(folder / f"sdxl-{k}.safetensors", "sdxl", 32, k)
    paths = sorted(folder.iterdir())
    size = sum(path.stat().st_size for path in paths)

    def hashes() -> None:
        for path in paths:
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")

    def reads() -> None:
        buffer = bytearray(1 << 20)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def run() -> None:
        with tempfile.TemporaryDirectory() as db, Store.open(Path(db) / "x.db", "write") as store:
            build(store, [folder], device="cpu")

    read, floor = timed(reads, 3), timed(hashes, 3)
    took = timed(run, 3)
    yield Line(f"index {len(paths)} files, {size / 1e6:,.0f} MB", f"{took:.1f} s", "")
    yield Line("… / hashlib SHA-256, one thread", f"{took / floor:.2f}", "≤ 3.0")
    yield Line("… / plain reading", f"{took / read:.1f}", "")
    if program := shutil.which("sha256sum"):
        other = timed(lambda: subprocess.run([program, *paths], stdout=subprocess.DEVNULL), 3)
        yield Line("… / coreutils sha256sum", f"{took / other:.2f}", "≤ 1.0")


def reindex(place: Path, scale: float) -> Iterator[Line]:
    """Look at 10,000 unchanged files."""
    from tests.benchmarks.planted import tiny_files

    n = int(10_000 * scale)
    tiny_files(place / "files", n)
    command = lorafind("--db", str(place / "x.db"), "index")
    subprocess.run(
        [*command, "--no-relations", str(place / "files")], check=True, stderr=subprocess.DEVNULL
    )
    from tests.benchmarks.planted import settle

    settle(place / "x.db")
    took, _ = process(*command, "--no-relations")
    yield Line(f"re-index {n:,} unchanged files, whole process", f"{took:.2f} s", "≤ 2 s")
    if program := shutil.which("find"):
        floor, _ = process(program, str(place / "files"), "-printf", "%p %s %T@\n")
        yield Line("… / find -printf", f"{took / floor:.1f}", "")


def similar(place: Path, scale: float) -> Iterator[Line]:
    """One query as a whole process."""
    from tests.benchmarks.planted import fill, settle

    n = int(10_000 * scale)
    (place / "files").mkdir()
    fill(place / "x.db", n, place / "files", with_identity=False)
    settle(place / "x.db")
    took, peak = process(*lorafind("--db", str(place / "x.db"), "similar", "lora 3"))
    floor, _ = process(sys.executable, "-c", "import numpy, sqlite3, rich, typer")
    yield Line(f"similar at {n:,}, whole process", f"{took:.2f} s", "")
    yield Line("… / python -c 'import numpy, sqlite3, rich, typer'", f"{took / floor:.2f}", "≤ 2.5")
    yield Line("… peak memory", f"{peak / 2**20:.0f} MiB", "≤ 300 MiB")


def million(place: Path, scale: float) -> Iterator[Line]:
    """A million LoRAs in one index, whole commands; see :mod:`tests.benchmarks.million`."""
    from tests.benchmarks.million import million as run

    yield from run(place, scale)


def dupes(place: Path, scale: float) -> Iterator[Line]:
    """Candidates among 50,000 identity sketches with 1 % planted pairs."""
    from lorafind.relations.candidates import Identities, candidates
    from tests.benchmarks.planted import identities, layout

    n = int(50_000 * scale)
    record, norms = identities(n, 5)
    rng = np.random.default_rng(6)
    planted = rng.permutation(n)[: n // 50].reshape(-1, 2)
    for a, b in planted.tolist():
        record[b] = record[a]
        norms[b] = norms[a]
    names = {1: [m.name for m in layout()]}
    known = Identities(
        np.arange(n), np.ones(n, np.int64), record["sketch"], record["norms"], list(norms)
    )
    found: set[tuple[int, int]] = set()

    def run() -> None:
        found.clear()
        for block in candidates(known, names):
            found.update((min(i, j), max(i, j)) for i, j in block.tolist())

    took = timed(run)
    wanted = {(min(a, b), max(a, b)) for a, b in planted.tolist()}
    missed, more = len(wanted - found), len(found - wanted)
    flat = (record["sketch"].astype(np.float32) * record["norms"][:, :, None]).astype(np.float32)
    flat = flat.reshape(n, -1)[:, : 8 * 128].copy()

    def product() -> None:
        for start in range(0, n, 1024):
            for other in range(0, start + 1024, 1024):
                flat[start : start + 1024] @ flat[other : other + 1024].T

    floor = timed(product)
    yield Line(f"candidate pairs among {n:,}, {len(wanted)} planted", f"{took:.1f} s", "")
    yield Line("… / plain blocked matrix product", f"{took / floor:.2f}", "≤ 1.5")
    yield Line("… planted pairs missed; other pairs", f"{missed}; {more}", "0; few")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield Line("… peak memory of the process", f"{peak / 2**20:.0f} MiB", "")


def memory(place: Path, scale: float) -> Iterator[Line]:
    """Peak memory of indexing one large file, and a few of 170 MB at once."""
    from tests.benchmarks.files import write

    for what, model, rank, count in (
        ("SDXL rank 32", "sdxl", 32, 6),
        ("SDXL rank 400", "sdxl", int(400 * scale) or 1, 1),
        ("Flux.1 rank 72, fused", "flux1", int(72 * scale) or 1, 1),
    ):
        folder = place / what
        folder.mkdir()
        for k in range(count):
            write(folder / f"{k}.safetensors", model, rank, k)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        command = lorafind("--db", str(folder / "x.db"), "index", str(folder))
        _, peak = process(*command, repeat=0)
        yield Line(
            f"index {count} × {what} ({size:,.0f} MiB), peak memory",
            f"{peak / 2**20:.0f} MiB",
            "< 1024 MiB",
        )


def rebuild(place: Path, scale: float) -> Iterator[Line]:
    """A basis from the index's stored signatures."""
    from tests.benchmarks.planted import GROUPS, fill, settle

    n = int(10_000 * scale)
    (place / "files").mkdir()
    fill(place / "x.db", n, place / "files", styles=n, with_identity=False)
    settle(place / "x.db")
    command = lorafind("--db", str(place / "x.db"), "rebuild-basis", "--from-index")
    took, peak = process(*command, "-o", str(place / "b.safetensors"), repeat=1)
    yield Line(f"rebuild-basis --from-index at {n:,}, whole process", f"{took:.1f} s", "")
    from lorafind.bases.collection import SAMPLE, unit_rows

    rows = np.random.default_rng(0).integers(-127, 128, (min(n, SAMPLE), 32_768)).astype(np.int8)

    def product() -> None:
        unit = unit_rows(rows)
        for _ in GROUPS:
            unit @ unit.T

    yield Line("… / plain products of the sample", f"{took / timed(product):.1f}", "")
    yield Line("… peak memory", f"{peak / 2**20:.0f} MiB", "")


def pca(place: Path, scale: float) -> Iterator[Line]:
    """Principal components against scikit-learn; see :mod:`tests.benchmarks.pca`."""
    from tests.benchmarks.pca import pca as run

    yield from run(place, scale)


def paper(place: Path, scale: float) -> Iterator[Line]:
    """θ of 1,512 LoRAs in two passes; see :mod:`tests.benchmarks.pca`."""
    from tests.benchmarks.pca import paper as run

    yield from run(place, scale)


def train(place: Path, scale: float) -> Iterator[Line]:
    """Steps of training against diffusers' example; see :mod:`tests.benchmarks.train`."""
    from tests.benchmarks.train import train as run

    yield from run(place, scale)


BENCHMARKS = {
    f.__name__: f
    for f in (index, reindex, similar, million, dupes, memory, rebuild, pca, paper, train)
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []])
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores; numpy {np.__version__}; python {sys.version.split()[0]}")
    for name in arguments.names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as place:
            for line in BENCHMARKS[name](Path(place), 0.1 if arguments.small else 1.0):
                print(f"{line.what:70} {line.value:>12}  {line.goal}", flush=True)


if __name__ == "__main__":
    main()

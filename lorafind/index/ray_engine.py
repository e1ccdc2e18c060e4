"""Examines files with the actors of a Ray cluster; the driver alone writes the index.

Ray Data sends blocks of a few files to one actor per CPU, which runs the same code as one machine
does, and streams the results back. Ray restarts an actor that died and sends its block again,
without end: an actor of our own counts how often each block was begun, and a block that was begun
too often is left alone. Whatever file has no result then is sent once more by itself, so that one
that ends its process every time is told from those that only shared a block with it.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafind.files.scan import Found
from lorafind.index.problem import IndexProblem
from lorafind.index.ray_cluster import cluster
from lorafind.index.reconcile import Read
from lorafind.index.workers import IDLE_SECONDS, PATIENCE, workers
from lorafind.signatures.constants import VERSION

if TYPE_CHECKING:
    import pyarrow

    from lorafind.index.examine import Examined

#: A block ends with so many files or so many bytes; its results come back together.
BLOCK_FILES, BLOCK_BYTES = 8, 64 * 2**20
#: Files of one run of Ray Data: what the driver and the object store hold of a collection.
ROUND = 20_000
#: How often a block is begun.
TRIES = 2
#: Outcomes that say that a file could not be reached.
UNSEEN = frozenset({"vanished", "inaccessible"})


class Ledger:
    """The actor that outlives those that examine: counts how often a block was begun."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, block: int) -> int:
        """The how manieth beginning this is."""
        self._begun[block] += 1
        return self._begun[block]


class Examiner:
    """The actor that examines the files of a block and returns what the index keeps of each.

    version: the driver's, which must be this node's. known: sorted contents (hex) of the index,
    in a list, so that Ray does not copy them for every actor. ledger: a :class:`Ledger`.
    """

    def __init__(self, version: int, allow_pickle: bool, known: list[Any], ledger: Any) -> None:
        import ray
        import torch

        if version != VERSION:
            raise RuntimeError(
                f"a node has another lorafind (its signatures are of version {VERSION}, those of "
                f"the index of {version}): install the same one on every node"
            )
        self.device = torch.device("cpu")
        self.allow_pickle = allow_pickle
        self.known: np.ndarray = ray.get(known[0])
        self.ledger = ledger

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        """A column of pickled Reads → one of pickled results, empty for a block begun too often."""
        import pyarrow
        import ray

        reads = [pickle.loads(read.as_py()) for read in block["read"]]
        if ray.get(self.ledger.begin.remote(block["block"][0].as_py())) > TRIES:
            reads = []
        with workers(reads, self.device, self.allow_pickle, self._is_known, cores=1) as results:
            rows = [pickle.dumps(done, pickle.HIGHEST_PROTOCOL) for done in results]
        return pyarrow.table({"done": pyarrow.array(rows, pyarrow.large_binary())})

    def _is_known(self, content: str) -> bool:
        text = np.bytes_(content)
        place = int(np.searchsorted(self.known, text))
        return place < len(self.known) and bool(self.known[place] == text)


@contextmanager
def examined(
    reads: Sequence[Read],
    contents: Mapping[str, int],
    idle: Callable[[], None],
    allow_pickle: bool,
    address: str | None = None,
) -> Iterator[Iterator[Examined]]:
    """Results for every file, as they are finished on the cluster (an Engine).

    address: see :func:`lorafind.index.engines.choose`. Raises IndexProblem where the cluster
    cannot be reached or gives up.
    """
    with cluster(address) as cpus:
        import ray

        # One copy per node, which all of its actors look into where it lies.
        known = ray.put(np.array(sorted(contents), "S64"))
        ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()
        with closing(_all(reads, cpus, (VERSION, allow_pickle, [known], ledger), idle)) as results:
            yield results


def _all(
    reads: Sequence[Read], cpus: int, arguments: tuple[Any, ...], idle: Callable[[], None]
) -> Generator[Examined, None, None]:
    numbers = count()
    lost: dict[Found, Read] = {}
    for begin in range(0, len(reads), ROUND):
        sent = reads[begin : begin + ROUND]
        most = min(BLOCK_FILES, 1 + len(sent) // (4 * cpus))
        lost |= {read.found: read for read in sent}
        for done in _stream(_blocks(sent, most, numbers), cpus, arguments, idle):
            del lost[done.found]
            yield _seen(done)
    for done in _stream(_blocks(lost.values(), 1, numbers), cpus, arguments, idle):
        del lost[done.found]
        yield _seen(done)
    for read in lost.values():
        yield _given_up(read)


def _blocks(reads: Iterable[Read], most: int, numbers: Iterator[int]) -> dict[int, list[Read]]:
    """Number → at most so many reads in their order."""
    blocks: dict[int, list[Read]] = {}
    block: list[Read] = []
    size = BLOCK_BYTES
    for read in reads:
        if size >= BLOCK_BYTES or len(block) == most:
            block = blocks[next(numbers)] = []
            size = 0
        block.append(read)
        size += read.found.size
    return blocks


def _seen(done: Examined) -> Examined:
    """What a node could not reach, told from what nobody can."""
    if done.outcome in UNSEEN and os.access(done.found.full, os.R_OK):
        reason = (
            f"{done.reason}, on the node that was to read it: every node must see the files under "
            "the same paths"
        )
        return replace(done, reason=reason)
    return done


def _given_up(read: Read) -> Examined:
    from lorafind.index.examine import Examined

    name = os.path.basename(os.fsdecode(read.found.full))
    reason = (
        f"each of the {2 * TRIES} Ray workers that were to read {name} died: it may need more "
        "memory than a worker has"
    )
    return Examined(read.found, read.links, "failed", reason, None, None, time.time_ns(), None)


def _stream(
    blocks: dict[int, list[Read]],
    cpus: int,
    arguments: tuple[Any, ...],
    idle: Callable[[], None],
) -> Iterator[Examined]:
    """The results of all blocks that were not begun too often."""
    if not blocks:
        return
    done: queue.Queue[list[Examined] | BaseException | None] = queue.Queue(2)
    stop = threading.Event()

    def put(item: list[Examined] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return done.put(item, timeout=IDLE_SECONDS)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for table in _tables(blocks, cpus, arguments):
                put([pickle.loads(row.as_py()) for row in table["done"]])
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    # Ray's iterator cannot wait for a while only; and it must not be left by an exception.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            try:
                result = done.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                idle()
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise _problem(result) from result
            yield from result
    finally:
        stop.set()
        thread.join(PATIENCE)


def _tables(
    blocks: dict[int, list[Read]], cpus: int, arguments: tuple[Any, ...]
) -> Iterator[pyarrow.Table]:
    """One run of Ray Data."""
    import pyarrow
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    tables = [
        pyarrow.table({"block": [n] * len(block), "read": [pickle.dumps(read) for read in block]})
        for n, block in blocks.items()
    ]
    with ray.data.DataContext.current(context):
        results = ray.data.from_arrow(tables).map_batches(
            Examiner,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(cpus, len(blocks))),
            num_cpus=1,
        )
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow")


def _problem(error: BaseException) -> BaseException:
    """A sentence for what Ray says in many lines."""
    import ray.exceptions

    if not isinstance(error, ray.exceptions.RayError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return IndexProblem(
        f"Ray gave up: {lines[-1] if lines else type(error).__name__}. What was finished is kept: "
        "run the same command again."
    )

"""A pool of threads that examines files: one machine's engine, and what each Ray actor runs."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafind.files.safetensors import STREAM_ABOVE

if TYPE_CHECKING:
    import torch

    from lorafind.index.examine import Examined
    from lorafind.index.reconcile import Read

#: Bytes of file data in flight, all files together.
BUDGET = 320 * 2**20
#: Seconds without a result after which the caller may do something else.
IDLE_SECONDS = 1.0
#: Seconds after which an interrupted run no longer waits for its readers.
PATIENCE = 10.0


@contextmanager
def workers(
    reads: Sequence[Read],
    device: torch.device,
    allow_pickle: bool,
    is_known: Callable[[str], bool],
    linear: bool = False,
    idle: Callable[[], None] | None = None,
    cores: int | None = None,
) -> Iterator[Iterator[Examined]]:
    """Results of :func:`examine` in the order in which they are finished.

    is_known: content → True where the index holds its signature. linear: see :func:`examine`.
    idle: called in this thread once in IDLE_SECONDS while none is finished. cores: all by default.

    One thread more than cores read and hash (both leave the interpreter free); at most one
    per core, or one for a GPU, does arithmetic, each on one thread of its own.
    """
    import torch

    from lorafind.index.examine import Buffers, examine

    cores = cores or os.cpu_count() or 1
    gate = threading.BoundedSemaphore(cores if device.type == "cpu" else 1)
    buffers = Buffers(BUDGET)
    todo: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Examined | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() and (read := todo.get()) is not None:
            # Beside a file that is streamed, perhaps from a slow drive, others go on.
            size = BUDGET // 2 if read.found.size > STREAM_ABOVE else read.found.size
            buffer = buffers.take(size)
            try:
                done.put(
                    examine(
                        read.found,
                        read.links,
                        device=device,
                        allow_pickle=allow_pickle,
                        buffer=buffer,
                        gate=gate,
                        is_known=is_known,
                        linear=linear,
                    )
                )
            except BaseException as error:
                done.put(error)
            finally:
                buffers.give(size, buffer)

    def results() -> Iterator[Examined]:
        for _ in reads:
            while (result := _next(done)) is None:
                if idle is not None:
                    idle()
            if isinstance(result, BaseException):
                raise result
            yield result

    for read in reads:
        todo.put(read)
    count = min(cores + 1, 16, len(reads))
    for _ in range(count):
        todo.put(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    try:
        for thread in pool:
            thread.start()
        yield results()
    finally:
        stop.set()
        for _ in pool:
            todo.put(None)
        # Where all is done they are at their end; where not, one may wait for a drive that hangs.
        deadline = time.monotonic() + PATIENCE
        for thread in pool:
            thread.join(max(0.0, deadline - time.monotonic()))
        torch.set_num_threads(threads)


def _next(
    done: queue.SimpleQueue[Examined | BaseException],
) -> Examined | BaseException | None:
    """The next result, None after IDLE_SECONDS without one."""
    try:
        return done.get(timeout=IDLE_SECONDS)
    except queue.Empty:
        return None

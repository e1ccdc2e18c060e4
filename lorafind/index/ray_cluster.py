"""The Ray cluster of a run: joined, or started here and shut down at the end, quietly."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from lorafind.index.problem import IndexProblem

#: Bytes that a cluster of our own holds of files' results; Ray would take a third of the memory.
OBJECTS = 512 * 2**20
#: How long the head of a cluster may take to answer.
KNOCK_SECONDS = 10.0
#: Ray's threads in this process, which print what happens to the cluster.
THREADS = "ray_"


@contextmanager
def cluster(address: str | None = None) -> Iterator[int]:
    """Join a cluster for the time of the block; gives the number of its CPUs.

    address: see :func:`lorafind.index.engines.choose`. Where this process is in a cluster already,
    that is used and stays. Raises IndexProblem where there is none at the address.
    """
    import ray

    with redirect_stdout(_WithoutRay(sys.stdout)):
        joined = ray.is_initialized()
        try:
            if not joined:
                _join(address or os.environ.get("RAY_ADDRESS") or "local")
            yield max(1, int(ray.cluster_resources().get("CPU", 1)))
        finally:
            if not joined:
                ray.shutdown()


def _join(address: str) -> None:
    # Nothing is reported to anyone; read when a cluster starts.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's own part in C++ writes to the standard error below Python, in a file else.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    _knock(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECTS}
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        with _without_stderr():
            ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address == "auto":
            raise IndexProblem(
                "No Ray cluster runs on this machine: start one with `ray start --head`, or leave "
                "out --ray-address."
            ) from error
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "No Ray cluster can be started here"
        if address != "local":
            what = f"The Ray cluster {address} cannot be joined"
        raise IndexProblem(f"{what}: {said}") from error
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        # Its file in the folder of the session goes on.
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)


def _knock(address: str) -> None:
    """Raises IndexProblem where nobody answers at host:port; Ray would try on for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise IndexProblem(
            f"The Ray cluster {address} cannot be joined: {error.strerror or error}."
        ) from error


@contextmanager
def _without_stderr() -> Iterator[None]:
    """File descriptor 2 leads nowhere during the block, whoever writes to it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _WithoutRay:
    """A standard output on which Ray's threads, which write there what they notice, do not write.

    Results of a command go to the same output, and no option of Ray keeps it off.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        """Write, but for Ray."""
        if threading.current_thread().name.startswith(THREADS):
            return len(text)
        return self._out.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

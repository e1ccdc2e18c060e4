"""What examines the files of a run: the threads of this process, or the actors of a Ray cluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lorafind.index.reconcile import Read

if TYPE_CHECKING:
    from lorafind.index.examine import Examined

LOCAL, RAY = "local", "ray"

#: (files to read, content → id of what the index holds, called about once a second while nothing
#: is finished) → a block that gives the results in the order in which they are finished, one for
#: every file; leaving the block ends the work.
Engine = Callable[
    [Sequence[Read], Mapping[str, int], Callable[[], None]],
    AbstractContextManager[Iterator["Examined"]],
]


def choose(name: str, device: str, allow_pickle: bool, address: str | None = None) -> Engine:
    """The engine of a name; what it works with is imported when there is a file to read.

    address: of a Ray cluster, ``auto`` for the one of this machine; without it that of
    RAY_ADDRESS, else a cluster on this machine for the time of the run. Raises ValueError for a
    name, device or address that does not fit, ModuleNotFoundError where Ray is not installed.
    """
    if name == LOCAL:
        if address is not None:
            raise ValueError("a Ray address needs the engine ray")

        def here(
            reads: Sequence[Read], contents: Mapping[str, int], idle: Callable[[], None]
        ) -> AbstractContextManager[Iterator[Examined]]:
            # Torch takes a second to import: a run without anything to read does without it.
            from lorafind.index.workers import workers
            from lorafind.signatures import device as devices

            on = devices.choose(device)
            return workers(reads, on, allow_pickle, contents.__contains__, idle=idle)

        return here
    if name != RAY:
        raise ValueError(f"there is no engine {name!r}: use {LOCAL} or {RAY}")
    if device not in ("auto", "cpu"):
        raise ValueError(f"the engine ray computes on CPUs: leave out the device {device}")
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    def on_ray(
        reads: Sequence[Read], contents: Mapping[str, int], idle: Callable[[], None]
    ) -> AbstractContextManager[Iterator[Examined]]:
        from lorafind.index.ray_engine import examined

        return examined(reads, contents, idle, allow_pickle, address)

    return on_ray

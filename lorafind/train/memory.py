"""What a training holds in memory, and words for where there is not enough."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings

# malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """While it lasts, memory that one step frees stays with the process for the next.

    Otherwise the GNU C library gives large activations back to the kernel at every step, and a
    fifth to a third of a step on the CPU goes into clearing their pages anew. Does nothing with
    another device or another C library.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    for option, value in _KEEPING.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(ctypes.c_size_t(0))


@contextmanager
def enough_memory(settings: Settings, runs: int = 1) -> Iterator[None]:
    """Raises TrainProblem, which says what to lower, where memory runs out; runs: LoRAs at once."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        ways = {
            "train fewer at once (--parallel)": runs > 1,
            "turn on gradient checkpointing (--gradient-checkpointing)": (
                not settings.gradient_checkpointing
            ),
            "train in bf16 (--precision bf16)": settings.precision == "fp32",
            "take a smaller batch (--batch-size)": settings.batch_size > 1,
            "do without class images (--prior-weight 0)": settings.prior_weight > 0,
            "train at a lower resolution (--resolution)": settings.resolution > 256,
        }
        advice = ", or ".join(way for way, left in ways.items() if left) or "free some memory"
        raise TrainProblem(f"There is not enough memory for this training: {advice}.") from error


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # What the CPU's allocator raises has no type of its own.
    return "alloc" in str(error) and "memory" in str(error)

"""Out of memory, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings


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

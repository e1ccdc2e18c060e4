"""An exponential moving average of the trained numbers."""

from __future__ import annotations

from torch import Tensor


def average(mean: Tensor, values: Tensor, decay: float, step: int) -> None:
    """Move ``mean`` towards ``values`` in place, after a step (from 0).

    mean ← d·mean + (1 − d)·values, d = min(decay, (1 + step)/(10 + step)): without this start an
    average of a short run would be mostly the untrained beginning.
    """
    mean.lerp_(values, 1 - min(decay, (1 + step) / (10 + step)))

"""Which device does the arithmetic; one code path for all."""

from __future__ import annotations

import torch


def choose(name: str = "auto") -> torch.device:
    """``auto`` | ``cpu`` | ``cuda`` | ``mps`` → a device that is there.

    Raises ValueError when a device is asked for that this machine (or this PyTorch) lacks.
    """
    # MPS has no float64, which norms are summed in; it is used only when asked for by name and
    # refused below where that matters.
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("there is no MPS device here; use --device cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda or mps")
    return torch.device(name)

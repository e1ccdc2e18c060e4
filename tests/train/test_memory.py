"""Memory that stays between the steps of a training."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from lorafind.train.memory import memory_kept

#: Bytes of a tensor, more than the GNU C library ever keeps by itself.
LARGE = 64 << 20


def faults(times: int) -> int:
    """Pages that the kernel clears while a large tensor is made and dropped so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(LARGE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
def test_pages_are_cleared_once() -> None:
    """Not at every step; and they are given back when the training is over."""
    faults(1)
    once = faults(1)
    assert faults(4) > 3 * once
    with memory_kept(torch.device("cpu")):
        faults(8)
        assert faults(8) < once
        held = resident()
    assert held - resident() > LARGE / 2


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
def test_other_devices_have_their_own_allocator() -> None:
    """Nothing changes for the host's memory where the training is on a GPU."""
    faults(1)
    once = faults(1)
    with memory_kept(torch.device("cuda")):
        assert faults(4) > 3 * once

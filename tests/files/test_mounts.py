"""Filesystem types from mountinfo (lines as in proc(5))."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorafind.files import mounts

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 27 0:40 / /mnt/my\040nas rw,relatime shared:2 master:1 - nfs4 host:/export rw,vers=4.2
31 27 0:41 / /mnt/cloud rw - fuse.rclone remote: rw
32 27 8:17 / /mnt rw - xfs /dev/sdb1 rw
33 27 8:18 / /mnt/cloud rw - btrfs /dev/sdc1 rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (b"/", "ext4"),
        (b"/home/a", "ext4"),
        (b"/mnt/my nas", "nfs4"),
        (b"/mnt/my nas/loras", "nfs4"),
        (b"/mnt/my nasty", "xfs"),
        (b"/mnt/cloud/x", "btrfs"),
        (b"/proc/1", "proc"),
    ],
)
def test_the_deepest_and_latest_mount_counts(path: bytes, kind: str) -> None:
    assert mounts.kind_of(path, mounts.parse(MOUNTINFO)) == kind


def test_no_mounts_no_answer() -> None:
    assert mounts.kind_of(b"/x", []) == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells it in /proc")
def test_the_running_system_is_understood(tmp_path: Path) -> None:
    assert mounts.filesystem("/proc") == "proc"
    assert mounts.filesystem(tmp_path)
    assert not mounts.stable_inodes("/proc")

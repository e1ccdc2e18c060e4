"""The rules of reconcile.py, one by one, on rows in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from lorafind.files.scan import Found, ScanReport, Target
from lorafind.index.reconcile import Decisions, Link, Move, maybe_two_mounts, pruning, reconcile
from lorafind.index.rows import Known
from tests.index.make import OLD, found, known

ROOT = b"/r"


def decide(
    rows: Iterable[Known],
    items: Sequence[Found],
    report: ScanReport | None = None,
    targets: Sequence[Target] = (Target(ROOT), Target(b"/q")),
    devices: dict[bytes, int | None] | None = None,
    probes: dict[bytes, bytes] | None = None,
    stable: bool = True,
) -> Decisions:
    """Decide, where a probe that ``probes`` does not allow is an error of the test."""

    def probe(item: Found) -> bytes:
        assert probes is not None, "probed without need"
        if item.path not in probes:
            raise PermissionError(item.path)
        return probes[item.path]

    report = report or ScanReport()
    report.stable.update({item.device: stable for item in items})
    for root in {item.root for item in items}:
        report.roots.setdefault(root, 1)
    return reconcile(
        rows,
        items,
        report,
        targets,
        {ROOT: 1, b"/q": 1} if devices is None else devices,
        version=1,
        probe=probe,
    )


def whys(decisions: Decisions) -> dict[bytes, str]:
    return {read.found.path: read.why for read in decisions.read}


A, B = found(b"a.safetensors"), found(b"b.safetensors")


def test_unchanged() -> None:
    rows = [known(A, 1), known(B, 2)]
    assert decide(rows, [A, B]) == Decisions(unchanged=rows)


def test_new() -> None:
    assert whys(decide([], [A])) == {A.path: "new"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": 999}, "changed"),
        ({"mtime_ns": OLD - 1}, "changed"),
        ({"inode": 5}, "changed"),
        ({"status": "pickle", "sha256": None}, "changed"),
        ({"status": "not-a-file", "sha256": None}, "changed"),
        ({"status": "changing"}, "retry"),
        ({"status": "inaccessible"}, "retry"),
        ({"version": 0}, "version"),
        ({"read_ns": OLD + 1_999_999_999}, "recent"),
        ({"read_ns": OLD - 1_999_999_999}, "recent"),
    ],
)
def test_why_a_file_is_read_again(change: dict[str, Any], why: str) -> None:
    assert whys(decide([known(A, 1, **change)], [A])) == {A.path: why}


@pytest.mark.parametrize(
    "change", [{"read_ns": OLD + 2_000_000_000}, {"status": "checkpoint", "sha256": None}]
)
def test_why_a_file_is_not_read_again(change: dict[str, Any]) -> None:
    rows = [known(A, 1, **change)]
    assert decide(rows, [A]).unchanged == rows


def test_an_inode_counts_only_where_it_is_stable() -> None:
    row = known(A, 1, inode=5)
    assert whys(decide([row], [A], stable=True)) == {A.path: "changed"}
    assert decide([row], [A], stable=False).refreshed == [Link(A, row)]


@pytest.mark.parametrize(
    "change", [{"ctime_ns": 1}, {"device": 9}, {"presence": "gone"}, {"presence": "offline"}]
)
def test_rows_that_hold_are_refreshed_without_reading(change: dict[str, Any]) -> None:
    row = known(A, 1, **change)
    assert decide([row], [A]) == Decisions(refreshed=[Link(A, row)])


def test_gone_only_below_what_was_scanned() -> None:
    inside, beside, other = found(b"x/a.safetensors"), found(b"xa.safetensors"), found(b"c", b"/q")
    rows = [known(item, k) for k, item in enumerate((inside, beside, other))]
    decisions = decide(rows, [], targets=[Target(ROOT, b"x")])
    assert decisions == Decisions(gone=[rows[0]])


def test_what_was_gone_before_stays_so_silently() -> None:
    assert decide([known(A, 1, presence="gone")], []) == Decisions()


def test_a_rename_is_not_read() -> None:
    row = known(A, 1)
    decisions = decide([row], [B], probes={B.path: b"s"})
    assert decisions == Decisions(moved=[Move(row, B, None)])


def test_a_move_across_roots_and_drives() -> None:
    row = known(A, 1)
    there = found(b"deep/c.safetensors", b"/q", device=2, ctime_ns=OLD + 5)
    assert decide([row], [there], probes={there.path: b"s"}).moved == [Move(row, there, None)]
    # Gone since an earlier run, from a root that is not scanned now.
    row = known(A, 1, presence="gone")
    decisions = decide([row], [there], targets=[Target(b"/q")], probes={there.path: b"s"})
    assert decisions == Decisions(moved=[Move(row, there, None)])


def test_a_move_onto_a_known_path_replaces_its_row() -> None:
    rows = [known(A, 1, "a"), known(B, 2, "b", size=77)]
    decisions = decide(rows, [B], probes={B.path: b"a"})
    assert decisions == Decisions(moved=[Move(rows[0], B, rows[1])])


@pytest.mark.parametrize(
    "row",
    [
        known(A, 1, size=999),
        known(A, 1, probe=None),
        known(A, 1, version=0),
        known(A, 1, status="changing"),
        known(A, 1, read_ns=OLD),
        known(A, 1, path=b"a.ckpt"),
        known(A, 1, root=b"/unscanned"),
    ],
)
def test_no_probe_where_a_move_is_out_of_question(row: Known) -> None:
    assert whys(decide([row], [B])) == {B.path: "new"}


def test_another_probe_or_none_is_no_move() -> None:
    for probes in ({B.path: b"other"}, {}):
        decisions = decide([known(A, 1)], [B], probes=probes)
        assert whys(decisions) == {B.path: "new"}
        assert [row.id for row in decisions.gone] == [1]


def test_a_copy_beside_its_original_is_read() -> None:
    decisions = decide([known(A, 1)], [A, B])
    assert whys(decisions) == {B.path: "new"}


def test_two_candidates_must_agree() -> None:
    new = found(b"n.safetensors", mtime_ns=OLD + 7)
    rows = [known(A, 1, "1", probe=b"p"), known(B, 2, "2", probe=b"p")]
    assert whys(decide(rows, [new], probes={new.path: b"p"})) == {new.path: "new"}
    rows[1] = rows[1]._replace(mtime_ns=OLD + 7)
    assert decide(rows, [new], probes={new.path: b"p"}).moved == [Move(rows[1], new, None)]
    rows = [known(A, 1, "1", probe=b"p"), known(B, 2, "1", probe=b"p")]
    second = found(b"m.safetensors")
    decisions = decide(rows, [new, second], probes={new.path: b"p", second.path: b"p"})
    assert decisions.moved == [Move(rows[0], new, None), Move(rows[1], second, None)]
    assert not decisions.gone and not decisions.read


def test_one_row_moves_once() -> None:
    row, other = known(A, 1), found(b"c.safetensors")
    decisions = decide([row], [B, other], probes={B.path: b"s", other.path: b"s"})
    assert [move.found for move in decisions.moved] == [B]
    assert whys(decisions) == {other.path: "new"}


def test_links_are_one_file_read_once() -> None:
    link = found(b"0.safetensors", inode=A.inode, is_link=True)
    hard = found(b"z.safetensors", inode=A.inode)
    (read,) = decide([], [link, A, hard]).read
    assert (read.found, set(read.links)) == (A, {link, hard})


def test_a_link_to_a_known_file_is_not_read() -> None:
    row, link = known(A, 1), found(b"0.safetensors", inode=A.inode)
    decisions = decide([row], [link, A])
    assert decisions == Decisions(linked=[Link(link, row)], unchanged=[row])


def test_links_of_a_moved_file_follow_it() -> None:
    row, link = known(A, 1), found(b"c.safetensors", inode=B.inode)
    decisions = decide([row], [B, link], probes={B.path: b"s"})
    assert decisions == Decisions(moved=[Move(row, B, None)], linked=[Link(link, row)])


@pytest.mark.parametrize(
    "change",
    [{"inode": 0}, {"device": 2}, {"size": 999}, {"mtime_ns": 3}, {"path": b"z.pt"}],
)
def test_what_is_no_link(change: dict[str, Any]) -> None:
    first = A._replace(inode=0) if change == {"inode": 0} else A
    other = found(b"z.safetensors", inode=first.inode)._replace(**change)
    assert len(decide([], [first, other]).read) == 2


def test_refused_paths_are_recorded_once() -> None:
    item = A._replace(outcome="not-a-file", reason="it is a folder")
    assert decide([], [item]) == Decisions(refused=[item])
    row = known(item, 1, status="not-a-file", reason="it is a folder", sha256=None, lora_id=None)
    assert decide([row], [item]) == Decisions(unchanged=[row])
    assert decide([row._replace(reason="it is a socket")], [item]) == Decisions(refused=[item])


def test_a_lora_whose_link_dangles_is_gone_not_replaced() -> None:
    row = known(A, 1)
    item = Found(*A[:2], 0, 0, 0, 0, 0, outcome="not-a-file", reason="dangling")
    assert decide([row], [item]) == Decisions(gone=[row])
    denied = item._replace(outcome="inaccessible")
    report = ScanReport(unreachable={b"/r/a.safetensors": "Permission denied"})
    ((offline, why),) = decide([row], [denied], report).offline
    assert offline == row and "Permission denied" in why


def test_a_pickle_that_was_read_stays_while_it_is_the_same() -> None:
    item = found(b"p.pt", outcome="pickle", reason="needs --allow-pickle")
    row = known(item, 1)
    assert decide([row], [item]) == Decisions(unchanged=[row])
    assert decide([row], [item._replace(size=5)]).refused == [item._replace(size=5)]


def test_an_unreachable_root_is_offline() -> None:
    rows = [known(A, 1), known(B, 2, presence="offline"), known(found(b"c"), 3, presence="gone")]
    decisions = decide(rows, [], ScanReport(missing={ROOT: "it does not exist"}))
    assert decisions == Decisions(
        offline=[(rows[0], "it does not exist")], roots={ROOT: "it does not exist"}
    )


def test_an_empty_root_is_offline() -> None:
    row = known(A, 1)
    decisions = decide([row], [], ScanReport(empty={ROOT: 1}, roots={ROOT: 1}))
    assert [item for item, _ in decisions.offline] == [row]
    assert "empty" in decisions.roots[ROOT]
    # Empty from the start, or emptied and pruned: nothing to say.
    assert decide([], [], ScanReport(empty={ROOT: 1}, roots={ROOT: 1})) == Decisions()


def test_another_file_system_without_a_known_file_is_offline() -> None:
    row = known(A, 1)
    here = found(b"readme.safetensors", device=2, outcome="pickle")
    report = ScanReport(roots={ROOT: 2})
    assert decide([row], [], report).offline
    assert decide([row], [], ScanReport(roots={ROOT: 1})).gone == [row]
    # One of its files is there: it is the root.
    decisions = decide([row, known(here, 2, status="pickle", sha256=None)], [here], report)
    assert decisions.gone == [row]


def test_an_unmounted_folder_inside_a_root_is_offline() -> None:
    inside = known(found(b"nas/x/c.safetensors", device=7), 1)
    for empty, offline in ((1, True), (7, False)):
        decisions = decide([inside, known(A, 2)], [A], ScanReport(empty={b"/r/nas": empty}))
        assert bool(decisions.offline) is offline
        assert bool(decisions.gone) is not offline
        assert not decisions.roots


def test_files_below_an_unreadable_folder_are_offline() -> None:
    inside = known(found(b"x/y/c.safetensors"), 1)
    report = ScanReport(unreachable={b"/r/x": "Permission denied"})
    decisions = decide([inside, known(B, 2)], [], report)
    assert [row.id for row, _ in decisions.offline] == [1]
    assert [row.id for row in decisions.gone] == [2]
    decisions = decide([inside], [], ScanReport(unreachable={ROOT: "Input/output error"}))
    assert "Input/output error" in decisions.roots[ROOT]


def test_offline_files_are_no_candidates_for_a_move() -> None:
    there = found(b"n.safetensors", b"/q")
    decisions = decide([known(A, 1)], [there], ScanReport(missing={ROOT: "away"}))
    assert whys(decisions) == {there.path: "new"}


def test_a_single_file_root() -> None:
    item = Found(b"/d/a.safetensors", b"", *A[2:])
    row = known(item, 1)
    targets = [Target(item.root, single=True)]
    assert decide([row], [item], targets=targets).unchanged == [row]
    assert decide([row], [], targets=targets).gone == [row]
    unmounted = ScanReport(empty={b"/d": 99})
    assert [r for r, _ in decide([row], [], unmounted, targets).offline] == [row]


def test_pruning_holds_back_roots_of_which_over_half_is_gone() -> None:
    def rows(root: bytes, gone: int, here: int, offline: int = 0) -> list[Known]:
        presences = ["gone"] * gone + ["here"] * here + ["offline"] * offline
        return [
            known(found(b"%d" % k, root), k, presence=presence)
            for k, presence in enumerate(presences)
        ]

    some, half, most, away = (
        rows(b"/some", 1, 9),
        rows(b"/half", 5, 5),
        rows(b"/most", 6, 5),
        rows(b"/away", 0, 0, 4),
    )
    all_rows = [*some, *half, *most, *away]
    result = pruning(all_rows)
    assert result.remove == [*some[:1], *half[:5]]
    assert result.held == {b"/most": (6, 11)}
    forced = pruning(all_rows, force=True)
    assert forced.remove == [*some[:1], *half[:5], *most[:6]]
    assert forced.held == {}


def test_one_file_on_two_mounts_is_suspected() -> None:
    first = known(A, 1)
    second = known(found(b"a", b"/q", device=2), 2)
    apart = [
        known(found(b"b", b"/q", device=2, ctime_ns=1), 3),
        known(found(b"c", b"/q", device=2, size=1), 4),
        known(found(b"d", b"/q", device=2), 5, presence="gone"),
        known(found(b"e", size=1, inode=4), 6),
        known(found(b"f", size=2), 7),
        known(found(b"g", size=2), 8),
    ]
    apart[0] = apart[0]._replace(size=5)
    apart[1] = apart[1]._replace(size=6)
    assert maybe_two_mounts([first, second, *apart]) == [[first, second]]

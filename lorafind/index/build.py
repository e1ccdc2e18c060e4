"""``index``: from folders to an up-to-date index, read ahead of the arithmetic."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorafind.files.place import beside, state
from lorafind.files.scan import Found, ScanReport, join, probe, scan
from lorafind.index import engines
from lorafind.index import shard as shards
from lorafind.index.classes import series_of
from lorafind.index.finish import finish
from lorafind.index.progress import Progress, Silent
from lorafind.index.reconcile import Decisions, Read, pruning, reconcile
from lorafind.index.rows import FileFacts, Known, LoraFacts
from lorafind.index.store import Store
from lorafind.signatures.constants import VERSION

if TYPE_CHECKING:
    from lorafind.index.examine import Examined, Lora

#: A batch is committed after this many seconds.
COMMIT_SECONDS = 1.0


@dataclass(frozen=True)
class Refused:
    """A file that is in the index with its reason instead of a signature."""

    path: bytes
    outcome: str
    reason: str


@dataclass
class Summary:
    """What one run of ``index`` did; the counts are paths.

    refreshed: read again (changed, or by a newer version); moved: known content at a new path,
    not read; linked: further paths to a file; offline: root or folder → why; held: roots of which
    over half is gone, so that ``--prune`` left them alone → (gone, all). elsewhere: files of other
    shards.
    """

    added: int = 0
    refreshed: int = 0
    unchanged: int = 0
    moved: int = 0
    linked: int = 0
    gone: int = 0
    pruned: int = 0
    refused: list[Refused] = field(default_factory=list)
    known_refused: int = 0
    passed: int = 0
    elsewhere: int = 0
    unreachable: dict[bytes, str] = field(default_factory=dict)
    offline: dict[bytes, str] = field(default_factory=dict)
    held: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    relations: int = 0
    seconds: float = 0.0
    bytes: int = 0


def build(
    store: Store,
    paths: Sequence[str | bytes | os.PathLike[str]] = (),
    *,
    device: str = "auto",
    allow_pickle: bool = False,
    prune: bool = False,
    force_prune: bool = False,
    relate: bool = True,
    engine: str = "local",
    ray_address: str | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Bring the index up to date with the folders and files (all known roots for none).

    device: see :func:`lorafind.signatures.device.choose`. prune: forget files that are gone (roots
    of which over half is gone only with force_prune). relate: prove relations and fit bases now.
    engine, ray_address: see :func:`lorafind.index.engines.choose`. shard: (number from 1, parts)
    of :class:`lorafind.index.shard.Shard`; only its files are looked at, and nothing is related.
    Raises IndexProblem, ValueError for an engine, device or shard that there is not; every
    finished file is kept whatever ends the run.
    """
    began = time.monotonic()
    watch = progress or Silent()
    part = None if shard is None else shards.Shard(*shard).checked()
    examine = engines.choose(engine, device, allow_pickle, ray_address)
    shards.claim(store, part)
    targets = store.targets(paths)
    report = ScanReport()
    watch.stage("Looking for files", 0, 0)
    found = list(scan(targets, report, allow_pickle))
    every = len(found)
    if part is not None:
        found = [item for item in found if part.has(item)]
    known = store.known()
    if part is not None and (others := [row for row in known if not part.has(row)]):
        # A root that was taken into another has new paths, some of which other shards look at.
        store.remove_files(others)
        known = store.known()
    devices = {root.path: root.device for root in store.roots()}
    decisions = reconcile(
        known, found, report, targets, devices, VERSION, lambda item: probe(item.full)
    )
    _reconfigured(decisions, found)
    store.apply(decisions, report)
    summary = _counted(decisions, report)
    summary.elsewhere = every - len(found)
    _read_all(store, decisions.read, examine, watch, summary)
    if prune:
        rows = pruning(store.known(), force_prune)
        store.remove_files(rows.remove)
        summary.pruned, summary.held = len(rows.remove), rows.held
    store.drop_orphans()
    if relate and part is None:
        summary.relations = finish(store, watch)
    summary.seconds = time.monotonic() - began
    return summary


def _reconfigured(decisions: Decisions, found: list[Found]) -> None:
    """Read again what is unchanged, but stands beside an adapter_config.json that is newer.

    PEFT keeps alpha there, so that the same bytes then mean another ΔW.
    """
    here = {(item.root, item.path): item for item in found}
    stale = [row for row in decisions.unchanged if _config_time(row) > row.read_ns]
    decisions.unchanged = [row for row in decisions.unchanged if row not in stale]
    decisions.read += [Read(here[row.root, row.path], "changed") for row in stale]


def _config_time(row: Known) -> int:
    """mtime (ns) of the configuration that belongs to a file, 0 for none."""
    path = join(row.root, row.path)
    if not os.path.basename(path).startswith(b"adapter_model."):
        return 0
    try:
        return state(beside(path, "adapter_config.json")).st_mtime_ns
    except OSError:
        return 0


def _counted(decisions: Decisions, report: ScanReport) -> Summary:
    summary = Summary(
        unchanged=sum(row.status == "lora" for row in decisions.unchanged)
        + sum(link.of.status == "lora" for link in decisions.refreshed),
        moved=len(decisions.moved),
        linked=len(decisions.linked),
        gone=len(decisions.gone),
        passed=len(report.passed),
        unreachable=dict(report.unreachable),
        offline={**decisions.roots, **{row.root: why for row, why in decisions.offline}},
    )
    summary.refused = [Refused(item.full, item.outcome, item.reason) for item in decisions.refused]
    for row in (*decisions.unchanged, *(link.of for link in decisions.refreshed)):
        if row.status != "lora":
            path = Found(row.root, row.path, 0, 0, 0, 0, 0).full
            summary.refused.append(Refused(path, row.status, row.reason))
            summary.known_refused += 1
    return summary


def _read_all(
    store: Store,
    reads: list[Read],
    examine: engines.Engine,
    watch: Progress,
    summary: Summary,
) -> None:
    """Read, sketch and store; one transaction a second."""
    if not reads:
        return
    watch.stage("Reading", len(reads), sum(read.found.size for read in reads))
    contents = store.contents(VERSION)
    reasons = {read.found: read.why for read in reads}
    waiting: list[Examined] = []

    def write() -> None:
        _write(store, waiting, contents, reasons, watch, summary)
        waiting.clear()

    def idle() -> None:
        # A drive may be slow, or hang: what is finished is kept, and the clock goes on.
        write()
        watch.advance(0, 0)

    with examine(reads, contents, idle) as results:
        deadline = time.monotonic() + COMMIT_SECONDS
        for done in results:
            waiting.append(done)
            if time.monotonic() > deadline:
                write()
                deadline = time.monotonic() + COMMIT_SECONDS
        write()


def _write(
    store: Store,
    waiting: list[Examined],
    contents: dict[str, int],
    reasons: dict[Found, str],
    watch: Progress,
    summary: Summary,
) -> None:
    if not waiting:
        return
    fresh: dict[str, int] = {}
    with store.batch():
        for done in waiting:
            lora = None if done.lora is None else _put_lora(store, done.lora, contents, fresh)
            facts = FileFacts(
                done.outcome, VERSION, done.read_ns, done.reason, done.sha256, done.probe, lora
            )
            store.put_file(done.found, facts, done.links)
    contents.update(fresh)
    for done in waiting:
        paths = 1 + len(done.links)
        if done.lora is None:
            summary.refused += [
                Refused(item.full, done.outcome, done.reason) for item in (done.found, *done.links)
            ]
        elif reasons[done.found] == "new":
            summary.added += paths
        else:
            summary.refreshed += paths
        summary.bytes += done.found.size
    watch.advance(len(waiting), sum(done.found.size for done in waiting))


def _put_lora(store: Store, lora: Lora, contents: dict[str, int], fresh: dict[str, int]) -> int:
    known = fresh.get(lora.content) or contents.get(lora.content)
    if known is not None or lora.modules is None:
        assert known is not None
        return known
    assert lora.norms is not None and lora.identity is not None and lora.signature is not None
    old = store.conn.execute(
        "SELECT id, architecture FROM loras WHERE content = ?", (lora.content,)
    ).fetchone()
    if old is not None and old[1] != lora.architecture:
        # An older version took it for another model's: it must not stay among those.
        store.chunks.delete([old[0]])
    layout = store.put_layout(lora.architecture, lora.modules)
    facts = LoraFacts(
        content=lora.content,
        data_sha256=lora.data_sha256,
        architecture=lora.architecture,
        family=lora.family,
        spelling=lora.spelling,
        ranks=lora.ranks,
        alphas=lora.alphas,
        dtype=lora.dtype,
        effective_dtype=lora.effective_dtype,
        layout=layout,
        norm=float(lora.norms.sum(dtype="f8") ** 0.5),
        norms=lora.norms,
        version=VERSION,
        facts=lora.facts,
        notes=lora.notes,
        unknown_keys=lora.unknown_keys,
        extras=lora.extras,
    )
    number = store.put_lora(facts)
    store.put_signature(number, lora.signature)
    store.chunks.append("identity", series_of(lora.architecture), number, lora.identity)
    fresh[lora.content] = number
    return number

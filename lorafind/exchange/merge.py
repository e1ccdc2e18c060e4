"""``merge``: indexes of shards, or of several machines, united into one; by the rules of intake."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorafind.exchange.intake import Taken, close, take
from lorafind.exchange.source import IndexSource, Source
from lorafind.index.finish import finish, unfinished
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.index.shard import META
from lorafind.index.store import Store

#: The key of ``meta`` for what shards were merged: how many there are → which ones are here.
MERGED = "shards"


@dataclass
class Merged:
    """What one run of :func:`merge` did; missing: sentences about shards that nobody brought."""

    sources: list[Taken]
    missing: list[str] = field(default_factory=list)
    relations: int = 0

    @property
    def anything(self) -> bool:
        """False where the index held everything already."""
        return any(taken.anything for taken in self.sources)


@contextmanager
def opened(paths: Sequence[str | os.PathLike[str]], target: Path) -> Iterator[list[IndexSource]]:
    """Indexes to merge into the one at ``target``, which need not be there yet; each once.

    Raises IndexProblem where one of them is that index itself, is none, or is damaged.
    """
    with ExitStack() as stack:
        sources: list[IndexSource] = []
        for path in paths:
            if os.path.exists(path) and target.exists() and os.path.samefile(path, target):
                raise IndexProblem(
                    f"{path} is the index that the others are merged into: name another with --db."
                )
            source = stack.enter_context(IndexSource(path))
            if not any(os.path.samefile(source.path, other.path) for other in sources):
                sources.append(source)
        yield sources


def merge(
    store: Store,
    paths: Sequence[str | os.PathLike[str]],
    *,
    relate: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Take other indexes into this one, which is open for writing; they are only read.

    relate: prove relations and fit bases at the end, as ``index`` does. Raises IndexProblem as
    :func:`opened`, before anything is written. A run that was ended goes on where it was.
    """
    with opened(paths, store.path) as sources:
        return take_all(store, sources, relate=relate, progress=progress)


def take_all(
    store: Store,
    sources: Sequence[Source],
    *,
    relate: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Take sources into an index, in an order that does not hang on that of the arguments."""
    watch = progress or Silent()
    seen = {root.path: root.seen_ns for root in store.roots()}
    ordered = sorted(sources, key=_looked)
    done = Merged([take(store, source, seen, watch) for source in ordered])
    done.missing = _shards(store, ordered)
    if done.anything:
        close(store)
    if relate and (done.anything or unfinished(store)):
        done.relations = finish(store, watch)
    return done


def _looked(source: Source) -> tuple[int, str]:
    return max((root.seen_ns for root in source.roots()), default=0), source.label


def _shards(store: Store, sources: Sequence[Source]) -> list[str]:
    """Remember which shards are here; a sentence for each number of shards that lacks some."""
    held: dict[str, list[int]] = store.get_meta(MERGED, {})
    own = store.get_meta(META)
    found = [source.shard for source in sources if source.shard]
    if own and sources:
        found.append((own[0], own[1]))
    after = {
        str(count): sorted({*held.get(str(count), ()), *(i for i, n in found if n == count)})
        for count in {*map(int, held), *(n for _, n in found)}
    }
    if after != held or own:
        with store.batch():
            store.set_meta(MERGED, after)
            # What holds several shards is none.
            store.conn.execute("DELETE FROM meta WHERE key = ?", (META,))
    sentences = []
    for count in sorted({n for _, n in found}):
        lacking = [str(i) for i in range(1, count + 1) if i not in after[str(count)]]
        if lacking:
            names = ", ".join(lacking[:-1]) + " and " * (len(lacking) > 1) + lacking[-1]
            verb, noun = ("is", "shard") if len(lacking) == 1 else ("are", "shards")
            sentences.append(
                f"{noun} {names} of {count} {verb} missing: merge again when the index is there."
            )
    return sentences

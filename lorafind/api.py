"""The public Python API: an index as an object. The command line calls the same methods.

>>> import lorafind
>>> with lorafind.Index.open("loras.db", write=True) as index:   # doctest: +SKIP
...     index.build(["~/loras"])
...     for neighbour in index.similar("watercolour.safetensors"):
...         print(neighbour.score, neighbour.path)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lorafind.index.store import Store

if TYPE_CHECKING:
    from lorafind.bases.basis import Basis
    from lorafind.bases.use import Used
    from lorafind.clean.apply import How, Outcome
    from lorafind.clean.log import Log
    from lorafind.clean.plan import Plan, Written
    from lorafind.clean.undo import Back
    from lorafind.exchange.merge import Merged
    from lorafind.groups.sort import Group as StyleGroup
    from lorafind.groups.sort import Wishes as GroupWishes
    from lorafind.index.build import Summary
    from lorafind.index.progress import Progress
    from lorafind.index.relate import Outlook
    from lorafind.map.collect import Map
    from lorafind.map.collect import Wishes as MapWishes
    from lorafind.mix.mix import Mix
    from lorafind.mix.mix import Wishes as MixWishes
    from lorafind.search.dupes import Choice, Group
    from lorafind.search.epochs import Epoch
    from lorafind.search.ls import Filters
    from lorafind.search.query import Asked
    from lorafind.search.similar import Neighbour, Wishes
    from lorafind.search.whatis import Answer
    from lorafind.trace.origin import Trace


class Index:
    """An open index. Use it in a ``with`` block, or call :meth:`close`.

    Errors of the index are :class:`lorafind.index.problem.IndexProblem`, with a sentence for
    people; a target that holds no LoRA raises :class:`lorafind.files.outcome.NotAnAdapter`.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, write: bool = False) -> Self:
        """Open the index at ``path`` (default: LORAFIND_DB, or the user's data folder).

        write: make it where there is none, and keep other writers out. Readers never wait.
        """
        return cls(Store.open(path, "write" if write else "read"))

    def close(self) -> None:
        """Close the file and let go of its lock."""
        self.store.close()

    def __enter__(self) -> Self:
        self.store.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.store.__exit__(kind, error, trace)

    def build(
        self,
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
        """Bring the index up to date; see :func:`lorafind.index.build.build`."""
        from lorafind.index.build import build

        places = [os.path.expanduser(p) if isinstance(p, str | Path) else p for p in paths]
        return build(
            self.store,
            places,
            device=device,
            allow_pickle=allow_pickle,
            prune=prune,
            force_prune=force_prune,
            relate=relate,
            engine=engine,
            ray_address=ray_address,
            shard=shard,
            progress=progress,
        )

    def forget(self, folder: str | os.PathLike[str]) -> bool:
        """Take a folder out of the index, with the LoRAs that only it has; False for a stranger."""
        from lorafind.files.place import absolute

        path = os.fsencode(absolute(folder))
        if path not in {root.path for root in self.store.roots()}:
            return False
        self.store.forget_root(path)
        return True

    def ask(self, target: str, allow_pickle: bool = False) -> Asked:
        """Find a target by path, name or a unique part of one; a file outside is read."""
        from lorafind.search.query import ask

        return ask(self.store, target, allow_pickle)

    def similar(self, target: str | Asked, wishes: Wishes | None = None) -> Iterator[Neighbour]:
        """The LoRAs nearest in style, the nearest first."""
        from lorafind.search import similar

        asked = self.ask(target) if isinstance(target, str) else target
        return similar.similar(self.store, asked, wishes or similar.Wishes())

    def basis(self, name: str, offline: bool = False) -> Basis | str:
        """A basis for :class:`lorafind.search.similar.Wishes`.

        A name that the index knows (``own``, ``plain``, or id or name of one of its bases) stays a
        name; a file or ``hf:owner/name[@revision]`` is opened. Raises BasisProblem.
        """
        from lorafind.bases.stored import knows
        from lorafind.search.similar import PLAIN

        if name == PLAIN or knows(self.store, name):
            return name
        from lorafind.bases.use import open_basis
        from lorafind.hub.names import resolve

        return open_basis(resolve(name, offline=offline), self.store)

    def use_basis(
        self, name: str, offline: bool = False, progress: Progress | None = None
    ) -> Used | list[str]:
        """Make a basis the one in use.

        One of the index by name (returned: the architectures for which it now is), or a file or
        ``hf:owner/name[@revision]``, which is embedded first. Raises BasisProblem.
        """
        from lorafind.bases.stored import knows
        from lorafind.bases.use import choose, use

        if knows(self.store, name):
            return choose(self.store, name)
        from lorafind.hub.names import resolve

        return use(self.store, resolve(name, offline=offline), progress)

    @property
    def unfinished(self) -> bool:
        """True where :meth:`finish` has something to do before :meth:`dupes` is complete."""
        from lorafind.index.finish import unfinished

        return unfinished(self.store)

    def finish(self, progress: Progress | None = None) -> int:
        """Prove relations and fit bases for what was indexed without; new relations."""
        from lorafind.index.finish import finish
        from lorafind.index.progress import Silent

        return finish(self.store, progress or Silent())

    def dupes(self, choice: Choice | None = None) -> Iterator[Group]:
        """Groups of files that hold the same LoRA, and which of them may go."""
        from lorafind.search import dupes

        return dupes.dupes(self.store, choice or dupes.Choice())

    def whatis(self, target: str, count: int = 3, allow_pickle: bool = False) -> Answer:
        """What a file is, and what it is to the LoRAs of the index."""
        from lorafind.search.whatis import whatis

        return whatis(self.store, target, count, allow_pickle)

    def ls(self, filters: Filters | None = None) -> Iterator[dict[str, Any]]:
        """The files of the index, one row each."""
        from lorafind.search import ls

        return ls.listing(self.store, filters or ls.Filters())

    def epochs(self) -> Iterator[list[Epoch]]:
        """Series of one training run, with the files that a user would keep proposed."""
        from lorafind.search.epochs import epochs

        return epochs(self.store)

    def groups(
        self, wishes: GroupWishes | None = None, progress: Progress | None = None
    ) -> Iterator[StyleGroup]:
        """The collection sorted into groups of one style, each architecture apart."""
        from lorafind.groups import sort

        return sort.groups(self.store, wishes, progress)

    def plan(self, path: str | os.PathLike[str], choice: Choice | None = None) -> Written:
        """Write what :meth:`dupes` would let go as a plan to read and edit; CleanProblem, OSError.

        A file at ``path`` is never replaced.
        """
        from lorafind.clean import plan
        from lorafind.search import dupes

        choice = choice or dupes.Choice()
        judge = dupes.Judge(self.store, choice)
        return plan.write(Path(path), dupes.dupes(self.store, choice), choice, judge)

    def apply(
        self,
        plan: Plan | str | os.PathLike[str],
        how: How,
        protect: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Iterator[Outcome]:
        """Carry out a plan file by file; see :func:`lorafind.clean.apply.apply`.

        The index must be open for writing. Acts happen as the answer is iterated.
        """
        from lorafind.clean.apply import apply
        from lorafind.clean.plan import Plan, read

        read_plan = plan if isinstance(plan, Plan) else read(Path(plan))
        return apply(self.store, read_plan, how, protect, progress)

    def undo_logs(self) -> list[Log]:
        """What :meth:`apply` did and :meth:`undo` has not undone, the oldest run first."""
        from lorafind.clean.log import logs

        return [log for log in logs(self.store.path) if log.open]

    def undo(self, log: Log) -> Iterator[Back]:
        """Undo a run of :meth:`apply`, file by file; the index must be open for writing."""
        from lorafind.clean.undo import undo

        return undo(log)

    def trace(
        self, target: str, allow_pickle: bool = False, progress: Progress | None = None
    ) -> Trace:
        """Which LoRAs a file or an indexed LoRA was merged or resized from.

        See :func:`lorafind.trace.origin.trace`.
        """
        from lorafind.trace.origin import trace

        return trace(self.store, target, allow_pickle, progress)

    def trace_all(self, progress: Progress | None = None) -> Iterator[Trace]:
        """:meth:`trace` of every LoRA of the index, one after the other."""
        from lorafind.trace.survey import everything

        return everything(self.store, progress)

    def map(
        self,
        path: str | os.PathLike[str],
        wishes: MapWishes | None = None,
        progress: Progress | None = None,
    ) -> Map:
        """Write the LoRAs of one architecture as a map: ``.html`` (a page), ``.png`` or ``.svg``.

        Raises BasisProblem where there is no basis or a library is missing, ValueError for another
        ending.
        """
        from lorafind.map.write import write

        return write(self.store, Path(path), wishes, progress)

    def mix(
        self, target: str | Asked, wishes: MixWishes | None = None, progress: Progress | None = None
    ) -> Mix:
        """The combination of LoRAs nearest to a target; :func:`lorafind.mix.merge.merge` writes it.

        Raises IndexProblem where there is no basis over style, or nothing to combine.
        """
        from lorafind.mix import mix

        asked = self.ask(target) if isinstance(target, str) else target
        return mix.mix(self.store, asked, wishes, progress)

    def merge(
        self,
        paths: Sequence[str | os.PathLike[str]],
        relate: bool = True,
        progress: Progress | None = None,
    ) -> Merged:
        """Take other indexes into this one; see :func:`lorafind.exchange.merge.merge`.

        The index must be open for writing; the others are only read.
        """
        from lorafind.exchange.merge import merge

        return merge(self.store, paths, relate=relate, progress=progress)

    def export(
        self,
        folder: str | os.PathLike[str] | None = None,
        lancedb: str | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, int]:
        """Write the index as Parquet files into a folder, or as tables of a LanceDB database.

        Returns table → rows. Raises IndexProblem where something stands there already (with
        ``force`` only where it is not an earlier export). Tables: ``lorafind/exchange/tables.py``.
        """
        from lorafind.exchange.share import export

        return export(self.store.path, folder, lancedb, force=force, progress=progress)

    def import_(
        self,
        folder: str | os.PathLike[str] | None = None,
        lancedb: str | None = None,
        relate: bool = True,
        progress: Progress | None = None,
    ) -> Merged:
        """Take in what :meth:`export` wrote, by the rules of :meth:`merge`."""
        from lorafind.exchange.share import import_tables, source_of

        source = source_of(folder, lancedb)
        return import_tables(self.store, source, relate=relate, progress=progress)

    def outlook(self) -> list[Outlook]:
        """What has been searched for copies only, and how long comparing it in full would take."""
        from lorafind.index.relate import outlook

        return outlook(self.store)

    @property
    def compared_in_full(self) -> tuple[int, int]:
        """How many LoRAs have been compared with all others for every grade, and how many are."""
        from lorafind.index.relate import compared_in_full

        return compared_in_full(self.store)

    def compare_all(self, progress: Progress | None = None) -> int:
        """:meth:`finish` with the comparison of all LoRAs with all, however long; new relations."""
        from lorafind.index.finish import finish
        from lorafind.index.progress import Silent

        return finish(self.store, progress or Silent(), deep=True)

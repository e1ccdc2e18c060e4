"""Training the LoRAs of a data set, some at a time in one pass; what is done is not done again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorafind.train import checkpoint
from lorafind.train.cache import prepare
from lorafind.train.dataset import Lora, Share, has_same, split_of, words
from lorafind.train.loop import Failed, Output, Quiet, Run, Stopped, Watch, train_together
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.record import LABELS, RECORD, Record, write_labels
from lorafind.train.tokenizer import rare_word


@dataclass
class Outcome:
    """What a run has come to. done: files that are there, trained: those of this run; failed: file
    or artist → why; strangers: LoRAs in the folder that are not of this data set."""

    done: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)


def train_many(
    base: Base,
    shares: Sequence[Share],
    out: Path,
    watch: Watch | None = None,
    output: Output | None = None,
    *,
    parallel: int = 1,
) -> Outcome:
    """Train the LoRAs of a data set that are not there yet into a folder, with its labels.

    shares: of :func:`lorafind.train.dataset.plan`; base: with VAE and text encoder; output.force:
    train those anew that were made of other pictures, captions or settings; parallel: LoRAs in one
    pass through the U-Net. A LoRA that fails is recorded and the others go on; a training that was
    interrupted goes on from its state.

    Raises TrainProblem where files stand in the way or memory does not suffice, Stopped on Ctrl-C,
    OSError where a file cannot be written. What is done by then is done.
    """
    return _Many(base, shares, out, watch or Quiet(), output or Output(), parallel).run()


def waiting(
    base_digest: str, shares: Sequence[Share], out: Path, output: Output
) -> tuple[list[Lora], list[Lora]]:
    """The LoRAs that are to be trained, and those that are done.

    base_digest: SHA-256 of the base model. Raises TrainProblem where a file that would be written
    is there and is another one (not with output.force).
    """
    record = Record.read(out)
    todo, done = [], []
    for lora in _every(shares):
        path = out / lora.file
        known = record.loras.get(lora.file, {}).get("digest") == _digest(lora, base_digest, output)
        if path.exists() and known:
            done.append(lora)
        elif path.exists() and not output.force:
            raise TrainProblem(
                f"{path} was made of other pictures or captions, or with other settings: name "
                "another folder (-o), or train it anew (--force)."
            )
        else:
            todo.append(lora)
    if not record.loras and not output.force:
        for name in (LABELS, RECORD):
            if (out / name).exists():
                raise TrainProblem(
                    f"{out / name} is there already, but not of this data set: name another folder "
                    "(-o), or overwrite it (--force)."
                )
    return todo, done


class _Many:
    """One run of :func:`train_many`."""

    def __init__(
        self,
        base: Base,
        shares: Sequence[Share],
        out: Path,
        watch: Watch,
        output: Output,
        parallel: int,
    ) -> None:
        self._base, self._shares, self._out = base, shares, out
        self._watch, self._output, self._parallel = watch, output, parallel
        self._record = Record.read(out)
        self._captions = {
            share.artist.name: words([p for lora in share.loras for p in lora.pictures])
            for share in shares
        }
        self._outcome = Outcome(failed={s.artist.name: s.reason for s in shares if s.reason})

    def run(self) -> Outcome:
        todo, done = waiting(self._base.sha256, self._shares, self._out, self._output)
        total = len(todo) + len(done)
        self._outcome.done = [lora.file for lora in done]
        self._write()
        try:
            for start in range(0, len(todo), self._parallel):
                group = todo[start : start + self._parallel]
                at = len(done) + start + 1
                which = f"{at:,} to {at + len(group) - 1:,}" if len(group) > 1 else f"{at:,}"
                self._train(group, _Overall(self._watch, f"LoRA {which} of {total:,}"))
        except Stopped as error:
            raise Stopped(
                f"Stopped: {len(self._outcome.done):,} of {total:,} LoRAs are done, and those in "
                f"training are kept in {self._out}. The same command goes on from there."
            ) from error
        planned = {lora.file for lora in _every(self._shares)}
        self._outcome.strangers = sorted(
            file for file in set(self._record.loras) - planned if (self._out / file).exists()
        )
        return self._outcome

    def _train(self, group: Sequence[Lora], watch: Watch) -> None:
        runs: dict[str, Run] = {}
        for lora in group:
            try:
                runs[lora.file] = self._begin(lora, watch)
            except TrainProblem as error:
                self._outcome.failed[lora.file] = str(error)
        self._write()
        if not runs:
            return
        found = train_together(self._base, list(runs.values()), watch, self._output)
        for file, one in zip(runs, found, strict=True):
            if isinstance(one, Failed):
                self._outcome.failed[file] = one.reason
            else:
                self._outcome.done.append(file)
                self._outcome.trained.append(file)
        self._write()

    def _begin(self, lora: Lora, watch: Watch) -> Run:
        """Clear the way for a LoRA, and put it down in the record before it is trained."""
        token = lora.settings.token
        if token is None:
            token = rare_word(self._base.tokenizer, lora.number, self._captions[lora.artist.name])
        settings = replace(lora.settings, token=token)
        prepared = prepare(self._base, lora.pictures, settings, watch)
        out = self._out / lora.file
        out.parent.mkdir(parents=True, exist_ok=True)
        # A file that is there is another one, which may be overwritten. It goes first: a file that
        # stands in the record with the right digest is always a file with that digest.
        out.unlink(missing_ok=True)
        self._record.loras[lora.file] = {
            "digest": _digest(lora, self._base.sha256, self._output),
            "word": token,
            "pictures": [f"{lora.artist.name}/{p.path.name}" for p in lora.pictures],
        }
        try:
            checkpoint.load(out, settings, prepared, self._base.sha256)
        except TrainProblem as error:
            watch.warn(f"{out.name} is begun anew: {error}")
            checkpoint.forget(out)
        return Run(prepared, settings, out, lora.title)

    def _write(self) -> None:
        self._record.failed = dict(self._outcome.failed)
        self._record.write(self._out)
        done, same = set(self._outcome.done), has_same(self._shares)
        rows = [self._row(lora, same) for lora in _every(self._shares) if lora.file in done]
        write_labels(self._out, rows)

    def _row(self, lora: Lora, same: bool) -> dict[str, object]:
        return {
            "file": lora.file,
            "artist": lora.artist.name,
            "genre": lora.artist.genre,
            "split": split_of(lora.subset, same),
            "images": len(lora.pictures),
            "setup": lora.subset.setup,
            "seed": lora.settings.seed,
            "word": self._record.loras[lora.file]["word"],
        }


class _Overall:
    """A watch that says which LoRAs of all a stage is of."""

    def __init__(self, inner: Watch, which: str) -> None:
        self._inner, self._which = inner, which
        self.advance, self.note = inner.advance, inner.note
        self.loss, self.warn = inner.loss, inner.warn

    def stage(self, title: str, files: int, size: int) -> None:
        """See :class:`lorafind.index.progress.Progress`."""
        self._inner.stage(f"{self._which}: {title}", files, size)


def _every(shares: Sequence[Share]) -> Iterator[Lora]:
    for share in shares:
        yield from share.loras


def _digest(lora: Lora, base: str, output: Output) -> str:
    return lora.digest(base, output.spelling, str(output.dtype))

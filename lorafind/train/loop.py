"""The training: of one LoRA, or of many in one pass."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from lorafind.index.progress import Progress, Silent
from lorafind.train import checkpoint, save
from lorafind.train.cache import Prepared
from lorafind.train.checkpoint import undisturbed
from lorafind.train.engine import Engine
from lorafind.train.memory import enough_memory
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.sample import Sampler
from lorafind.train.settings import Settings

#: Seconds between two states that are kept for the case that all else fails.
EVERY = 300.0
#: Steps between two looks at the losses where a look makes the device wait.
_LOOK = 10


class Watch(Progress, Protocol):
    """Progress that also shows losses and warnings."""

    def loss(self, value: float) -> None:
        """The mean loss of the last steps, of all LoRAs in training."""

    def warn(self, sentence: str) -> None:
        """Something went wrong that does not end the training."""


class Quiet(Silent):
    """A watch that nobody looks at."""

    def loss(self, value: float) -> None:
        """Nothing."""

    def warn(self, sentence: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Run:
    """One LoRA to train. title: its name for people, inside the file; empty for none."""

    prepared: Prepared
    settings: Settings
    out: Path
    title: str = ""


@dataclass(frozen=True)
class Trained:
    """A LoRA that was trained and written. losses: of every step."""

    out: Path
    losses: Sequence[float]


@dataclass(frozen=True)
class Failed:
    """A LoRA of several that could not be trained, and why, as a sentence."""

    out: Path
    reason: str


@dataclass(frozen=True)
class Output:
    """How LoRAs are written. spelling: of SPELLINGS of the settings; force: over what is there."""

    spelling: str = "kohya"
    dtype: torch.dtype = save.DTYPE
    force: bool = False


class Stopped(KeyboardInterrupt):
    """Ctrl-C. The sentence says where the training is kept and how to go on."""


def train(
    base: Base,
    prepared: Prepared,
    settings: Settings,
    out: Path,
    watch: Watch | None = None,
    output: Output | None = None,
    *,
    resume: bool = False,
    title: str = "",
) -> Trained:
    """Train one LoRA and write it to ``out``.

    resume: go on with the training that was interrupted on its way to ``out``. Raises TrainProblem
    where it cannot begin, go on or end well, Stopped on Ctrl-C, OSError where a file cannot be
    written; what was trained so far is kept beside ``out`` in all cases but the first.
    """
    kept = checkpoint.path(out)
    if resume and not kept.is_file() and not out.exists():
        raise TrainProblem(f"There is nothing to go on with: no training is kept in {kept}.")
    if not resume and kept.is_file() and not (output and output.force):
        raise TrainProblem(
            f"A training that was interrupted is kept in {kept}: go on with it (--resume), or "
            "begin again (--force)."
        )
    (found,) = train_together(
        base, [Run(prepared, settings, out, title)], watch, output, resume=resume
    )
    if isinstance(found, Failed):
        raise TrainProblem(found.reason)
    return found


def train_together(
    base: Base,
    runs: Sequence[Run],
    watch: Watch | None = None,
    output: Output | None = None,
    *,
    resume: bool = True,
) -> list[Trained | Failed]:
    """Train several LoRAs in one pass each step; every one becomes what it would become alone.

    runs: with settings that differ in seed, token and prior prompt at most, and all with or all
    without prior examples; ValueError otherwise. resume: go on from the states that are kept. A run
    whose loss is no number is given up; the others go on. Raises as :func:`train`.
    """
    watch, output = watch or Quiet(), output or Output()
    _check(runs, output, resume)
    states = [
        checkpoint.load(run.out, run.settings, run.prepared, base.sha256) if resume else None
        for run in runs
    ]
    results: dict[Path, Trained | Failed] = {}
    # States of one pass are a step apart only if it was killed between two of them.
    steps = [state.step if state else 0 for state in states]
    for step in sorted(set(steps)):
        chosen = [i for i, at in enumerate(steps) if at == step]
        course = _Course(
            base, [runs[i] for i in chosen], [states[i] for i in chosen], step, watch, output
        )
        results |= {one.out: one for one in course.run()}
    return [results[run.out] for run in runs]


def _check(runs: Sequence[Run], output: Output, resume: bool) -> None:
    """Before anything is computed: may these be trained together, and written?"""
    alike = {replace(r.settings, seed=0, token=None, prior_prompt="x").digest() for r in runs}
    if len(alike) > 1 or len({bool(run.prepared.prior) for run in runs}) > 1:
        raise ValueError("these trainings differ in more than seed, token and prior prompt")
    for run in runs:
        if not run.prepared.instance:
            raise TrainProblem("There are no pictures to train on.")
        if not run.out.parent.is_dir():
            raise TrainProblem(f"There is no folder {run.out.parent} to write {run.out.name} to.")
        wanted = [run.out]
        if not resume:
            wanted += [numbered(run.out, k) for k in _saved_at(run.settings)]
            if beside := save.companion(run.out, output.spelling):
                wanted.append(beside)
        there = next((path for path in wanted if path.exists()), None)
        if there and not output.force:
            raise TrainProblem(f"{there} exists; choose another name, or overwrite it (--force).")


def numbered(out: Path, step: int) -> Path:
    """The file of a LoRA that is saved on the way."""
    return out.with_name(f"{out.stem}-{step:06d}{out.suffix}")


def _saved_at(settings: Settings) -> Iterator[int]:
    """The steps after which a LoRA is saved on the way."""
    if settings.save_every is not None:
        for step in range(settings.save_every, settings.steps, settings.save_every):
            if step >= settings.save_from:
                yield step


@dataclass
class _Course:
    """Some runs on their way from one step to the last."""

    base: Base
    runs: list[Run]
    states: list[checkpoint.State | None]
    step: int
    watch: Watch
    output: Output
    failed: dict[int, str] = field(default_factory=dict)

    def run(self) -> list[Trained | Failed]:
        settings = self.runs[0].settings
        self.losses = [list(state.losses) if state else [] for state in self.states]
        self.saved = [list(state.saved) if state else [] for state in self.states]
        self._unread: list[torch.Tensor] = []
        with (
            enough_memory(settings, len(self.runs)),
            Engine.on(self.base, [(run.prepared, run.settings) for run in self.runs]) as engine,
        ):
            self.engine = engine
            for j, state in enumerate(self.states):
                if state is not None:
                    engine.restore(j, state)
            self.sampler = (
                Sampler(self.base, settings.sample_prompts, settings.resolution)
                if settings.sample_prompts
                else None
            )
            begun = self.step
            try:
                self._train(settings)
            except KeyboardInterrupt as error:
                if self.step == begun:
                    raise
                self._look()
                self._keep()
                where = checkpoint.path(self.runs[0].out)
                raise Stopped(
                    f"Stopped after step {self.step} of {settings.steps}; it is kept in {where}. "
                    "Go on with the same command and --resume."
                ) from error
            except torch.OutOfMemoryError:
                if self.step > begun:
                    self._keep()
                raise
            return [self._finish(j) for j in range(len(self.runs))]

    def _train(self, settings: Settings) -> None:
        many = f" {len(self.runs)} LoRAs" if len(self.runs) > 1 else ""
        said = f"Training{many}" + (f" from step {self.step}" if self.step else "")
        self.watch.stage(said, settings.steps - self.step, 0)
        looking = 1 if self.base.device.type == "cpu" else _LOOK
        kept = time.monotonic()
        numbers = set(_saved_at(settings))
        while self.step < settings.steps and len(self.failed) < len(self.runs):
            losses = self.engine.gradients(self.step)
            with undisturbed():
                self.engine.update(self.step)
                self.step += 1
                self._unread.append(losses)
            if self.step % looking == 0:
                self._look()
            if self.step in numbers or time.monotonic() - kept > EVERY:
                self._look()
                with self._carrying_on():
                    for j in self._alive() if self.step in numbers else ():
                        self._save_numbered(j)
                    self._keep()
                kept = time.monotonic()
            if settings.sample_every and self.step % settings.sample_every == 0:
                self._sample()
            self.watch.advance(1, 0)
        self._look()
        with self._carrying_on():
            self._keep()
        if not settings.sample_every or self.step % settings.sample_every:
            self._sample()

    @contextmanager
    def _carrying_on(self) -> Iterator[None]:
        """A disk that is full now may have room again when the training ends."""
        try:
            yield
        except OSError as error:
            self.watch.warn(
                f"{error.filename} could not be written ({error.strerror}); the training goes on."
            )

    def _alive(self) -> list[int]:
        return [j for j in range(len(self.runs)) if j not in self.failed]

    def _look(self) -> None:
        """Read the losses since the last look; give up what went wrong."""
        if not self._unread:
            return
        with undisturbed():
            rows = torch.stack(self._unread).tolist()
            first = self.step - len(rows)
            self._unread.clear()
            for k, row in enumerate(rows):
                for j in self._alive():
                    self.losses[j].append(row[j])
                    if not math.isfinite(row[j]):
                        self._fail(j, f"its loss at step {first + k + 1} is {row[j]}")
        alive = self._alive()
        if alive:
            latest = [sum(row[j] for row in rows) / len(rows) for j in alive]
            self.watch.loss(sum(latest) / len(latest))

    def _fail(self, j: int, why: str) -> None:
        lower = "a lower learning rate"
        if self.runs[j].settings.precision == "fp16":
            lower += ", or in bf16 or fp32"
        self.failed[j] = (
            f"The training of {self.runs[j].out.name} was stopped: {why}. Train with {lower}."
        )

    def _keep(self) -> None:
        """The states of all that go well."""
        for j in self._alive():
            state = self.engine.state(j, self.step, self.losses[j], self.saved[j])
            if not bool(state.values.isfinite().all()):
                self._fail(j, f"its weights after step {self.step} are no numbers")
                continue
            run = self.runs[j]
            checkpoint.keep(run.out, state, run.settings, run.prepared, self.base.sha256)

    def _save(self, j: int, out: Path) -> None:
        run = self.runs[j]
        told = save.metadata(self.base, run.prepared, run.settings, self.step, run.title)
        factors = self.engine.result(j)
        save.save(out, factors, told, run.settings, self.output.spelling, self.output.dtype)

    def _save_numbered(self, j: int) -> None:
        out, most = self.runs[j].out, self.runs[j].settings.keep_last
        path = numbered(out, self.step)
        self._save(j, path)
        saved = self.saved[j] = [name for name in self.saved[j] if name != path.name]
        saved.append(path.name)
        while most is not None and len(saved) > most:
            out.with_name(saved.pop(0)).unlink(missing_ok=True)

    def _sample(self) -> None:
        if self.sampler is None:
            return
        for j in self._alive():
            run = self.runs[j]
            folder = run.out.with_name(f"{run.out.stem}-samples")
            with self.engine.showing(j):
                self.sampler.write(folder, f"{self.step:06d}", run.settings.seed)

    def _finish(self, j: int) -> Trained | Failed:
        run = self.runs[j]
        if j in self.failed:
            return Failed(run.out, self.failed[j])
        self._save(j, run.out)
        checkpoint.forget(run.out)
        return Trained(run.out, tuple(self.losses[j]))

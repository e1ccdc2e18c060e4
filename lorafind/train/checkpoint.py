"""The state of an unfinished training, in a file beside its result, and when it may be taken."""

from __future__ import annotations

import io
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafind.files.whole import whole
from lorafind.train.cache import Prepared
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings

_VERSION = 1


@dataclass
class State:
    """A training after ``step`` steps; everything random is a function of the step.

    values, mean: the numbers of its LoRA and their moving average (None without one), on the CPU;
    optimizer, scaler: their own states; losses: of every step so far; saved: LoRAs written on the
    way, by name.
    """

    step: int
    values: Tensor
    mean: Tensor | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


def path(out: Path) -> Path:
    """Where the state of the training that makes ``out`` is kept."""
    return out.with_name(out.name + ".state")


def keep(out: Path, state: State, settings: Settings, prepared: Prepared, base: str) -> None:
    """Write a state in the place of the one before it, which stays if that fails.

    base: SHA-256 of the base model. Raises OSError with the state's name.
    """
    held = {
        "version": _VERSION,
        "settings": _plain(settings),
        "pictures": prepared.digest,
        "base": base,
        **vars(state),
    }
    # torch writes through its own code, which does not tell a full disk from other failures.
    buffer = io.BytesIO()
    torch.save(held, buffer)
    with whole(path(out)) as part:
        part.write_bytes(buffer.getbuffer())


def load(out: Path, settings: Settings, prepared: Prepared, base: str) -> State | None:
    """The state of an unfinished training, None where there is none.

    Raises TrainProblem where it cannot be read or is of other settings, pictures or base model.
    """
    target = path(out)
    try:
        held = torch.load(target, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainProblem(
            f"The state {target} cannot be read; delete it and train from the beginning."
        ) from error
    if not isinstance(held, Mapping) or held.get("version") != _VERSION:
        raise TrainProblem(
            f"The state {target} is of another version of lorafind; delete it and train from the "
            "beginning."
        )
    if other := _differences(held, settings, prepared, base):
        raise TrainProblem(
            f"The training kept in {target} was made with {other}; go on as it was begun, or "
            "delete that file and train from the beginning."
        )
    names = State.__dataclass_fields__
    return State(**{name: held[name] for name in names})


def forget(out: Path) -> None:
    """The training is done."""
    path(out).unlink(missing_ok=True)


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings as torch.load takes them back."""
    found = asdict(settings)
    found["class_images"] = None
    return found


def _differences(held: Mapping[str, Any], settings: Settings, prepared: Prepared, base: str) -> str:
    if held["base"] != base:
        return "another base model"
    if held["pictures"] != prepared.digest:
        return "other pictures or captions"
    found = []
    for name, value in held["settings"].items():
        now = getattr(settings, name)
        if value != now and name != "class_images" and _counts(settings, name, value):
            found.append(f"{name} {value}, not {now}")
    return f"other settings ({'; '.join(found)})" if found else ""


def _counts(settings: Settings, name: str, value: Any) -> bool:
    """Whether another value of a setting changes the trained weights."""
    try:
        return replace(settings, **{name: value}).digest() != settings.digest()
    except TrainProblem:
        # The value does not fit the other settings, so that these differ as well.
        return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block is done: half an update is no state to go on from."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            before(signal.SIGINT, caught[0])

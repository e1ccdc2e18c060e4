"""From an exception to one sentence, the next command to try, and an exit code.

Rules name types by ``module.Class``, so that an error is recognised without importing the module
that it comes from.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lorafind.cli.output import clean


class Code(IntEnum):
    """The exit codes."""

    DONE = 0
    NOTHING = 1
    USAGE = 2
    PARTIAL = 3
    FAILED = 4
    BUG = 70
    INTERRUPTED = 130


#: what each exit code means, for the help and the README
MEANING = {
    Code.DONE: "done",
    Code.NOTHING: "nothing found (only with --exit-code)",
    Code.USAGE: "wrong use",
    Code.PARTIAL: "done, but some files could not be read",
    Code.FAILED: "could not be done; the message says why",
    Code.BUG: "an error of lorafind itself",
    Code.INTERRUPTED: "interrupted",
}

EXTRAS = {
    "accelerate": "train",
    "diffusers": "train",
    "peft": "train",
    "transformers": "images",
    "matplotlib": "plot",
    "pyarrow": "parquet",
    "lancedb": "lancedb",
    "ray": "ray",
}

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Problem:
    """What the user is told: ``sentence``, and the command to ``retry`` with, if one helps."""

    sentence: str
    code: Code
    retry: str = ""


Arguments = Sequence[str]


def explain(error: BaseException, arguments: Arguments = ()) -> Problem:
    """The problem behind an exception; ``arguments`` are those of the user, for the hint."""
    for cls in type(error).__mro__:
        rule = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule(error, arguments)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Problem(f"lorafind failed: {said}", Code.BUG, _again(arguments, "--debug"))


def report(error: BaseException, arguments: Arguments = (), *, debug: bool = False) -> Code:
    """Tell the user on stderr; with ``debug`` the traceback first. Returns the exit code."""
    problem = explain(error, arguments)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    say(problem.sentence, problem.retry)
    return problem.code


def say(sentence: str, retry: str = "") -> None:
    """One sentence on stderr and, below it, the command to try."""
    print(f"lorafind: {clean(sentence)}", file=sys.stderr)
    if retry:
        print(f"try: {clean(retry)}", file=sys.stderr)


def _again(arguments: Arguments, *added: str) -> str:
    """The user's own command with options added, unless it has them already."""
    missing = [option for option in added if option not in arguments]
    return _line(*missing, *arguments) if missing else ""


def _line(*arguments: str) -> str:
    words = ["lorafind", *arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _index_problem(error: Any, arguments: Arguments) -> Problem:
    return Problem(str(error), Code.FAILED)


def _not_an_adapter(error: Any, arguments: Arguments) -> Problem:
    unread_pickle = error.outcome == "pickle" and "--allow-pickle" not in arguments
    retry = _line(*arguments, "--allow-pickle") if unread_pickle else ""
    return Problem(str(error.reason), Code.PARTIAL, retry)


def _os_error(error: Any, arguments: Arguments) -> Problem:
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if error.errno in _DISK_FULL:
        where = f"; {name} could not be written" if name else ""
        sentence = f"The disk is full{where}. Free some space and run the same command again."
        return Problem(sentence, Code.FAILED)
    if isinstance(error, FileNotFoundError) and name:
        return Problem(f"There is no file or folder {name}.", Code.USAGE)
    if isinstance(error, PermissionError) and name:
        return Problem(f"{name} may not be opened: permission denied.", Code.FAILED)
    said = error.strerror or str(error) or type(error).__name__
    return Problem(f"{name}: {said}." if name else f"{said}.", Code.FAILED)


def _memory(error: Any, arguments: Arguments) -> Problem:
    return Problem("There is not enough memory for this.", Code.FAILED)


def _missing_module(error: Any, arguments: Arguments) -> Problem:
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        sentence = f"The Python package {package or error} is missing; install lorafind again."
        return Problem(sentence, Code.FAILED)
    return Problem(
        f"This needs {package}, which the extra '{extra}' installs.",
        Code.FAILED,
        f'pip install "lorafind[{extra}]"',
    )


_RULES: dict[str, Callable[[Any, Arguments], Problem]] = {
    "lorafind.bases.problem.BasisProblem": _index_problem,
    "lorafind.index.problem.IndexProblem": _index_problem,
    "lorafind.files.outcome.NotAnAdapter": _not_an_adapter,
    "lorafind.train.problem.TrainProblem": _index_problem,
    "builtins.OSError": _os_error,
    "builtins.MemoryError": _memory,
    "builtins.ModuleNotFoundError": _missing_module,
}

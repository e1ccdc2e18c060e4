"""What commands share: the session, the options for output, and targets, each defined once."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from lorafind.cli.errors import Code
from lorafind.cli.output import Mode, Sink

P = ParamSpec("P")

Targets = Annotated[
    list[str],
    typer.Argument(help="Files, names in the index, or - for a list on stdin.", show_default=False),
]


@dataclass(frozen=True, slots=True)
class Globals:
    """The options that stand before or after any command."""

    db: Path | None = None
    quiet: bool = False
    verbose: bool = False
    debug: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """What a command works with: where its results go, and the index that was named.

    db: the file of ``--db`` or ``LORAFIND_DB``; None for the default one.
    """

    sink: Sink
    db: Path | None


def _flag(*names: str, help: str) -> Any:
    return Annotated[bool, typer.Option(*names, help=help, rich_help_panel="Output")]


_MODES = {
    Mode.JSON: _flag("--json", help="One JSON document."),
    Mode.JSONL: _flag("--jsonl", help="One JSON object a line."),
    Mode.TSV: _flag("--tsv", help="Tab-separated lines (the default off a terminal)."),
    Mode.CSV: _flag("--csv", help="Comma-separated lines."),
    Mode.PATHS: _flag("-0", "--null", help="Paths that end in NUL, for xargs -0."),
}
_OUTPUT = {
    **{f"output_{mode.value}": flag for mode, flag in _MODES.items()},
    "output_header": _flag("--header", help="Name the columns in TSV and CSV."),
    "exit_code": _flag("--exit-code", help="Exit with 1 when there is no result."),
}


def command(
    function: Callable[Concatenate[Session, P], int | None],
) -> Callable[..., int | None]:
    """Make a command of a function of a session and of its own arguments and options.

    Adds the options for output; the docstring is the help, what is returned the exit code (None
    for 0).
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(
            inspect.Parameter(name, keyword, default=False, annotation=flag)
            for name, flag in _OUTPUT.items()
        ),
    ]

    @wraps(function)
    def run(**values: Any) -> int | None:
        given = values.pop("context").obj
        chosen = {name: values.pop(name) for name in _OUTPUT}
        sink = Sink(
            _mode([mode for mode in _MODES if chosen[f"output_{mode.value}"]]),
            header=chosen["output_header"],
            quiet=given.quiet,
            verbose=given.verbose,
        )
        call: Callable[..., int | None] = function
        code = call(Session(sink, given.db), **values)
        if not code and not sink.count and chosen["exit_code"]:
            return Code.NOTHING
        return code

    parameters = [p.replace(kind=keyword) for p in own] + added
    # Typer reads a command's parameters off its signature and its annotations.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _mode(asked: list[Mode]) -> Mode:
    if len(asked) > 1:
        raise typer.BadParameter("only one of --json, --jsonl, --tsv, --csv and -0 can be used")
    if asked:
        return asked[0]
    return Mode.TABLE if sys.stdout.isatty() else Mode.TSV


def targets(arguments: Iterable[str]) -> list[str]:
    """The targets that the user named, with ``-`` replaced by the list on stdin.

    The list is NUL-separated (as from ``-0``) or has one target a line, up to the first tab, so
    that the TSV of another command can be piped in.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            if sys.stdin.isatty():
                print("Reading targets, one a line, until the end of input.", file=sys.stderr)
            found += _listed(sys.stdin.buffer.read())
        else:
            found.append(argument)
    return found


def _listed(data: bytes) -> list[str]:
    # No path holds a NUL, so its presence tells the two forms apart.
    if b"\0" in data:
        items = data.split(b"\0")
    else:
        items = [line.rstrip(b"\r").partition(b"\t")[0] for line in data.split(b"\n")]
    return [os.fsdecode(item) for item in items if item]

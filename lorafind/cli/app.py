"""The Typer app: global options, commands that are imported when they are needed, exit codes.

A command ``some-name`` is the function ``some_name`` of ``lorafind/cli/some_name.py`` (``import``
that of ``import_``), made with :func:`lorafind.cli.options.command` and listed in PANELS. A command
of SUBCOMMANDS has commands of its own: ``basis use`` is the function ``use`` of
``lorafind/cli/basis_use.py``. At import such a module loads nothing heavy: what it calls, it
imports inside the function.
"""

from __future__ import annotations

import os
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from itertools import islice
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import typer
from typer.core import TyperGroup

from lorafind import __version__
from lorafind.cli import errors
from lorafind.cli.errors import Code
from lorafind.cli.options import Globals
from lorafind.cli.output import ReaderGone, flush

#: panel of the help → commands
PANELS: Mapping[str, Sequence[str]] = {
    "First steps": ("demo",),
    "Index": ("index", "ls", "merge", "export", "import"),
    "Files": ("info", "compare", "whatis"),
    "Search": ("similar", "dupes", "epochs", "map", "groups", "mix", "trace"),
    "Cleaning up": ("apply", "undo"),
    "Bases": ("basis", "rebuild-basis", "eval"),
    "Training": ("train", "train-many"),
}
#: command that has commands of its own → what it is for, and their names
SUBCOMMANDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "basis": (
        "Bases to compare in: which there are, which is in use, fetching and publishing.",
        ("list", "show", "use", "pull", "push"),
    ),
}

_GLOBAL_FLAGS = ("--quiet", "-q", "--verbose", "-v", "--debug")
_GLOBAL_VALUE = "--db"


class _Commands(UserDict[str, Any]):
    """Name → command; its module is imported when the command is first asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Any]) -> None:
        super().__init__(dict.fromkeys(names))
        self._make = make

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            self.data[name] = self._make(name)
        return self.data[name]


class _Subgroup(TyperGroup):
    """A command that has commands of its own; alone it shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


class Group(TyperGroup):
    """The group of all commands: late imports, global options anywhere, errors as sentences."""

    package: ClassVar[str] = "lorafind.cli"
    panels: ClassVar[Mapping[str, Sequence[str]]] = PANELS
    subcommands: ClassVar[Mapping[str, tuple[str, Sequence[str]]]] = SUBCOMMANDS

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        panel_of = {name: panel for panel, names in self.panels.items() for name in names}
        self.commands = _Commands(panel_of, lambda name: self._make(name, panel_of[name]))

    def _make(self, name: str, panel: str) -> Any:
        if name not in self.subcommands:
            return self._load(name, name, panel)
        about, names = self.subcommands[name]
        app = typer.Typer(cls=_Subgroup, add_completion=False)
        app.callback(help=about)(_nothing)
        group = typer.main.get_group(app)
        group.name, group.rich_help_panel = name, panel
        group.commands = _Commands(names, lambda own: self._load(own, f"{name}-{own}", None))
        return group

    def _load(self, name: str, whole: str, panel: str | None) -> Any:
        """The command ``name`` from the module that is called like the ``whole`` of it."""
        module = import_module(f"{self.package}.{_identifier(whole)}")
        single = typer.Typer(add_completion=False)
        single.command(name, rich_help_panel=panel)(getattr(module, _identifier(name)))
        return typer.main.get_command(single)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the global options, also those that stand after the command."""
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, _globals_first(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes a sentence and an exit code."""
        try:
            code = super().invoke(ctx)
            flush()
            return code
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except ReaderGone as error:
            _abandon_stdout()
            raise typer.Exit(Code.DONE) from error
        except Exception as error:
            code = errors.report(error, ctx.meta[__name__], debug=ctx.params["debug"])
            try:
                flush()
            except (OSError, ReaderGone):
                _abandon_stdout()
            raise typer.Exit(code) from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and exit with the code that the command returned; wrong use is told as a problem."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "lorafind"
            errors.say(error.format_message(), f"{command} --help")
            code = error.exit_code
        except typer.Abort:
            code = Code.INTERRUPTED
        if code == Code.INTERRUPTED:
            errors.say("interrupted.")
        sys.exit(int(code or Code.DONE))


def _identifier(name: str) -> str:
    """What a command is called in Python, where some words are taken."""
    return name.replace("-", "_") + "_" * iskeyword(name)


def _nothing() -> None:
    """What a group does before its command."""


def _globals_first(args: Sequence[str]) -> list[str]:
    """``args`` with the global options moved to the front; nothing after ``--`` is touched."""
    first: list[str] = []
    rest: list[str] = []
    queue = iter(args)
    for arg in queue:
        if arg == "--":
            rest += [arg, *queue]
        elif arg in _GLOBAL_FLAGS or arg.startswith(f"{_GLOBAL_VALUE}="):
            first.append(arg)
        elif arg == _GLOBAL_VALUE:
            value = list(islice(queue, 1))
            if not value:
                # The parser then says that the value is missing.
                return [*first, arg]
            first += [arg, *value]
        else:
            rest.append(arg)
    return first + rest


def _abandon_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorafind {__version__}")
        raise typer.Exit()


def _root(
    context: typer.Context,
    db: Annotated[
        Path | None,
        typer.Option("--db", envvar="LORAFIND_DB", help="The index file.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More about the run.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Find similar, duplicate and related LoRA files from their weights alone."""
    context.obj = Globals(db.expanduser() if db else None, quiet, verbose, debug)


def make_app(group: type[Group] = Group) -> typer.Typer:
    """The app over the commands of ``group``."""
    app = typer.Typer(
        cls=group, epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.callback()(_root)
    return app


def _epilog() -> str:
    codes = ", ".join(f"{code.value} {meaning}" for code, meaning in errors.MEANING.items())
    return f"These options may also stand after the command. Exit codes: {codes}."


def run(group: type[Group] = Group) -> NoReturn:
    """Run the command line on the arguments of the process and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show a character gets an escape, not a crash.
            stream.reconfigure(errors="backslashreplace")
    app = typer.main.get_command(make_app(group))
    # None: the arguments of the process, with patterns expanded on Windows, where no shell does.
    sys.exit(app.main(None if sys.argv[1:] else ["--help"], prog_name="lorafind"))

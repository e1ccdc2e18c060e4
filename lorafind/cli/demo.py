"""``lorafind demo``."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lorafind.cli.errors import Code
from lorafind.cli.output import ReaderGone, clean, flush

INDEX = "index.db"
INTRODUCTION = """\
The data: 40 LoRAs that were really trained, of a diffusion U-Net so small that they fit in the
package. It draws letters; a font stands for an artist, and each LoRA learnt one of six fonts from
ten letters, from another random start. thin/ holds 36 of rank 1, in F16 and BF16 and in two
spellings, wild/ four of rank 4, two of them of the attention layers alone. Six fonts are an easy
collection: the scores say how lorafind works, not how well it does on yours.

Made of them just now:
"""


@dataclass(frozen=True)
class Step:
    """A command, what to look at in what it says, and the exit code that it should end with."""

    words: str
    arguments: tuple[str, ...]
    code: Code = Code.DONE


STEPS = (
    Step(
        "The index reads every file once. Two cannot be used, and it says why; exit code 3 tells\n"
        "a script. The adapter of a language model is read too: it is compared with its own kind.",
        ("index", "."),
        Code.PARTIAL,
    ),
    Step(
        "Which LoRAs are nearest in style? Names play no part: look how far the scores fall after\n"
        "the last lobster. Variants are copies that are folded into one line.",
        ("similar", "thin/lobster-train-01.safetensors", "-k", "8"),
    ),
    Step(
        "The same from a LoRA that touches the attention layers only: it is compared with the\n"
        "others by these, and finds those with all layers.",
        ("similar", "wild/lobster-train-07.safetensors", "-k", "8"),
    ),
    Step(
        "Which files hold the same LoRA? Every line is proved from the weights. The grade says\n"
        'what was proved about a file and the keeper of its group, "May go" whether it is safe.',
        ("dupes",),
    ),
    Step(
        "What may go: only what the keeper holds in full. `-0` in place of --tsv feeds xargs -0.",
        ("dupes", "--others", "--tsv"),
    ),
    Step(
        "What are these files? One was renamed (the name in its metadata is shown, it proves\n"
        "nothing), one was resized, one belongs to a language model and is like nothing here.",
        (
            "whatis",
            "copies/untitled.safetensors",
            "copies/lobster-rank2.safetensors",
            "other/language-model.safetensors",
        ),
    ),
    Step(
        "Two LoRAs of one font, side by side. Their changes of the weights hardly agree (cosine\n"
        "0.02): only against the rest of the collection, in `similar`, does that little stand out.",
        (
            "compare",
            "thin/lobster-train-01.safetensors",
            "thin/lobster-train-02.safetensors",
        ),
    ),
)


def demo(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A new folder for the files, which is kept; none: a temporary one.",
            show_default=False,
        ),
    ] = None,
) -> int | None:
    """Show what the commands say about a small collection that comes with lorafind.

    It has an index file of its own: yours is not touched. With --quiet only the commands and what
    they say.
    """
    from lorafind.demo.make import make

    quiet: bool = context.obj.quiet
    with ExitStack() as stack:
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorafind-")))
        else:
            place = folder.expanduser().absolute()
        made = make(place)
        if not quiet:
            width = max(map(len, made))
            lines = [f"  {path:{width}}  {what}\n" for path, what in made.items()]
            _say(INTRODUCTION + "".join(lines))
        _say(f"$ {_line('cd', str(place))}")
        stack.enter_context(chdir(place))
        for step in STEPS:
            if not quiet:
                _say(f"\n{step.words}")
            code = _run(*step.arguments, "--db", INDEX, *(["--quiet"] if quiet else []))
            if code != step.code:
                return code
    if not quiet:
        _say(_farewell(folder))
    return None


def _run(*arguments: str) -> int:
    """Run a command of lorafind here; returns its exit code."""
    from lorafind.cli.app import make_app

    _say(f"$ {_line('lorafind', *arguments)}")
    app = typer.main.get_command(make_app())
    try:
        app.main(list(arguments), prog_name="lorafind")
    except SystemExit as done:
        return int(done.code or 0)
    raise AssertionError("a command ends with SystemExit")


def _say(text: str) -> None:
    try:
        print("\n".join(map(clean, text.split("\n"))))
    except BrokenPipeError as error:
        # Where Python does not buffer.
        raise ReaderGone from error
    # The commands write past the buffer of print.
    flush()


def _farewell(folder: Path | None) -> str:
    if folder is None:
        return "\n`lorafind demo DIR` does the same in a folder that is kept, to try more commands."
    return f"\nEverything is in {folder}. Remove the folder when you have seen enough."


def _line(*words: str) -> str:
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

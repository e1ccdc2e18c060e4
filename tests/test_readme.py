"""The README and the pages of docs/ cannot rot: what they show is run, its output compared.

- ``console`` blocks: each ``$ command`` runs in a shell, in order, in one empty folder, on a
  terminal of 100 columns; it has to end with 0 and to print what is shown below it, where
  something is. ``...`` stands for any text in a line, alone on a line for any lines.
- ``python`` blocks: each runs after the commands above it, in the same folder.
- ``sh`` blocks: set-up and tests; ``.ci/run`` runs them as they stand.
- ``text`` and ``json`` blocks show no commands.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from lorafind.cli.app import make_app
from lorafind.cli.errors import MEANING
from tests.terminal import run_on_terminal
from tests.train import hub, tiny

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = ("README.md", "docs/PYTHON.md", "docs/SCALE.md")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line where it begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", page, re.MULTILINE)
    return [Block(m[1], m[2], page.count("\n", 0, m.start()) + 1) for m in found]


def examples(text: str) -> list[tuple[str, str]]:
    """(command, output shown) of a console block; a command goes on after a backslash."""
    parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", text, flags=re.MULTILINE)
    assert not parts[0], f"a console block begins with a command, not with {parts[0]!r}"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def matches(shown: str, printed: str) -> bool:
    """Whether ``printed`` is what is ``shown``, up to ``...`` and blanks at the end of a line."""
    pattern = ""
    for line in shown.splitlines():
        if line.strip() == "...":
            pattern += r"(?s:.*?)"
        else:
            pattern += re.escape(line.rstrip()).replace(r"\.\.\.", ".*?") + r"[ ]*\n"
    return re.fullmatch(pattern, printed) is not None


def commands() -> set[str]:
    """The names of the commands that there are."""
    return set(getattr(typer.main.get_command(make_app()), "commands"))  # noqa: B009


def test_the_mechanism() -> None:
    page = "x\n```console\n$ a \\\n  b\n1\n$ c\n```\n```text\n$ d\n```\n"
    assert blocks(page) == [
        Block("console", "$ a \\\n  b\n1\n$ c\n", 2),
        Block("text", "$ d\n", 8),
    ]
    assert examples(blocks(page)[0].text) == [("a \\\n  b", "1\n"), ("c", "")]
    assert matches("a 1... s\n...\nz\n", "a 1.5 s  \nb\nc\nz\n")
    assert matches("a\n...\nz\n", "a\nz\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a.c\n", "abc\n")
    assert not matches("a\n...\nz\n", "a\nz\nb\n")


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    for block in blocks(README):
        assert block.language in {"console", "python", "sh", "text", "json"}, block.line
        if block.language in {"text", "json"}:
            assert not re.search(r"^\s*(\$ |lorafind )", block.text, re.MULTILINE), block.line


def test_ci_runs_the_set_up_commands() -> None:
    setup = "".join(block.text for block in blocks(README) if block.language == "sh").splitlines()
    assert len(setup) == 2
    for command in setup:
        assert "pip install -c constraints.txt" in command
    assert setup[0].endswith("lorafind demo")
    assert setup[1].endswith("python -m tests.gate")
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    extract = re.search(r"^sed .*README\.md", script, re.MULTILINE)
    assert extract
    if os.name == "posix":
        done = subprocess.run(
            shlex.split(extract[0]), cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == setup


def test_commands_that_the_text_names_exist() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`lorafind ([a-z][a-z-]*)", text))
    assert named <= commands()


def test_exit_codes_are_listed() -> None:
    listed = re.findall(r"^\| (\d+) \| (.*) \|$", README, re.MULTILINE)
    meanings = [(str(code.value), meaning) for code, meaning in MEANING.items()]
    assert [(code, meaning.replace("`", "")) for code, meaning in listed] == meanings


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.skipif(os.name != "posix", reason="the examples are for a POSIX shell and terminal")
def test_examples(page: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    lorafind = programs / "lorafind"
    lorafind.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lorafind "$@"\n')
    lorafind.chmod(0o755)
    folder = tmp_path / "home"
    folder.mkdir()
    hub.as_default(folder)
    for style in tiny.STYLES:
        tiny.paint(folder / "pictures" / style, style, range(6))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "LORAFIND_DB": str(folder / "index.db"),
        "NO_COLOR": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for block in blocks((ROOT / page).read_text("utf-8")):
        if block.language == "console":
            steps = [(["bash", "-c", command], shown) for command, shown in examples(block.text)]
        elif block.language == "python":
            steps = [([sys.executable, "-c", block.text], "")]
        else:
            continue
        for command, shown in steps:
            code, printed = run_on_terminal(command, folder, environment)
            where = f"{page}, block at line {block.line}: {command[-1]}\n{printed}"
            assert code == 0, where
            assert not shown or matches(shown, printed), f"{where}instead of\n{shown}"

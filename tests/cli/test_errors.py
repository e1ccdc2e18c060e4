"""Errors become one sentence, a next command and an exit code; the frame around commands."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner, Result

from lorafind import __version__
from lorafind.cli.app import make_app
from lorafind.cli.errors import EXTRAS, explain
from lorafind.files.outcome import NotAnAdapter
from lorafind.index.problem import IndexProblem
from tests.cli.sample import SampleGroup

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(make_app(SampleGroup), list(arguments))


def full_disk(path: str | None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (
            full_disk("/x/index.db"),
            "The disk is full; /x/index.db could not be written. "
            "Free some space and run the same command again.",
            4,
        ),
        (
            full_disk(None),
            "The disk is full. Free some space and run the same command again.",
            4,
        ),
        (
            FileNotFoundError(errno.ENOENT, "", "a.safetensors"),
            "There is no file or folder a.safetensors.",
            2,
        ),
        (
            PermissionError(errno.EACCES, "", b"\xff"),
            "\udcff may not be opened: permission denied.",
            4,
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d"), "d: Is a directory.", 4),
        (ConnectionError(), "ConnectionError.", 4),
        (IndexProblem("There is no index yet."), "There is no index yet.", 4),
        (sqlite3.ProgrammingError("x"), "lorafind failed: ProgrammingError: x", 70),
        (MemoryError(), "There is not enough memory for this.", 4),
        (NotAnAdapter("embedding", "a.pt is an embedding."), "a.pt is an embedding.", 3),
        (
            ModuleNotFoundError("", name="matplotlib.pyplot"),
            "This needs matplotlib, which the extra 'plot' installs.",
            4,
        ),
        (
            ModuleNotFoundError("", name="rich"),
            "The Python package rich is missing; install lorafind again.",
            4,
        ),
        (ValueError("odd"), "lorafind failed: ValueError: odd", 70),
        (AssertionError(), "lorafind failed: AssertionError", 70),
    ],
)
def test_sentences(error: Exception, sentence: str, code: int) -> None:
    problem = explain(error)
    assert (problem.sentence, problem.code) == (sentence, code)


def test_the_next_command_keeps_the_arguments_of_the_user() -> None:
    arguments = ["info", "a file.pt"]
    pickle = explain(NotAnAdapter("pickle", "a pickle."), arguments)
    again = {"posix": "lorafind info 'a file.pt' --allow-pickle"}
    assert pickle.retry == again.get(os.name, 'lorafind info "a file.pt" --allow-pickle')
    refused = explain(NotAnAdapter("pickle", "refused."), [*arguments, "--allow-pickle"])
    assert refused.retry == ""
    assert explain(ModuleNotFoundError("", name="peft")).retry == 'pip install "lorafind[train]"'
    assert explain(ValueError(), ["ls"]).retry == "lorafind --debug ls"
    assert explain(ValueError(), ["--debug", "ls"]).retry == ""


def test_extras_of_the_table_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for package, extra in EXTRAS.items():
        names = [Requirement(line).name for line in project["optional-dependencies"][extra]]
        assert package in names


def test_a_bug_is_one_sentence_without_and_a_traceback_with_debug() -> None:
    brief = call("fail", "now")
    assert brief.exit_code == 70
    assert brief.stdout == ""
    assert brief.stderr == (
        "lorafind: lorafind failed: RuntimeError: the sky fell\ntry: lorafind --debug fail now\n"
    )
    full = call("fail", "now", "--debug")
    assert full.exit_code == 70
    assert full.stderr.startswith("Traceback (most recent call last):")
    assert full.stderr.endswith("\nlorafind: lorafind failed: RuntimeError: the sky fell\n")


def test_exit_codes() -> None:
    assert call("fail", "partly").exit_code == 3
    assert call("fail", "pickle").exit_code == 3
    # A pipe that broke elsewhere than at stdout is an error like any other.
    assert call("fail", "pipe").exit_code == 4
    wrong = call("fail", "usage")
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("lorafind: Invalid value: not like that\ntry: ")


def test_wrong_use_names_what_was_meant() -> None:
    wrong = call("thing", "a")
    assert wrong.exit_code == 2
    assert wrong.stdout == ""
    assert "No such command 'thing'. Did you mean 'things'?" in wrong.stderr
    missing = call("things")
    assert missing.exit_code == 2
    assert "Missing argument" in missing.stderr
    assert "things --help" in missing.stderr
    assert call("things", "a", "--jsno").exit_code == 2


def test_help_lists_every_command_with_its_sentence_and_its_options() -> None:
    listing = call("--help").stdout
    for text in ("Samples", "things", "List things.", "wait-here", "--db", "130 interrupted"):
        assert text in listing
    one = call("things", "-h").stdout
    for text in ("--repeat", "--jsonl", "--exit-code", "-0"):
        assert text in one


def python(code: str) -> str:
    # With compiled modules, as pip installs them.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "safetensors",
    "sqlite_utils",
    "sqlite3",
    "diffusers",
}


def test_help_and_command_modules_import_nothing_heavy() -> None:
    loaded = python(
        "import importlib, json, pkgutil, sys\n"
        "import lorafind.cli\n"
        "for module in pkgutil.iter_modules(lorafind.cli.__path__):\n"
        "    importlib.import_module(f'lorafind.cli.{module.name}')\n"
        "sys.argv = ['lorafind', '--help']\n"
        "sys.stdout = sys.stderr\n"
        "try:\n"
        "    from lorafind.__main__ import main; main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print(json.dumps(list(sys.modules)), file=sys.__stdout__)\n"
    )
    assert not HEAVY & set(json.loads(loaded))


def test_a_command_imports_no_other_command() -> None:
    loaded = python(
        "import sys; sys.argv = ['x', '-q', 'one']\n"
        "from lorafind.cli.app import run; from tests.cli.sample import SampleGroup\n"
        "try:\n"
        "    run(SampleGroup)\n"
        "except SystemExit: print('tests.cli.sample.things' in sys.modules)\n"
    )
    assert loaded == "x\t0.123\t\nFalse\n"


def seconds(code: str) -> float:
    """The best of five processes, from the first statement to the last."""
    timed = f"import time; began = time.perf_counter()\n{code}\nprint(time.perf_counter() - began)"
    return min(float(python(timed).split()[-1]) for _ in range(5))


def test_help_is_instant() -> None:
    bare = seconds("import typer, rich")
    shown = seconds(
        "import sys; sys.argv = ['lorafind', '--help']\n"
        "try:\n"
        "    from lorafind.__main__ import main; main()\n"
        "except SystemExit: pass"
    )
    assert shown - bare < 0.15


def test_every_command_of_the_package_has_help() -> None:
    group = typer.main.get_command(make_app())
    for name, command in getattr(group, "commands").items():  # noqa: B009
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.skipif(os.name != "posix", reason="the variables are those of bash")
def test_the_shell_completes_commands_and_options() -> None:
    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "tests.cli.sample"],
            cwd=ROOT,
            env={**os.environ, "_LORAFIND_COMPLETE": "complete_bash", **words},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert completed("lorafind th") == ["things"]
    assert completed("lorafind things --js") == ["--json", "--jsonl"]


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorafind", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"lorafind {__version__}\n")

"""What each output mode writes, to the byte, and where it writes it."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from lorafind.cli.output import Column, Mode, Sink, as_json, clean
from tests.cli.sample import SampleGroup
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = [sys.executable, "-m", "tests.cli.sample"]
# As a shell starts it: what is written at the end of a process is lost in another way.
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes and terminals")


def call(*arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner(env={"LORAFIND_DB": None}).invoke(
        make_app(SampleGroup), list(arguments), input=input
    )


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*SAMPLE, *arguments], cwd=ROOT, env=BUFFERED, capture_output=True, timeout=60, **options
    )


ROWS = {
    "--tsv": 'a\t0.500000\t0\t[]\ttrue\nb c\t0.333333\t1500\t["a"]\tfalse\n',
    "--csv": 'a,0.500000,0,[],true\nb c,0.333333,1500,"[""a""]",false\n',
    "--json": '[\n{"path": "a", "score": 0.5, "size": 0, "kin": [], "same": true, "extra": null},\n'
    '{"path": "b c", "score": 0.3333333333333333, "size": 1500, "kin": ["a"], "same": false, '
    '"extra": null}\n]\n',
    "--jsonl": '{"path": "a", "score": 0.5, "size": 0, "kin": [], "same": true, "extra": null}\n'
    '{"path": "b c", "score": 0.3333333333333333, "size": 1500, "kin": ["a"], "same": false, '
    '"extra": null}\n',
    "-0": "a\0b c\0",
}


@pytest.mark.parametrize("mode", ROWS)
def test_rows(mode: str) -> None:
    result = call("things", "a", "b c", mode)
    assert (result.exit_code, result.stdout_bytes) == (0, ROWS[mode].encode())
    assert result.stderr == "db=None\n"


def test_tsv_is_the_default_off_a_terminal_and_names_columns_on_request() -> None:
    assert call("things", "a", "b c").stdout == ROWS["--tsv"]
    header = "path\tscore\tsize\tkin\tsame\n"
    assert call("things", "a", "b c", "--header").stdout == header + ROWS["--tsv"]
    assert call("things", "a", "--csv", "--header").stdout.startswith("path,score,size,kin,same\n")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("--tsv", "x\t0.123\t\n"),
        ("--csv", "x,0.123,\n"),
        (
            "--json",
            '{\n  "name": "x",\n  "cosine": 0.12345,\n  "no": null,\n'
            '  "all": [\n    1,\n    2.5\n  ]\n}\n',
        ),
        ("--jsonl", '{"name": "x", "cosine": 0.12345, "no": null, "all": [1, 2.5]}\n'),
    ],
)
def test_one_record(mode: str, expected: str) -> None:
    assert call("one", mode).stdout == expected


def test_two_modes_and_paths_that_do_not_exist_are_wrong_use() -> None:
    both = call("things", "a", "--json", "--csv")
    assert both.exit_code == 2
    assert both.stdout == ""
    assert "only one of --json, --jsonl, --tsv, --csv and -0 can be used" in both.stderr
    without = call("one", "-0")
    assert without.exit_code == 2
    assert "this command has no paths to write" in without.stderr


def test_exit_code_of_nothing_found() -> None:
    assert call("things", "nothing").exit_code == 0
    assert call("things", "nothing", "--exit-code").exit_code == 1
    assert call("things", "a", "--exit-code").exit_code == 0
    assert call("things", "nothing", "--json", "--exit-code").stdout == "[]\n"


def test_notes_follow_quiet_and_verbose_wherever_they_stand() -> None:
    assert call("things", "a", "--quiet").stderr == ""
    assert call("--quiet", "things", "a").stderr == ""
    assert call("things", "a", "-v").stderr == "db=None\nmore\n"


def test_index_file_from_option_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("things", "a", "--db", "x.db").stderr == "db=x.db\n"
    assert call("--db=x.db", "things", "a").stderr == "db=x.db\n"
    result = CliRunner(env={"LORAFIND_DB": "y.db"}).invoke(make_app(SampleGroup), ["things", "a"])
    assert result.stderr == "db=y.db\n"
    assert call("things", "--", "--db").stdout.startswith("--db\t")
    missing = call("things", "a", "--db")
    assert missing.exit_code == 2
    assert "'--db' requires an argument" in missing.stderr


@pytest.mark.parametrize(
    ("input", "found"),
    [
        ("x\n\ny\n", ["x", "y"]),
        ("x\r\ny", ["x", "y"]),
        ("x\t0.5\ny\t0.4\n", ["x", "y"]),
        ("x\ny\0z\tz\0", ["x\\ny", "z\\tz"]),
        ("", []),
    ],
)
def test_targets_from_stdin(input: str, found: list[str]) -> None:
    result = call("things", "first", "-", "last", input=input)
    paths = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert paths == ["first", *found, "last"]


def test_the_output_of_a_command_is_the_input_of_the_next() -> None:
    listed = call("things", "a b", "c\nd", "-0").stdout_bytes
    assert call("things", "-", "-0", input=listed).stdout_bytes == listed


def test_names_cannot_break_a_line_or_drive_the_terminal() -> None:
    name = "a\tb\nc\x1b[31m\x9b\x7f日本"
    assert clean(name) == "a\\tb\\nc\\x1b[31m\\x9b\\x7f日本"
    for mode in ("--tsv", "--csv"):
        line = call("things", name, mode).stdout
        assert line.startswith(clean(name))
        assert line.count("\n") == 1
    written = call("things", name, "--json").stdout
    assert json.loads(written)[0]["path"] == name
    assert not set(written) & set("\x1b\x9b\x7f\t")
    assert "日本" in written


@POSIX
def test_undecodable_names_are_exact_with_0_and_safe_elsewhere(tmp_path: Path) -> None:
    name = b"caf\xe9 [bold]\n.safetensors"
    exact = process("things", os.fsdecode(name), "-0")
    assert exact.stdout == name + b"\0"
    assert process("things", "-", "-0", input=exact.stdout).stdout == name + b"\0"
    assert process("things", os.fsdecode(name)).stdout.startswith(
        b"caf\\xe9 [bold]\\n.safetensors\t"
    )
    written = process("things", os.fsdecode(name), "--jsonl").stdout
    assert b"caf\\udce9 [bold]\\n" in written
    assert os.fsencode(json.loads(written)["path"]) == name


def test_values_of_every_kind() -> None:
    row = {
        "none": None,
        "nan": math.nan,
        "path": Path("p"),
        "bytes": b"\xff",
        "many": ("x", 1),
        "inner": {"k": [True]},
        "numpy": [np.float32(0.5), np.int64(3), np.float64("inf")],
    }
    assert json.loads(as_json(row)) == {
        "none": None,
        "nan": None,
        "path": "p",
        "bytes": "\udcff",
        "many": ["x", 1],
        "inner": {"k": [True]},
        "numpy": [0.5, 3, None],
    }
    written = [Column(key, key).written(row) for key in row]
    assert written == ["", "", "p", "\\xff", '["x", 1]', '{"k": [true]}', "[0.5, 3, null]"]
    shown = [Column(key, key).shown(row) for key in row if key != "numpy"]
    assert shown == ["", "", "p", "\\xff", "x, 1", '{"k": [true]}']
    with pytest.raises(TypeError, match="a result cannot hold object"):
        as_json({"x": object()})


def test_csv_is_read_back_by_the_csv_module() -> None:
    names = ["plain", 'quo"te', "com,ma", "日本", " space "]
    rows = list(csv.reader(io.StringIO(call("things", *names, "--csv").stdout)))
    assert [row[0] for row in rows] == names


def on_terminal(*arguments: str, **environment: str) -> str:
    code, shown = run_on_terminal([*SAMPLE, "-q", *arguments], ROOT, environment, columns=60)
    assert code == 0
    return shown


@POSIX
def test_a_terminal_gets_a_table_without_colour_on_request() -> None:
    table = on_terminal("things", "[red]a", "b\tc", "d", NO_COLOR="1")
    assert table == (
        "Path    Score    Size  Kin   Same\n"
        "[red]a   0.50    0 kB        yes \n"
        "b\\tc     0.33  1.5 kB  a     no  \n"
        "d        0.25    3 kB  a, b  no  \n"
    )
    coloured = on_terminal("things", "a")
    assert "\x1b[1mPath" in coloured
    assert on_terminal("things", "nothing") == ""
    assert on_terminal("one", NO_COLOR="1") == "Name    x    \nCosine  0.123\n"
    assert on_terminal("things", "a", "--tsv") == "a\t0.500000\t0\t[]\ttrue\n"


@POSIX
def test_long_names_are_folded_never_cut() -> None:
    name = "x" * 100 + "end"
    table = on_terminal("things", name, NO_COLOR="1")
    assert "".join(line.split()[0] for line in table.splitlines()[1:]) == name


@POSIX
def test_a_reader_that_stops_early_is_no_error() -> None:
    child = subprocess.Popen(
        [*SAMPLE, "things", "a", "--repeat", "1000000"],
        cwd=ROOT,
        env=BUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == b"a\t0.500000\t0\t[]\ttrue\n"
    child.stdout.close()
    assert child.stderr.read() == b"db=None\n"
    assert child.wait(60) == 0


@POSIX
def test_a_reader_that_is_gone_at_the_end_is_no_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*SAMPLE, "things", "a"],
        cwd=ROOT,
        env=BUFFERED,
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"db=None\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*SAMPLE, "-q", "things", "a"],
            cwd=ROOT,
            env=BUFFERED,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 4
    assert done.stderr == (
        b"lorafind: The disk is full. Free some space and run the same command again.\n"
    )


@POSIX
def test_ctrl_c_ends_with_130() -> None:
    child = subprocess.Popen([*SAMPLE, "wait-here"], cwd=ROOT, stderr=subprocess.PIPE)
    assert child.stderr is not None
    assert child.stderr.readline() == b"waiting\n"
    child.send_signal(signal.SIGINT)
    assert child.stderr.read() == b"lorafind: interrupted.\n"
    assert child.wait(60) == 130


BAR = """
from lorafind.cli.output import Mode, Sink
sink = Sink(Mode.TSV, quiet={quiet})
with sink.progress("[b]Reading\\x1b", 2) as step:
    step()
    step()
    sink.note("a note")
sink.rows((), [])
"""


@POSIX
def test_a_bar_is_on_the_terminal_until_the_work_is_done() -> None:
    environment = {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    code, shown = run_on_terminal(
        [sys.executable, "-c", BAR.format(quiet=False)], ROOT, environment
    )
    assert code == 0
    assert "[b]Reading\\x1b" in shown and "2/2" in shown and "a note\n" in shown
    # The last thing is that the line of the bar is erased.
    assert shown.endswith("\x1b[2K")
    command = [sys.executable, "-c", BAR.format(quiet=True)]
    assert run_on_terminal(command, ROOT, environment) == (0, "")


def test_no_bar_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink(Mode.TSV)
    with sink.progress("Reading", 2) as step:
        step()
        step(total=3)
    assert capsys.readouterr() == ("", "")

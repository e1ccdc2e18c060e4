"""``lorafind basis``: the frame of commands within a command, and what each of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from lorafind.bases.basis import COLLECTION, PUBLISHED
from lorafind.bases.stored import in_use
from lorafind.cli.app import make_app
from lorafind.index.rows import StoredBasis
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION
from tests.hub.hub_server import READER, WRITER, HubServer, Repository, hub_server
from tests.hub.made_basis import write_basis
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]
NAME = "alice/wild"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a folder of bases and an empty cache."""
    (tmp_path / "bases").mkdir()
    monkeypatch.setenv("LORAFIND_BASES", str(tmp_path / "bases"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def call(home: Path, *arguments: str | Path) -> Result:
    runner = CliRunner(env={"LORAFIND_DB": str(home / "index.db")})
    return runner.invoke(make_app(), ["basis", *map(str, arguments)])


def environment(home: Path, hub: HubServer, **more: str) -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **ours,
        "PYTHONPATH": str(ROOT),
        "LORAFIND_DB": str(home / "index.db"),
        "LORAFIND_BASES": str(home / "bases"),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": hub.url,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def process(
    home: Path, hub: HubServer, *arguments: str | Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """As a process: huggingface_hub reads its settings when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "lorafind", "basis", *map(str, arguments)],
        cwd=home,
        env=environment(home, hub, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def publish(hub: HubServer, file: Path, private: bool = False) -> str:
    """The pinned name of a file on the Hub."""
    repository = hub.repositories[NAME] = Repository(private)
    facts = b'{"name": "wild", "architecture": "sd1", "feature": "style", "signature_version": 1}'
    commit = repository.commit({"basis.safetensors": file.read_bytes(), "config.json": facts})
    return f"hf:{NAME}@{commit}"


def index(home: Path, chosen: str = "own") -> None:
    """An index with the collection's own basis and a published one."""
    own = {"families": 30, "loras": 36, "components": {"model": 7, "text": 2}}
    own["signature_version"] = SIGNATURE_VERSION
    with Store.open(home / "index.db", "write") as store, store.batch():
        for name, kind, facts in (
            ("own:sd1:aaaaaaaa", COLLECTION, own),
            (
                "00000001",
                PUBLISHED,
                {
                    "name": "wild",
                    "feature": "delta",
                    "components": 3,
                    "loras": 40,
                    "artists": 20,
                    "signature_version": SIGNATURE_VERSION,
                    "path": "/somewhere/wild.safetensors",
                },
            ),
        ):
            store.put_basis(StoredBasis(name, "sd1", kind, SIGNATURE_VERSION, facts, {}))
        store.set_meta(in_use("sd1"), chosen)


# ---------------------------------------------------------------------------- the frame


def test_alone_it_shows_its_commands(home: Path) -> None:
    result = call(home)
    assert result.exit_code == 0
    assert " basis [OPTIONS] COMMAND" in result.stdout
    for name in ("list", "show", "use", "pull", "push"):
        assert f" {name} " in result.stdout
    assert call(home, "--help").stdout == result.stdout
    # Among all commands it stands under its name.
    assert "│ basis " in CliRunner().invoke(make_app(), ["--help"]).stdout


def test_every_command_has_its_help_and_the_options_of_all(home: Path) -> None:
    for name in ("list", "show", "use", "pull", "push"):
        text = call(home, name, "--help").stdout
        assert "--jsonl" in text and "--exit-code" in text
        assert f"basis {name} " in text


def test_wrong_use_is_told_with_what_was_meant(home: Path) -> None:
    result = call(home, "lst")
    assert result.exit_code == 2
    assert "No such command 'lst'. Did you mean 'list'?" in result.stderr
    assert "basis --help" in result.stderr
    result = call(home, "pull")
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr and "basis pull --help" in result.stderr


def test_global_options_stand_anywhere(home: Path) -> None:
    index(home)
    (home / "index.db").rename(home / "other.db")
    expected = call(home, "list", "--json", "--db", home / "other.db").stdout
    assert json.loads(expected)
    assert call(home, "--db", home / "other.db", "list", "--json").stdout == expected
    assert json.loads(call(home, "list", "--json").stdout) == []


def test_the_shell_completes_them(home: Path) -> None:
    words = {"COMP_WORDS": "lorafind basis pu", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "lorafind"],
        cwd=ROOT,
        env={**os.environ, "_LORAFIND_COMPLETE": "complete_bash", **words},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["pull", "push"]


# ---------------------------------------------------------------------------- list and show


def test_list_has_every_place(home: Path, hub: HubServer) -> None:
    index(home)
    file = write_basis(home / "bases" / "fonts.safetensors", seed=2)
    (home / "bases" / "torn.safetensors").write_bytes(b"torn")
    pinned = publish(hub, write_basis(home / "b.safetensors", seed=3))
    assert process(home, hub, "pull", f"hf:{NAME}").returncode == 0
    done = process(home, hub, "list", "--header")
    assert done.returncode == 3
    assert done.stderr.startswith(f"warning: {home}/bases/torn.safetensors is no basis")
    assert done.stdout.splitlines() == [
        "name\tarchitecture\tfeature\tcomponents\tloras\tartists\twhere\tin_use",
        "wild\tsd1\tdelta\t3\t40\t20\tindex\tfalse",
        "own:sd1:aaaaaaaa\tsd1\tstyle\t7\t36\t\tindex\ttrue",
        "fonts\tsd1\tstyle\t3\t40\t20\tfolder\t",
        f"{pinned}\tsd1\tstyle\t3\t40\t20\tcache\t",
    ]
    row = json.loads(process(home, hub, "list", "--json").stdout)[2]
    assert set(row) == {
        *("name", "id", "architecture", "feature", "components", "loras", "artists"),
        *("where", "in_use", "path"),
    }
    assert row["path"] == str(file)
    paths = process(home, hub, "list", "-0").stdout.split("\0")
    assert str(file) in paths and len(paths) == 4


@pytest.mark.parametrize(
    ("chosen", "used"),
    [("own", "own:sd1:aaaaaaaa"), ("00000001", "00000001"), ("wild", "00000001"), ("gone", None)],
)
def test_list_marks_the_one_in_use(home: Path, chosen: str, used: str | None) -> None:
    index(home, chosen)
    rows = json.loads(call(home, "list", "--json").stdout)
    assert [row["id"] for row in rows if row["in_use"]] == ([used] if used else [])


def test_nothing_anywhere(home: Path) -> None:
    result = call(home, "list", "--exit-code")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "")
    result = call(home, "show", "own", "--json")
    assert (result.exit_code, result.stdout) == (0, "[]\n")
    assert "The collection has no basis of its own yet" in result.stderr


def test_show_has_all_facts(home: Path) -> None:
    file = write_basis(home / "bases" / "fonts.safetensors", seed=2)
    (row,) = json.loads(call(home, "show", "fonts", "--json").stdout)
    assert row["scales"] == [1.0, 1.25, 1.5]
    assert row["evaluation"][0]["calibrated"] == 88.5
    assert (row["source"], row["path"], row["in_use"]) == (str(file), str(file), None)
    assert call(home, "show", file, "--json").exit_code == 0
    line = call(home, "show", "fonts", "--tsv", "--header").stdout.splitlines()
    fields = dict(zip(*(text.split("\t") for text in line), strict=True))
    assert (fields["name"], fields["id"], fields["components"]) == ("wild", "00000002", "3")
    missing = call(home, "show", "fonds")
    assert missing.exit_code == 4
    assert missing.stderr == "lorafind: There is no basis fonds. Did you mean fonts?\n"


def test_show_of_the_index(home: Path) -> None:
    index(home, "00000001")
    for name in ("wild", "00000001"):
        (row,) = json.loads(call(home, "show", name, "--json").stdout)
        assert (row["source"], row["in_use"], row["feature"]) == ("index", True, "delta")
    for name in ("own", "own:sd1:aaaaaaaa"):
        (row,) = json.loads(call(home, "show", name, "--json").stdout)
        assert (row["in_use"], row["families"], row["feature"]) == (False, 30, "style")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX terminal")
def test_show_for_people(home: Path, hub: HubServer) -> None:
    write_basis(home / "bases" / "fonts.safetensors", seed=2)
    command = [sys.executable, "-m", "lorafind", "basis", "show", "fonts"]
    code, text = run_on_terminal(command, home, {**environment(home, hub), "NO_COLOR": "1"}, 160)
    assert code == 0
    told = dict(line.split("  ", 1) for line in text.splitlines())
    told = {key: value.strip() for key, value in told.items()}
    assert told["Components"] == "3 of 5 computed"
    assert told["Explained"] == "80.0% of the variance by the 3 chosen components"
    assert told["Made from"] == "40 LoRAs, 20 artists"
    assert told["Scales"] == "1.000 for the first component, 1.500 for the last"
    assert told["Evaluation"].startswith("test (same): mAP over the whole ranking, % queries 100,")
    assert told["File"] == "bases/fonts.safetensors"


def test_show_looks_before_anything_large_is_fetched(home: Path, hub: HubServer) -> None:
    pinned = publish(hub, write_basis(home / "b.safetensors"))
    (row,) = json.loads(process(home, hub, "show", f"hf:{NAME}", "--json").stdout)
    assert (row["source"], row["name"], row["path"]) == (pinned, "wild", None)
    assert {r.path.rpartition("/")[2] for r in hub.asked("/resolve/")} == {"config.json"}
    offline = process(home, hub, "show", "hf:alice/other", "--offline")
    assert offline.returncode == 4
    assert offline.stderr == (
        "lorafind: hf:alice/other is not in the cache, and nothing is fetched offline: "
        "`lorafind basis pull hf:alice/other` when there is a connection.\n"
    )


# ---------------------------------------------------------------------------- pull and push


def test_push_then_pull(home: Path, hub: HubServer) -> None:
    file = write_basis(home / "bases" / "fonts.safetensors", seed=5)
    pushed = process(
        home, hub, "push", "fonts", "alice/fonts", "--token", WRITER, "-m", "Fonts", "--private"
    )
    assert (pushed.returncode, pushed.stderr) == (0, "")
    commit = hub.repositories["alice/fonts"].refs["main"]
    name = f"hf:alice/fonts@{commit}"
    assert pushed.stdout == f"{name}\t{hub.url}/alice/fonts/commit/{commit}\n"
    assert hub.messages == ["Fonts"]
    assert set(hub.repositories["alice/fonts"].trees[commit]) >= {
        "explained_variance.png",
        "calibration_scales.png",
    }
    refused = process(home, hub, "pull", "hf:alice/fonts")
    assert refused.returncode == 4
    assert refused.stderr.startswith(
        f"lorafind: {hub.url[7:]} shows no repository alice/fonts: the name is wrong, or it is "
        "private; for a private one set HF_TOKEN or run `hf auth login`."
    )
    got = process(home, hub, "pull", "hf:alice/fonts", "-o", home / "copy", HF_TOKEN=READER)
    assert (got.returncode, got.stderr) == (0, "")
    assert got.stdout == f"{name}\t{home / 'copy'}\t{file.stat().st_size}\n"
    assert (home / "copy").read_bytes() == file.read_bytes()
    # The name that was printed needs neither token nor connection from now on.
    hub.requests.clear()
    (home / "there").mkdir()
    again = process(home, hub, "pull", name, "-o", home / "there", "--offline", "--json")
    assert json.loads(again.stdout) == {
        "name": name,
        "path": str(home / "there" / "fonts.safetensors"),
        "size": file.stat().st_size,
    }
    assert not hub.requests


def test_pull_overwrites_nothing(home: Path, hub: HubServer) -> None:
    publish(hub, write_basis(home / "b.safetensors"))
    done = process(home, hub, "pull", f"hf:{NAME}", "-o", home / "b.safetensors")
    assert done.returncode == 4
    assert done.stderr == (
        f"lorafind: {home}/b.safetensors is there already: remove it, or choose another place.\n"
    )
    assert not hub.requests


def test_push_without_plots_says_so(home: Path, hub: HubServer) -> None:
    file = write_basis(home / "b.safetensors")
    (home / "without").mkdir()
    (home / "without" / "matplotlib.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')\n"
    )
    path = os.pathsep.join([str(home / "without"), str(ROOT)])
    done = process(home, hub, "push", file, NAME, PYTHONPATH=path, HF_TOKEN=WRITER)
    assert done.returncode == 0
    assert done.stderr == (
        'The card has no plots, they need matplotlib:\ntry: pip install "lorafind[plot]"\n'
    )
    tree = hub.repositories[NAME].trees[hub.repositories[NAME].refs["main"]]
    assert "## Plots" not in tree["README.md"].decode()
    assert not [name for name in tree if name.endswith(".png")]


@pytest.mark.parametrize("arguments", [["list"], ["show", f"hf:{NAME}"], ["pull", f"hf:{NAME}"]])
def test_torch_is_not_loaded(home: Path, hub: HubServer, arguments: list[str]) -> None:
    publish(hub, write_basis(home / "b.safetensors"))
    index(home)
    code = (
        "import sys\n"
        "from lorafind.__main__ import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print([m for m in ('torch', 'sklearn', 'matplotlib') if m in sys.modules],\n"
        "          file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "basis", *arguments],
        env=environment(home, hub),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")

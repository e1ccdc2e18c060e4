"""What answers from the index alone does so without loading torch (which takes a second)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tools import age, copied, environment, index

#: The program, which says at its end what it has loaded.
TELLING = """
import sys
from lorafind.__main__ import main
try:
    main()
finally:
    heavy = ("torch", "sqlite_utils", "scipy", "sklearn", "pandas")
    print("loaded:", *[name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def db(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with a basis, relations and a refused file; nothing is left to do."""
    folder = tmp_path_factory.mktemp("torch")
    bench = shared / "loras/fontbench/wild"
    chosen = sorted(path.name for path in bench.glob("*-train-*.safetensors"))[:36]
    loras = copied(bench, folder / "loras", chosen)
    copied(bench, loras / "again", chosen[:2])
    run = ("sd1_diffusers_timohavdk_earlier-step", "sd1_diffusers_timohavdk_2100-lora")
    for step, name in enumerate(run, 1):
        shutil.copy2(
            shared / f"loras/real/{name}.safetensors", loras / f"fox-{step:06}.safetensors"
        )
    age(loras)
    copied(shared / "loras/malformed", loras, ["embedding.safetensors"])
    index(folder / "i.db", loras)
    return folder / "i.db"


REAL = "fox-000002.safetensors"
LIGHT = {
    "help": ["--help"],
    "help of a command": ["similar", "--help"],
    "version": ["--version"],
    "similar": ["similar", "loras/{first}", "--json"],
    "similar without a basis": ["similar", f"loras/{REAL}", "--json"],
    "similar by groups": ["similar", "loras/{first}", "--by", "self,ff", "--all", "--json"],
    "similar by name": ["similar", "fox-000002", "--json"],
    "dupes": ["dupes", "--json"],
    "dupes others": ["dupes", "--others", "-0"],
    "index": ["index", "--json"],
    "index a folder": ["index", "loras", "--json"],
    "whatis": ["whatis", f"loras/{REAL}", "--json"],
    "whatis of what is no LoRA": ["whatis", "loras/embedding.safetensors", "--json"],
    "ls": ["ls", "--json"],
    "epochs": ["epochs", "--json"],
    "info of a header": ["info", "--header-only", f"loras/{REAL}", "--json"],
}


def run(arguments: list[str], db: Path) -> subprocess.CompletedProcess[bytes]:
    first = sorted((db.parent / "loras").glob("*-train-*"))[0].name
    return subprocess.run(
        [sys.executable, "-c", TELLING, *(a.format(first=first) for a in arguments)],
        env=environment(db),
        cwd=db.parent,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", LIGHT)
def test_without_torch(name: str, db: Path) -> None:
    arguments = LIGHT[name]
    done = run(arguments, db)
    assert done.returncode == 0, done.stderr.decode()
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("loaded:")
    loaded = last.split()[1:]
    # Only who writes needs the library that makes the tables.
    assert loaded == [] or (arguments[0] == "index" and loaded == ["sqlite_utils"]), loaded
    if "--json" in arguments:
        assert json.loads(done.stdout)


def test_the_test_sees_torch(db: Path, shared: Path) -> None:
    new = shared / "loras/real/sd1_cloneofsimo_lora_disney.safetensors"
    done = run(["similar", str(new)], db)
    assert b"loaded: torch" in done.stderr

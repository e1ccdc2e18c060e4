"""What is published works: the wheel, by itself, without extras, in a clean environment."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def call(*command: str | Path, folder: Path) -> str:
    """Run outside of the repository and of this environment; returns stdout."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LORAFIND_DB"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as it is for publishing."""
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with nothing but the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True)
    found = folder / "env" / SCRIPTS
    call(found / "python", "-m", "pip", "install", "-c", CONSTRAINTS, wheel, folder=folder)
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lorafind").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert names == files
    assert "lorafind/py.typed" in names
    assert len(licences) == 1
    assert wheel.stat().st_size < 3_000_000


def test_every_module_imports_with_the_runtime_dependencies_alone(
    scripts: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib, pkgutil, lorafind\n"
        "for module in pkgutil.walk_packages(lorafind.__path__, 'lorafind.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "        print(module.name)\n"
    )
    assert "lorafind.cli.app\n" in call(scripts / "python", "-c", code, folder=tmp_path)


def test_the_installed_program_runs(wheel: Path, scripts: Path, tmp_path: Path) -> None:
    assert "Exit codes" in call(scripts / "lorafind", "--help", folder=tmp_path)
    version = call(scripts / "lorafind", "--version", folder=tmp_path).split()[-1]
    assert wheel.name == f"lorafind-{version}-py3-none-any.whl"


def test_the_installed_program_indexes_and_finds(scripts: Path, tmp_path: Path) -> None:
    lorafind = scripts / "lorafind"
    assert "$ lorafind index" in call(lorafind, "demo", "files", "--quiet", folder=tmp_path)
    db = ("--db", tmp_path / "own.db")
    folders = ("files/thin", "files/wild", "files/copies")
    assert call(lorafind, "index", *folders, *db, folder=tmp_path) == ""
    target = "files/thin/lobster-train-01.safetensors"
    near = call(lorafind, "similar", target, "-k", "5", *db, folder=tmp_path).splitlines()
    assert len(near) == 5
    assert all(Path(line.split("\t")[0]).name.startswith("lobster") for line in near)
    copies = call(lorafind, "dupes", "--others", "-0", *db, folder=tmp_path).split("\0")
    assert [Path(path).parent.name for path in copies] == ["copies"] * 4 + [""]


def constraints() -> dict[str, str]:
    """Normalised name → exact version."""
    lines = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if line[:1] != "#"]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


def test_constraints_are_exact_for_every_platform() -> None:
    for name, version in constraints().items():
        assert name == normal(name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_constraints_name_everything_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    queue = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    listed = constraints()
    seen: set[str] = set()
    while queue:
        wanted = Requirement(queue.pop())
        name = normal(wanted.name)
        if name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        if "==" in str(wanted.specifier):
            # Exact already: the CUDA packages of torch.
            continue
        assert name in listed, f"{name} is not in constraints.txt"
        assert wanted.specifier.contains(listed[name]), f"{name}=={listed[name]}: {wanted}"
        queue += metadata.requires(wanted.name) or []


def normal(name: str) -> str:
    """A package's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()

"""Which engine reads the files: what does not fit, and what one machine does without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorafind.api import Index
from lorafind.cli.app import make_app
from lorafind.demo.make import make
from tests.e2e.tools import environment

#: An index of one machine, with a shard, and what it has loaded of other engines. (pandas and
#: pyarrow are loaded by sqlite-utils wherever they are installed.)
LOCAL = """
import sys
from lorafind.api import Index
with Index.open(sys.argv[1], write=True) as index:
    index.build([sys.argv[2]], device="cpu", shard=(1, 2))
print(*[name for name in ("ray", "lancedb") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "spark"}, "there is no engine 'spark': use local or ray"),
        ({"engine": "ray", "device": "cuda"}, "computes on CPUs: leave out the device cuda"),
        ({"ray_address": "auto"}, "needs the engine ray"),
        ({"shard": (3, 2)}, "there is no shard 3/2"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        with pytest.raises(ValueError, match=said):
            index.build([tmp_path], **options)  # type: ignore[arg-type]
        assert not index.store.roots()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "spark"], "spark"),
        (["--engine", "ray", "--device", "cuda"], "leave out --device cuda"),
        (["--ray-address", "auto"], "--ray-address needs --engine ray"),
        (["--shard", "one"], "'one' is no shard"),
    ],
)
def test_wrong_use(tmp_path: Path, arguments: list[str], said: str) -> None:
    call = ["--db", str(tmp_path / "x.db"), "index", str(tmp_path), *arguments]
    done = CliRunner().invoke(make_app(), call)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (tmp_path / "x.db").exists()


def test_without_ray_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python itself does with a module that may not be imported.
    monkeypatch.setitem(sys.modules, "ray", None)
    call = ["--db", str(tmp_path / "x.db"), "index", str(tmp_path), "--engine", "ray"]
    done = CliRunner().invoke(make_app(), call)
    assert done.exit_code == 4
    assert done.stderr.splitlines() == [
        "lorafind: This needs ray, which the extra 'ray' installs.",
        'try: pip install "lorafind[ray]"',
    ]


def test_one_machine_loads_no_other_engine(tmp_path: Path) -> None:
    make(tmp_path / "demo")
    done = subprocess.run(
        [sys.executable, "-c", LOCAL, tmp_path / "x.db", tmp_path / "demo" / "wild"],
        env=environment(tmp_path / "x.db"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"

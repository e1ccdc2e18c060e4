"""Files above the size from which they are read as a stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafind.files.safetensors import STREAM_ABOVE
from tests.benchmarks.files import modules
from tests.e2e import variants as v
from tests.e2e.tools import age, command, environment, relations, told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="measures memory with getrusage"),
]
GIB = 2**20  # in KiB
#: A process counts the memory of the one that it was forked from: so it is forked from a small one.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def test_streamed_files_are_like_others(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    tensors: v.Tensors = {}
    for name, o, i in modules("sdxl"):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(32, i, generator=g) / i**0.5
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(o, 32, generator=g) * 0.01
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(16.0)
    loras = tmp_path / "loras"
    loras.mkdir()
    large = v.write(loras / "f32.safetensors", tensors)
    assert large.stat().st_size > STREAM_ABOVE
    v.write(loras / "reordered.safetensors", dict(reversed(tensors.items())))
    small = v.write(loras / "f16.safetensors", {key: t.half() for key, t in tensors.items()})
    assert small.stat().st_size < STREAM_ABOVE
    v.write(
        loras / "half.safetensors",
        {key: t / 2 if "lora_up." in key else t for key, t in tensors.items()},
    )
    age(loras)
    db = tmp_path / "i.db"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command("index", loras)],
        env=environment(db),
        capture_output=True,
    )
    told(done)
    assert int(done.stdout) < GIB
    grades = {
        tuple(sorted(Path(name).stem for name in pair)): relation["grade"]
        for pair, relation in relations(db).items()
    }
    assert grades == {
        ("f32", "reordered"): "tensors",
        ("f16", "f32"): "weights",
        ("f16", "reordered"): "weights",
        ("f32", "half"): "scaled",
        ("half", "reordered"): "scaled",
        ("f16", "half"): "scaled",
    }
